import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile

from smoltolk.speech.audio import AudioError, load_audio, stream_audio


def noise(num_samples: int, num_channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (num_samples, num_channels)).astype(np.float32)


def streamed(path: Path, sample_rate_hz: int = 16_000, block_s: float = 0.3) -> np.ndarray:
    return np.concatenate(list(stream_audio(path, sample_rate_hz=sample_rate_hz, block_s=block_s)))


@pytest.mark.parametrize("block_s", [1e-3, 0.1234, 10])
@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize(
    ("rate_hz", "wanted_hz"), [(16_000, 16_000), (44_100, 16_000), (8000, 16_000), (22_050, 24_000)]
)
def test_the_blocks_of_a_file_are_together_what_the_loader_gives(
    tmp_path: Path, rate_hz: int, wanted_hz: int, num_channels: int, block_s: float
) -> None:
    path = tmp_path / "speech.wav"
    soundfile.write(path, noise(rate_hz + 77, num_channels), rate_hz, subtype="FLOAT")
    loaded = load_audio(path, sample_rate_hz=wanted_hz)
    blocks = list(stream_audio(path, sample_rate_hz=wanted_hz, block_s=block_s))
    assert all(len(block) and block.dtype == np.float32 for block in blocks)
    np.testing.assert_allclose(np.concatenate(blocks), loaded, atol=1e-6)


@pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_every_format_is_streamed_and_told_by_its_content(tmp_path: Path, format_: str) -> None:
    path = tmp_path / "speech.raw"
    with open(path, "wb") as file:
        soundfile.write(file, noise(30_000, 2), 22_050, format=format_)
    np.testing.assert_allclose(streamed(path), load_audio(path, sample_rate_hz=16_000), atol=1e-5)


def test_the_channel_of_a_file_in_antiphase_is_chosen_by_the_whole_file(tmp_path: Path) -> None:
    # In antiphase but for the first block; the second channel is the stronger one only in the end.
    left = noise(64_000)[:, 0]
    right = -left.copy()
    right[:4000] = left[:4000]
    right[4000:] *= np.linspace(0.97, 1.03, 60_000, dtype=np.float32)
    left[:4000] *= 0.001
    right[:4000] *= 0.001
    path = tmp_path / "antiphase.wav"
    soundfile.write(path, np.stack([left, right], axis=1), 16_000, subtype="FLOAT")
    np.testing.assert_array_equal(streamed(path), load_audio(path, sample_rate_hz=16_000))
    np.testing.assert_array_equal(streamed(path), right)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (noise(0), "no samples"),
        (0 * noise(16_000), "is silent"),
        (np.append(noise(16_000), [[np.nan]], axis=0), "NaN or infinite"),
        (noise(1500), "lasts 0.094 s"),
        (noise(16_000) * 30_000, "scale it"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_before_the_first_block(
    tmp_path: Path, audio: np.ndarray, message: str
) -> None:
    path = tmp_path / "bad.wav"
    soundfile.write(path, audio, 16_000, subtype="FLOAT")
    for read in (stream_audio, load_audio):
        with pytest.raises(AudioError, match=rf"bad\.wav.*{message}"):
            read(path, sample_rate_hz=16_000)


@pytest.mark.parametrize(("format_", "message"), [("WAV", "truncated"), ("AIFF", "truncated"), ("MP3", "is broken")])
def test_a_file_cut_off_is_refused_before_the_first_block(tmp_path: Path, format_: str, message: str) -> None:
    path = tmp_path / "cut"
    with open(path, "wb") as file:
        soundfile.write(file, noise(32_000), 16_000, format=format_)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(AudioError, match=f"cut {message}|cut is {message}"):
        stream_audio(path, sample_rate_hz=16_000, block_s=0.1)


def test_a_missing_file_a_folder_an_empty_and_a_text_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("This is a transcript, not audio. " * 50)
    for name, message in {
        "missing.wav": "cannot be read .*correct the path",
        "": "is a folder",
        "empty.wav": "is empty",
        "text.wav": "cannot be decoded",
    }.items():
        with pytest.raises(AudioError, match=message):
            stream_audio(tmp_path / name, sample_rate_hz=16_000)


def test_a_block_without_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="block_s is 0"):
        stream_audio(tmp_path / "any.wav", sample_rate_hz=16_000, block_s=0)


@pytest.mark.parametrize("num_samples", [20_000, 40_000])
def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, num_samples: int) -> None:
    path = tmp_path / "growing.wav"
    soundfile.write(path, noise(32_000), 16_000)
    blocks = stream_audio(path, sample_rate_hz=16_000, block_s=0.1)
    soundfile.write(path, noise(num_samples), 16_000)
    with pytest.raises(AudioError, match=r"growing\.wav has changed"):
        list(blocks)


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    soundfile.write(path, noise(32_000), 16_000)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    blocks = stream_audio(path, sample_rate_hz=16_000, block_s=0.1)
    next(blocks)
    del blocks
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak_bytes(minutes: int) -> int:
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 8000, 1) as file:
            for minute in range(minutes):
                file.write(noise(60 * 8000, seed=minute)[:, 0])
        tracemalloc.start()
        num_samples = sum(len(block) for block in stream_audio(path, sample_rate_hz=16_000))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_samples == minutes * 60 * 16_000
        return peak

    short, long = peak_bytes(1), peak_bytes(6)
    assert long < 1.1 * short
    assert long < 60 * 16_000 * 4  # less than one minute of what it gives
