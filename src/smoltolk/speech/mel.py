"""The speech tokenizer that needs no downloaded model.

Log-mel frames, k-means, and a Viterbi path that pays for every change of unit. Its units describe the sound of
the voice it was fitted on. They are not semantic units: they change with the speaker.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import librosa
import numpy as np
import safetensors
import safetensors.numpy
import torch
from sklearn.cluster import KMeans

from smoltolk.speech.audio import write_atomically
from smoltolk.speech.units import CARD_FILE, SpeechTokenizer, Units, read_card

_WEIGHTS_FILE = "kmeans.safetensors"
_FIT_FRAMES = 100_000  # k-means sees at most so many frames, chosen at random; about a second at 64 units
_BLOCK_FRAMES = 4096  # frames per call of the Fourier transform, so that long audio needs little memory
_BATCH_FRAMES = 1 << 16  # padded frames per Viterbi batch


class LogMel:
    """Log-mel frames of a waveform; frame i is centred on samples i·hop to (i+1)·hop.

    Args:
        sample_rate_hz: sampling rate of the audio.
        hop_samples: samples from one frame to the next.
        window_samples: length of the Hann window, and of the Fourier transform.
        num_bands: mel bands.
        power_floor: lowest mel power.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int,
        hop_samples: int,
        window_samples: int,
        num_bands: int,
        power_floor: float,
    ) -> None:
        self.hop_samples, self.window_samples, self.power_floor = hop_samples, window_samples, power_floor
        self.filters = librosa.filters.mel(sr=sample_rate_hz, n_fft=window_samples, n_mels=num_bands)
        self._window = torch.hann_window(window_samples)

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        """Natural logarithm of mel powers, float32 (num_frames, num_bands), of float32 (samples,).

        Raises:
            ValueError: the waveform is shorter than one hop, not finite or of the wrong shape.
        """
        hop, window = self.hop_samples, self.window_samples
        if audio.ndim != 1:
            raise ValueError(f"audio has shape {audio.shape}: give one channel, (samples,)")
        if len(audio) < hop:
            raise ValueError(
                f"audio has {len(audio)} samples, less than one frame of {hop}: leave out audio this short"
            )
        if not np.isfinite(audio).all():
            raise ValueError("audio has NaN or infinite samples: repair it or leave it out")
        num_frames = len(audio) // hop
        waveform = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
        padded = torch.nn.functional.pad(waveform, ((window - hop) // 2, window))
        filters = torch.from_numpy(self.filters)
        blocks = []
        for first in range(0, num_frames, _BLOCK_FRAMES):
            count = min(_BLOCK_FRAMES, num_frames - first)
            spectrum = torch.stft(
                padded[first * hop : (first + count - 1) * hop + window],
                n_fft=window,
                hop_length=hop,
                window=self._window,
                center=False,
                return_complex=True,
            )  # (bins, count)
            mel = filters @ spectrum.abs().square()  # (num_bands, count)
            blocks.append(mel.clamp_min(self.power_floor).log().T)
        return torch.cat(blocks).numpy()


@dataclass(frozen=True)
class MelSettings:
    """How `MelTokenizer` hears.

    A hop of 10 ms lets a unit start anywhere in a word; with hops of 20 to 40 ms the same word gets other
    units whenever the frames fall differently on it. The window of 93 ms smooths over single periods of the
    voice.

    Args:
        sample_rate_hz: sampling rate of the audio.
        hop_samples: samples from one frame to the next.
        window_samples: length of the Hann window, and of the Fourier transform.
        num_bands: mel bands.
        power_floor: mel power below which all is silence. Lower floors spend units on inaudible differences.
        switch_penalty: what a change of unit costs, in mean squared distances per dimension of the normalised
            features. Higher values give fewer and longer units.
    """

    sample_rate_hz: int = 16_000
    hop_samples: int = 160
    window_samples: int = 1488
    num_bands: int = 40
    power_floor: float = 1e-3
    switch_penalty: float = 1.2

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}: give a value above 0")

    def log_mel(self) -> LogMel:
        """The features."""
        return LogMel(
            sample_rate_hz=self.sample_rate_hz,
            hop_samples=self.hop_samples,
            window_samples=self.window_samples,
            num_bands=self.num_bands,
            power_floor=self.power_floor,
        )


class MelTokenizer(SpeechTokenizer):
    """Log-mel bands, k-means and Viterbi.

    Args:
        centroids: k-means centroids of normalised frames, float32 (num_units, num_bands).
        band_means: mean of each log-mel band over the fitted corpus, float32 (num_bands,).
        band_stds: standard deviation of each band, float32 (num_bands,).
        settings: how it hears.
    """

    kind = "mel"
    sample_rate_hz = MelSettings.sample_rate_hz  # by default

    def __init__(
        self,
        centroids: np.ndarray,
        band_means: np.ndarray,
        band_stds: np.ndarray,
        settings: MelSettings = MelSettings(),
    ) -> None:
        self.settings = settings
        self.centroids = np.ascontiguousarray(centroids, dtype=np.float32)
        self.band_means = np.ascontiguousarray(band_means, dtype=np.float32)
        self.band_stds = np.ascontiguousarray(band_stds, dtype=np.float32)
        self.sample_rate_hz = settings.sample_rate_hz
        self.unit_rate_hz = settings.sample_rate_hz / settings.hop_samples
        self.num_units = len(centroids)
        self.fingerprint = _fingerprint(self.kind, settings, self._weights())
        self._extract = settings.log_mel()

    @classmethod
    def fit(
        cls,
        audios: Iterable[np.ndarray],
        *,
        num_units: int = 64,
        seed: int = 0,
        settings: MelSettings = MelSettings(),
    ) -> Self:
        """Learn band statistics and centroids.

        Ten minutes of speech are enough for 64 units. Fit on one voice if the units are for one voice: the
        statistics are those of the corpus.

        Args:
            audios: waveforms, float32 (samples,) each; read once, one at a time.
            num_units: number of centroids.
            seed: decides which frames k-means sees and where it starts.
            settings: how the tokenizer hears.

        Raises:
            ValueError: `num_units` is below 2, or the audio has fewer different frames than that.
        """
        if num_units < 2:
            raise ValueError(f"num_units is {num_units}: choose at least 2")
        rng = np.random.default_rng(seed)
        extract = settings.log_mel()
        num_frames = 0
        sums = np.zeros((2, settings.num_bands))  # of the bands and of their squares
        # Every frame draws a key and the lowest keys stay: a uniform sample from a stream of unknown length.
        sample = np.empty((0, settings.num_bands), np.float32)
        keys = np.empty(0)
        for audio in audios:
            frames = extract(audio)
            num_frames += len(frames)
            sums += np.stack([frames.sum(axis=0, dtype=np.float64), np.square(frames, dtype=np.float64).sum(axis=0)])
            sample = np.concatenate([sample, frames])
            keys = np.append(keys, rng.random(len(frames)))
            if len(keys) > _FIT_FRAMES:
                kept = np.argpartition(keys, _FIT_FRAMES)[:_FIT_FRAMES]
                sample, keys = sample[kept], keys[kept]
        num_different = len(np.unique(sample, axis=0))
        if num_different < num_units:
            raise ValueError(
                f"num_units is {num_units}, but the audio has only {num_different} different frames: give "
                "more audio or choose fewer units"
            )
        means = sums[0] / num_frames
        stds = np.sqrt(np.maximum(sums[1] / num_frames - means**2, 0))
        stds = np.where(stds < 1e-3, 1, stds)  # a band that is always silent says nothing
        # In float64, so that the order in which threads add up does not reach the rounded centroids.
        kmeans = KMeans(num_units, n_init=1, max_iter=50, random_state=seed).fit((sample - means) / stds)
        return cls(kmeans.cluster_centers_, means, stds, settings)

    def encode_batch(self, audios: Sequence[np.ndarray]) -> list[Units]:
        """Units of each waveform; faster than one by one, with the same result.

        Args:
            audios: waveforms at `sample_rate_hz`, float32 (samples,) each.

        Returns:
            Units of each waveform. Frame i covers samples i·hop to (i+1)·hop; a rest shorter than a hop is
            left out.

        Raises:
            ValueError: a waveform is shorter than one frame, not finite or of the wrong shape.
        """
        distances = [self._distances(audio) for audio in audios]
        encoded: list[Units | None] = [None] * len(audios)
        for group in _groups_of_similar_length([len(d) for d in distances]):
            paths = _viterbi([distances[i] for i in group], self.settings.switch_penalty)
            for i, path in zip(group, paths, strict=True):
                encoded[i] = Units.from_frames(path)
        return [units for units in encoded if units is not None]

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json` and `kmeans.safetensors` to a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        card = {**self.card(), "settings": asdict(self.settings)}
        write_atomically(folder / _WEIGHTS_FILE, safetensors.numpy.save(self._weights()))
        write_atomically(folder / CARD_FILE, (json.dumps(card, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a folder written by `save`.

        Raises:
            ValueError: a file is missing or damaged, or the weights do not have the fingerprint of the card.
        """
        folder = Path(path)
        card = read_card(folder)
        if card["kind"] != cls.kind:
            raise ValueError(f"{folder} holds a {card['kind']!r} tokenizer, not {cls.kind!r}")
        try:
            weights = safetensors.numpy.load_file(folder / _WEIGHTS_FILE)
            tokenizer = cls(
                weights["centroids"],
                weights["band_means"],
                weights["band_stds"],
                MelSettings(**card["settings"]),
            )
        except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} is not a whole tokenizer ({error}): fit or copy it again") from error
        if tokenizer.fingerprint != card["fingerprint"]:
            raise ValueError(
                f"{folder}: weights and settings have fingerprint {tokenizer.fingerprint}, but {CARD_FILE} "
                f"says {card['fingerprint']}: one of the files was changed; fit or copy the tokenizer again"
            )
        return tokenizer

    def _weights(self) -> dict[str, np.ndarray]:
        return {"band_means": self.band_means, "band_stds": self.band_stds, "centroids": self.centroids}

    def _distances(self, audio: np.ndarray) -> np.ndarray:
        """Mean squared distance per dimension to each centroid (num_frames, num_units)."""
        # One utterance at a time: matrix products of another height may round differently.
        frames = (self._extract(audio) - self.band_means) / self.band_stds
        squares = np.square(frames).sum(axis=1)[:, None] + np.square(self.centroids).sum(axis=1)
        return (squares - 2 * frames @ self.centroids.T) / self.settings.num_bands


def _viterbi(distances: list[np.ndarray], switch_penalty: float) -> list[np.ndarray]:
    """The cheapest path through each matrix: its distances plus `switch_penalty` for each change of unit.

    All changes cost the same, so a unit is best entered from itself or from the cheapest unit of all: each
    step takes time linear in the number of units.

    Args:
        distances: float32 (num_frames, num_units) each.
        switch_penalty: cost of a change.

    Returns:
        The unit of every frame, int64 (num_frames,) each.
    """
    num_utterances, num_units = len(distances), distances[0].shape[1]
    num_frames = max(len(d) for d in distances)
    # Padding costs nothing and so never changes the path before it.
    steps = np.zeros((num_frames, num_utterances, num_units), np.float32)
    for i, d in enumerate(distances):
        steps[: len(d), i] = d
    stays = np.empty((num_frames, num_utterances, num_units), bool)
    cheapest = np.empty((num_frames, num_utterances), np.int64)
    rows = np.arange(num_utterances)

    costs = steps[0].copy()  # (num_utterances, num_units), above the cheapest of the frame before
    for t in range(1, num_frames):
        cheapest[t] = costs.argmin(axis=1)
        costs -= costs[rows, cheapest[t]][:, None]
        np.less_equal(costs, switch_penalty, out=stays[t])
        np.minimum(costs, switch_penalty, out=costs)
        costs += steps[t]

    paths = np.empty((num_frames, num_utterances), np.int64)
    paths[-1] = costs.argmin(axis=1)
    for t in range(num_frames - 1, 0, -1):
        unit = paths[t]
        paths[t - 1] = np.where(stays[t, rows, unit], unit, cheapest[t])
    return [paths[: len(d), i] for i, d in enumerate(distances)]


def _groups_of_similar_length(lengths: list[int]) -> list[list[int]]:
    """Indices in groups of at most `_BATCH_FRAMES` padded frames (or of one), shortest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or (len(groups[-1]) + 1) * lengths[i] > _BATCH_FRAMES:
            groups.append([])
        groups[-1].append(i)
    return groups


def _fingerprint(kind: str, settings: MelSettings, weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([kind, asdict(settings)], sort_keys=True).encode())
    for name, weight in sorted(weights.items()):
        digest.update(f"{name}{weight.shape}".encode())
        digest.update(weight.astype("<f4").tobytes())
    return digest.hexdigest()
