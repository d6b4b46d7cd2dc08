import errno
import io
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from smoltolk.speech.audio import (
    AudioError,
    check_output,
    load_audio,
    load_native_audio,
    save_wav,
    write_atomically,
)

RATE_HZ = 16_000


def tone(seconds: float = 1.0, rate_hz: int = RATE_HZ, frequency_hz: float = 440) -> np.ndarray:
    times_s = np.arange(int(seconds * rate_hz)) / rate_hz
    return (0.5 * np.sin(2 * np.pi * frequency_hz * times_s)).astype(np.float32)


def encoded(audio: np.ndarray, rate_hz: int = RATE_HZ, **format_: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate_hz, **({"format": "WAV"} | format_))
    return file.getvalue()


def load(source: str | Path | bytes | np.ndarray, source_rate_hz: int | None = None) -> np.ndarray:
    return load_audio(source, sample_rate_hz=RATE_HZ, source_rate_hz=source_rate_hz)


@pytest.mark.parametrize("format_", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_every_format_is_told_by_its_content_not_by_its_name(tmp_path: Path, format_: str) -> None:
    path = tmp_path / "speech.raw"
    path.write_bytes(encoded(tone(), format=format_))
    audio = load(path)
    assert audio.dtype == np.float32
    assert audio.shape == (RATE_HZ,)
    assert np.corrcoef(audio, tone())[0, 1] > 0.95


def test_path_string_bytes_and_array_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    path.write_bytes(encoded(tone(), subtype="FLOAT"))
    from_array = load(tone(), source_rate_hz=RATE_HZ)
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(load(source), from_array)


def test_audio_is_resampled() -> None:
    audio = load(tone(rate_hz=22_050), source_rate_hz=22_050)
    assert abs(len(audio) - RATE_HZ) <= 1
    assert np.corrcoef(audio[:RATE_HZ], tone()[: len(audio)])[0, 1] > 0.999


def test_int16_arrays_are_scaled() -> None:
    as_int16 = (tone() * 32768).astype(np.int16)
    np.testing.assert_allclose(load(as_int16, source_rate_hz=RATE_HZ), tone(), atol=1e-4)


def test_the_caller_keeps_its_array() -> None:
    array = tone()
    loaded = load(array, source_rate_hz=RATE_HZ)
    loaded[:] = 0
    np.testing.assert_array_equal(array, tone())


def test_channels_are_averaged() -> None:
    stereo = np.stack([tone(), 0.5 * tone()], axis=1)
    np.testing.assert_allclose(load(encoded(stereo, subtype="FLOAT")), 0.75 * tone(), atol=1e-6)


def test_of_channels_in_antiphase_the_strongest_is_taken() -> None:
    stereo = np.stack([0.98 * tone(), -tone()], axis=1)
    np.testing.assert_allclose(load(encoded(stereo, subtype="FLOAT")), -tone(), atol=1e-6)


@pytest.mark.parametrize("format_", ["WAV", "WAVEX", "AIFF"])
@pytest.mark.parametrize("num_lost", [1, 100, 16_000])
def test_a_truncated_file_is_refused_with_its_path(tmp_path: Path, format_: str, num_lost: int) -> None:
    path = tmp_path / "cut.wav"
    path.write_bytes(encoded(tone(), format=format_)[:-num_lost])
    with pytest.raises(AudioError, match=r"cut\.wav is truncated .*copy it again"):
        load(path)


def test_a_wav_written_to_a_pipe_is_read_to_its_end() -> None:
    data = bytearray(encoded(tone()))
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    assert len(load(bytes(data))) == RATE_HZ


def test_a_wav_with_more_after_its_samples_is_read() -> None:
    data = encoded(tone()) + b"LIST" + (4).to_bytes(4, "little") + b"INFO"
    assert len(load(data)) == RATE_HZ


@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_a_broken_mp3_is_refused_with_its_path(tmp_path: Path, damage: str) -> None:
    data = encoded(tone(), format="MP3")
    half = len(data) // 2
    path = tmp_path / "broken.mp3"
    path.write_bytes(data[:half] if damage == "cut" else data[:half] + b"\xff" * 200 + data[half + 200 :])
    with pytest.raises(AudioError, match=r"broken\.mp3 is broken: \d+ of \d+ samples"):
        load(path)


@pytest.mark.parametrize("format_", ["FLAC", "OGG"])
def test_a_broken_compressed_file_is_refused(format_: str) -> None:
    data = encoded(tone(), format=format_)
    with pytest.raises(AudioError, match=r"cannot be decoded|is truncated \(1238 bytes"):
        load(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (tone(0), "no samples"),
        (np.zeros(RATE_HZ, np.float32), "is silent"),
        (np.full(RATE_HZ, 5e-5, np.float32), "is silent"),
        (np.append(tone(), np.float32(np.nan)), "NaN or infinite"),
        (np.append(tone(), np.float32(np.inf)), "NaN or infinite"),
        (tone(0.09), "lasts 0.090 s"),
        (tone() * 30_000, "scale it"),
    ],
)
def test_audio_without_usable_samples_is_refused_from_files_and_arrays(
    tmp_path: Path, audio: np.ndarray, message: str
) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(encoded(audio, subtype="FLOAT"))
    with pytest.raises(AudioError, match=rf"bad\.wav.*{message}"):
        load(path)
    with pytest.raises(AudioError, match=message):
        load(audio, source_rate_hz=RATE_HZ)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (tone().astype(np.int64), "type int64"),
        (np.full(RATE_HZ, "a"), "type <U1"),
        (tone().astype(np.complex64), "type complex64"),
        (tone()[None], "transpose"),
        (tone()[:, None, None], "unfit shape"),
        (np.empty((100, 0), np.float32), "unfit shape"),
        (np.array(0.5, np.float32), "unfit shape"),
    ],
)
def test_an_array_of_unfit_type_or_shape_is_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        load(array, source_rate_hz=RATE_HZ)


