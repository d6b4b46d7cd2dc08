"""Every kind of odd and broken audio: each gives the right units, or an error with the reason."""

import io
import os
import re
import struct
import threading
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from tests.speech.conftest import RATE_HZ, syllables

from smoltolk.speech.audio import AudioError, load_audio, stream_audio
from smoltolk.speech.mel import MelTokenizer

AUDIO = syllables(7, count=12)
SILENCE = np.zeros(RATE_HZ, np.float32)


def encoded(audio: np.ndarray = AUDIO, rate_hz: int = RATE_HZ, **settings: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio, rate_hz, **({"format": "WAV", "subtype": None} | settings))
    return file.getvalue()


def pcm_wav(audio: np.ndarray = AUDIO, *, promised_bytes: int | None = None, rate_hz: int = RATE_HZ) -> bytes:
    """A 16-bit WAV whose header may lie."""
    samples = (audio * 32767).astype("<i2").tobytes()
    size = len(samples) if promised_bytes is None else promised_bytes
    header = struct.pack("<IHHIIHH", 16, 1, 1, rate_hz, 2 * rate_hz, 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", min(36 + size, 0xFFFFFFFF))
        + b"WAVEfmt "
        + header
        + b"data"
        + struct.pack("<I", size)
        + samples
    )


def flac_of_length(num_frames: int) -> bytes:
    """A FLAC whose header promises another number of samples (36 bits of the block STREAMINFO)."""
    data = bytearray(encoded(format="FLAC"))
    fields = int.from_bytes(data[18:26])
    data[18:26] = (fields >> 36 << 36 | num_frames).to_bytes(8)
    return bytes(data)


def without_first_mp3_frame(audio: np.ndarray, **settings: object) -> bytes:
    """An MP3 without the header that holds its length, as cut from a broadcast."""
    data = encoded(audio, format="MP3", **settings)
    return data[data.index(data[:2], 4) :]


