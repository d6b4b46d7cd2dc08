import numpy as np
import pytest

from smoltolk.speech.mel import MelTokenizer

RATE_HZ = 16_000


def syllables(seed: int, count: int = 40) -> np.ndarray:
    """Harmonic sounds of six kinds and random lengths with breaks between them, float32 (samples,)."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(count):
        formant_hz = [300, 600, 1000, 1800, 2600, 3600][rng.integers(6)]
        times_s = np.arange(int(rng.uniform(0.06, 0.25) * RATE_HZ)) / RATE_HZ
        harmonics_hz = 120 * np.arange(1, 50)
        strengths = np.exp(-0.5 * ((harmonics_hz - formant_hz) / 200) ** 2)
        sound = (strengths[:, None] * np.sin(2 * np.pi * harmonics_hz[:, None] * times_s)).sum(axis=0)
        pieces += [0.3 * sound / np.abs(sound).max(), np.zeros(int(rng.uniform(0, 0.05) * RATE_HZ))]
    return np.concatenate(pieces).astype(np.float32)


@pytest.fixture(scope="session")
def audios() -> list[np.ndarray]:
    return [syllables(seed, count=10 + 10 * seed) for seed in range(6)]


@pytest.fixture(scope="session")
def tokenizer(audios: list[np.ndarray]) -> MelTokenizer:
    return MelTokenizer.fit(audios, num_units=12)