@pytest.mark.parametrize("source_rate_hz", [None, 0, -1])
def test_an_array_without_its_rate_is_refused(source_rate_hz: int | None) -> None:
    with pytest.raises(AudioError, match="source_rate_hz"):
        load(tone(), source_rate_hz=source_rate_hz)


def test_a_missing_file_a_folder_an_empty_and_a_text_file_are_refused_with_their_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("This is a transcript, not audio. " * 50)
    for name, message in {
        "missing.wav": "cannot be read .*correct the path",
        "": "is a folder",
        "empty.wav": "is empty",
        "text.wav": "cannot be decoded",
    }.items():
        path = tmp_path / name
        with pytest.raises(AudioError, match=message) as raised:
            load(path)
        assert str(path) in str(raised.value)


def test_a_saved_wav_is_16_bit_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "speech.wav"
    save_wav(path, tone(), RATE_HZ)
    assert soundfile.info(path).subtype == "PCM_16"
    np.testing.assert_allclose(load(path), tone(), atol=1e-4)
    assert os.listdir(tmp_path) == ["speech.wav"]


def test_louder_samples_are_clipped_on_saving(tmp_path: Path) -> None:
    save_wav(tmp_path / "loud.wav", 4 * tone(), RATE_HZ)
    np.testing.assert_allclose(load(tmp_path / "loud.wav"), np.clip(4 * tone(), -1, 1), atol=1e-4)


@pytest.mark.parametrize("audio", [np.zeros((2, 100)), np.array([0.1, np.nan])])
def test_audio_that_cannot_be_saved_is_refused(tmp_path: Path, audio: np.ndarray) -> None:
    with pytest.raises(AudioError, match=r"out\.wav"):
        save_wav(tmp_path / "out.wav", audio, RATE_HZ)
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fill_the_disk(aside: Path, data: bytes) -> int:
        with open(aside, "wb") as file:
            file.write(data[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match=r"No space left on device: .*file"):
        write_atomically(path, b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_audio_can_keep_its_own_sampling_rate() -> None:
    stereo = np.stack([tone(rate_hz=11_000), tone(rate_hz=11_000)], axis=1)
    audio, rate_hz = load_native_audio(encoded(stereo, 11_000, format="FLAC"))
    assert rate_hz == 11_000
    np.testing.assert_allclose(audio, tone(rate_hz=11_000), atol=1e-4)
    with pytest.raises(AudioError, match="is silent"):
        load_native_audio(encoded(np.zeros(8000)))


def test_an_output_that_cannot_be_written_is_said_and_looking_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_output(tmp_path / "page.html")
    check_output(tmp_path / "a" / "b", is_folder=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    check_output(tmp_path / "file")
    check_output(tmp_path, is_folder=True)
    with pytest.raises(ValueError, match="file is a file: give the name of a folder"):
        check_output(tmp_path / "file", is_folder=True)

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for path, is_folder in ((tmp_path / "page.html", False), (tmp_path / "a" / "b", True)):
        with pytest.raises(ValueError, match=rf"output {path} cannot be written, {tmp_path} takes no .*Read-only"):
            check_output(path, is_folder=is_folder)