def zipped(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.wav", data)
    return file.getvalue()


def part(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


GOOD: dict[str, tuple[Callable[[], bytes], float]] = {  # with the least correlation with the original
    "8-bit WAV": (lambda: encoded(subtype="PCM_U8"), 0.999),
    "24-bit WAV": (lambda: encoded(subtype="PCM_24"), 0.9999),
    "float WAV": (lambda: encoded(subtype="FLOAT"), 0.9999),
    "64-bit float WAV": (lambda: encoded(subtype="DOUBLE"), 0.9999),
    "A-law": (lambda: encoded(subtype="ALAW"), 0.999),
    "μ-law": (lambda: encoded(subtype="ULAW"), 0.999),
    "IMA ADPCM": (lambda: encoded(subtype="IMA_ADPCM"), 0.98),
    "Microsoft ADPCM": (lambda: encoded(subtype="MS_ADPCM"), 0.98),
    "GSM 6.10": (lambda: encoded(subtype="GSM610"), 0.7),
    "G.721": (lambda: encoded(subtype="G721_32"), 0.99),
    "96 kHz": (lambda: encoded(soxr.resample(AUDIO, RATE_HZ, 96_000), 96_000, subtype="PCM_24"), 0.999),
    "8 kHz": (lambda: encoded(soxr.resample(AUDIO, RATE_HZ, 8_000), 8_000), 0.9),
    "5.1 channels": (lambda: encoded(np.stack([AUDIO] * 6, axis=1)), 0.9999),
    "stereo in antiphase": (lambda: encoded(np.stack([AUDIO, -AUDIO], axis=1)), 0.9999),
    "big-endian AIFF": (lambda: encoded(format="AIFF"), 0.9999),
    "W64": (lambda: encoded(format="W64"), 0.9999),
    "RF64": (lambda: encoded(format="RF64"), 0.9999),
    "AU": (lambda: encoded(format="AU"), 0.9999),
    "CAF": (lambda: encoded(format="CAF"), 0.9999),
    "NIST SPHERE": (lambda: encoded(format="NIST"), 0.9999),
    "FLAC": (lambda: encoded(format="FLAC"), 0.9999),
    "Ogg Vorbis": (lambda: encoded(format="OGG"), 0.95),
    "Ogg Opus": (lambda: encoded(format="OGG", subtype="OPUS"), 0.95),
    "MP3": (lambda: encoded(format="MP3"), 0.95),
    "MP3 with an ID3 tag": (lambda: b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + encoded(format="MP3"), 0.95),
    "WAV from a pipe": (lambda: pcm_wav(promised_bytes=0xFFFFFFFF), 0.9999),
    "WAV with zeros behind": (lambda: pcm_wav() + bytes(100), 0.9999),
}

BAD: dict[str, tuple[Callable[[], bytes], str]] = {
    "no bytes": (lambda: b"", "is empty"),
    "WAV without samples": (lambda: encoded(SILENCE[:0]), "has no samples"),
    "90 ms": (lambda: encoded(AUDIO[: RATE_HZ * 9 // 100]), r"lasts 0\.090 s"),
    "silence": (lambda: encoded(SILENCE), "is silent"),
    "NaN": (lambda: encoded(np.append(AUDIO, np.float32(np.nan)), subtype="FLOAT"), "NaN or infinite"),
    "infinity": (lambda: encoded(np.append(AUDIO, np.float32(-np.inf)), subtype="FLOAT"), "NaN or infinite"),
    "integers kept as floats": (lambda: encoded(AUDIO * 32768, subtype="FLOAT"), "scale it"),
    "17 channels": (lambda: encoded(np.stack([AUDIO] * 17, axis=1)), "has 17 channels"),
    "sampling rate of 1 Hz": (lambda: pcm_wav(rate_hz=1), "sampling rate of 1 Hz"),
    "sampling rate of 2 GHz": (lambda: pcm_wav(rate_hz=2**31 - 1), "sampling rate of 2147483647 Hz"),
    "text named .wav": (lambda: b"This is a transcript, not audio. " * 50, "cannot be decoded"),
    "HTML of an error page": (lambda: b"<!doctype html><title>404</title>" * 50, "cannot be decoded"),
    "encrypted .m4p": (lambda: b"\0\0\0\x20ftypM4P " + np.random.default_rng(0).bytes(40_000), "cannot be decoded"),
    "WAV inside a ZIP": (lambda: zipped(encoded()), "cannot be decoded"),
    "WAV of an unknown codec": (
        lambda: pcm_wav().replace(b"\x10\0\0\0\1\0", b"\x10\0\0\0\x99\x99"),
        "cannot be decoded",
    ),
    "VOC": (lambda: encoded(format="VOC"), "VOC file, in which a cut one cannot be told"),
    "truncated WAV": (lambda: part(encoded(), 0.6), r"is truncated \(\d+ bytes"),
    "WAV cut in its header": (lambda: encoded()[:40], "ends before its samples"),
    "truncated AIFF": (lambda: part(encoded(format="AIFF"), 0.99), "is truncated"),
    "AIFF cut in its header": (lambda: encoded(format="AIFF")[:32], "ends before its samples"),
    "truncated W64": (lambda: part(encoded(format="W64"), 0.99), "is truncated"),
    "truncated RF64": (lambda: part(encoded(format="RF64"), 0.99), "is truncated"),
    "truncated AU": (lambda: part(encoded(format="AU"), 0.99), "is truncated"),
    "truncated CAF": (lambda: part(encoded(format="CAF"), 0.99), "is truncated"),
    "truncated NIST SPHERE": (lambda: part(encoded(format="NIST"), 0.99), "is truncated"),
    "NIST SPHERE without a length": (
        lambda: encoded(format="NIST").replace(b"sample_count", b"sample_guess"),
        "no length in its header",
    ),
    "truncated FLAC": (lambda: part(encoded(format="FLAC"), 0.99), "cannot be decoded"),
    "truncated MP3": (lambda: part(encoded(format="MP3"), 0.7), "is broken: "),
    "truncated Ogg Vorbis": (lambda: part(encoded(format="OGG"), 0.99), "is truncated"),
    "truncated Ogg Opus": (lambda: part(encoded(format="OGG", subtype="OPUS"), 0.99), "is truncated"),
    "Ogg cut between pages": (
        lambda: (data := encoded(np.tile(AUDIO, 4), format="OGG"))[: data.rindex(b"OggS")],
        "last page is not marked",
    ),
    "Ogg cut in a page's header": (
        lambda: (data := encoded(np.tile(AUDIO, 4), format="OGG"))[: data.rindex(b"OggS") + 20],
        r"is truncated \(7 bytes",
    ),
    "two Ogg streams in a chain": (lambda: 2 * encoded(format="OGG"), "holds 2 streams"),
    "two FLAC files in one": (lambda: 2 * encoded(format="FLAC"), "more than one FLAC stream"),
    "two MP3 files in one": (lambda: 2 * encoded(format="MP3"), "only .* found by its header"),
    "truncated MP3 of constant rate without a header of its length": (
        lambda: without_first_mp3_frame(AUDIO, bitrate_mode="CONSTANT")[:-100],
        r"is truncated \(28 bytes",
    ),
    "MP3 of variable rate without a header of its length": (
        lambda: without_first_mp3_frame(np.append(AUDIO, np.tile(SILENCE, 3))),
        "only .* found by its header",
    ),
    "overwritten FLAC": (
        lambda: (data := encoded(format="FLAC"))[:5000] + bytes(400) + data[5400:],
        "cannot be decoded",
    ),
    "WAV header with too many samples": (lambda: pcm_wav(promised_bytes=10**6), "is truncated"),
    "WAV header with too few samples": (lambda: pcm_wav(promised_bytes=10_000), "header is wrong"),
    "WAV header without its length": (lambda: pcm_wav(promised_bytes=0), "has no samples"),
    "FLAC header with too many samples": (lambda: flac_of_length(len(AUDIO) + 1), "cannot be decoded"),
    "FLAC from a pipe": (lambda: flac_of_length(0), "does not say how long it is"),
    "FLAC header with 10 hours": (lambda: flac_of_length(36_000 * RATE_HZ), r"lasts 10\.0 h"),
    "FLAC header with 1,193 hours": (lambda: flac_of_length(2**36 - 1), r"lasts 1193\.0 h"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_odd_but_whole_audio_gives_units(kind: str, tmp_path: Path, tokenizer: MelTokenizer) -> None:
    make, least_correlation = GOOD[kind]
    path = tmp_path / "audio.mp3"  # the wrong extension for most of them
    path.write_bytes(make())
    audio = load_audio(path, sample_rate_hz=RATE_HZ)
    assert abs(len(audio) - len(AUDIO)) < 0.1 * RATE_HZ  # codecs fill their last block
    both = min(len(audio), len(AUDIO))
    assert abs(np.corrcoef(audio[:both], AUDIO[:both])[0, 1]) > least_correlation
    np.testing.assert_allclose(np.concatenate([*stream_audio(path, sample_rate_hz=RATE_HZ)]), audio, atol=2e-5)
    units = tokenizer.encode(audio)
    assert abs(units.durations.sum() - len(audio) / RATE_HZ * tokenizer.unit_rate_hz) <= 1


@pytest.mark.parametrize("kind", BAD)
def test_broken_audio_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    make, reason = BAD[kind]
    path = tmp_path / "broken.wav"
    path.write_bytes(make())
    with pytest.raises(AudioError, match=rf"broken\.wav.*{reason}"):
        load_audio(path, sample_rate_hz=RATE_HZ)
    if "hours" not in kind:  # any length can be read in blocks
        with pytest.raises(AudioError, match=rf"broken\.wav.*{reason}"):
            next(stream_audio(path, sample_rate_hz=RATE_HZ))


def test_ten_hours_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with open(path, "wb") as file:
        with wave.open(file, "wb") as writer:
            writer.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
            writer.writeframes(b"\1\0")
        file.truncate(2 * 36_000 * RATE_HZ)  # a hole: it takes no place on the disk
    with pytest.raises(AudioError, match=r"long\.wav has 1\.2 GB, too long to hold in memory: read it in pieces"):
        load_audio(path, sample_rate_hz=RATE_HZ)


def test_what_is_not_a_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "nowhere.wav").symlink_to("missing")
    reasons = {
        "folder.wav": "is a folder",
        "pipe.wav": "is a pipe or a device",
        "/dev/zero": "is a pipe or a device",
        "loop.wav": "cannot be read",
        "nowhere.wav": "cannot be read .*No such file",
        "missing.wav": "cannot be read .*No such file",
        "a" * 300: "cannot be read .*too long",
    }
    messages = {}

    def read_all() -> None:
        for name in reasons:
            with pytest.raises(AudioError) as raised:
                load_audio(tmp_path / name, sample_rate_hz=RATE_HZ)
            with pytest.raises(AudioError):
                stream_audio(tmp_path / name, sample_rate_hz=RATE_HZ)
            messages[name] = str(raised.value)

    thread = threading.Thread(target=read_all, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert messages.keys() == reasons.keys()  # else it hangs
    for name, reason in reasons.items():
        assert re.search(reason, messages[name])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret.wav"
    path.write_bytes(encoded())
    path.chmod(0)
    with pytest.raises(AudioError, match=r"cannot be read .*Permission denied"):
        load_audio(path, sample_rate_hz=RATE_HZ)


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded())
    (tmp_path / "link.wav").symlink_to("a.wav")
    assert len(load_audio(tmp_path / "link.wav", sample_rate_hz=RATE_HZ)) == len(AUDIO)


def test_random_bytes_are_never_taken_for_audio() -> None:
    for seed in range(20):
        noise = np.random.default_rng(seed).bytes(20_000)
        for beginning in (b"", b"ID3\x03\0\0\0\0\0\0", b"\xff\xfb\x90\0", b"OggS", b"fLaC", b"RIFF\0\0\0\0WAVE"):
            with pytest.raises(AudioError):
                load_audio(beginning + noise, sample_rate_hz=RATE_HZ)
