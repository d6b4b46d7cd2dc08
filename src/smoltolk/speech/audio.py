"""Audio in and out: one loader for files, bytes and arrays that lets no broken audio pass in silence."""

import io
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from smoltolk.speech.containers import FORMATS, container_fault, mp3_fault

_MIN_SECONDS = 0.1
_SILENCE_PEAK = 1e-4
_MAX_PEAK = 10.0  # decoders overshoot 1 a little; integers kept as floats exceed it by far
_CANCELLATION = 0.05  # a mix this much weaker (RMS) than its strongest channel has cancelled itself out
_MAX_CHANNELS = 16
_SAMPLE_RATES_HZ = (4_000, 768_000)  # others come from broken headers; resampling from them would fill the memory
_PART_TOLERANCE_S = 0.1
_MAX_SECONDS = 4 * 3600.0
_MAX_SAMPLES = 1 << 28  # of all channels: 1 GiB as float32, of which a few copies are made
_TOO_LONG = "too long to hold in memory: read it in pieces (stream_audio), or cut it"
_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's, of a FLAC file that was written to a pipe


class AudioError(ValueError):
    """Audio that cannot be used; the message names the source and the remedy."""


def load_audio(
    source: str | Path | bytes | np.ndarray, *, sample_rate_hz: int, source_rate_hz: int | None = None
) -> np.ndarray:
    """Read audio as one channel at the wanted sampling rate.

    Channels are averaged; channels that cancel each other out are replaced by the strongest of them.

    Args:
        source: a path, the bytes of a file, or an array (samples,) or (samples, channels) of floats in −1 … 1
            or of int16. Files are told apart by content, not by name: WAV (RF64 and W64 too), FLAC, OGG, MP3,
            AIFF, AU, CAF and NIST SPHERE.
        sample_rate_hz: wanted sampling rate.
        source_rate_hz: sampling rate of an array; files bring their own.

    Returns:
        Float32 (samples,), at least 0.1 s.

    Raises:
        AudioError: the file is missing, is no audio or is truncated or broken; the audio is empty, silent,
            shorter than 0.1 s, longer than memory should hold (4 h, or 2^28 samples), out of range or holds NaN;
            or the array has an unfit type or shape.
    """
    if isinstance(source, np.ndarray):
        name = f"audio array {source.shape}"
        channels, rate_hz = _from_array(source, source_rate_hz, name)
    else:
        data, name = _read_bytes(source)
        channels, rate_hz = _decode(data, name)

    return _as_one_channel(channels, rate_hz, sample_rate_hz, name)


def load_native_audio(source: str | Path | bytes) -> tuple[np.ndarray, int]:
    """Read audio as one channel at its own sampling rate, which is returned too; otherwise as `load_audio`.

    Returns:
        Float32 (samples,), at least 0.1 s, and the sampling rate in Hz.

    Raises:
        AudioError: as `load_audio`.
    """
    data, name = _read_bytes(source)
    channels, rate_hz = _decode(data, name)
    return _as_one_channel(channels, rate_hz, rate_hz, name), rate_hz


def load_part(
    source: str | Path | bytes, *, sample_rate_hz: int, start_s: float = 0.0, end_s: float | None = None
) -> np.ndarray:
    """Read a part of a recording as `load_audio` reads a whole one; decodes no more than the part.

    Args:
        source: a path or the bytes of a file.
        sample_rate_hz: wanted sampling rate.
        start_s: where the part starts.
        end_s: where it ends, by default at the end; corpora round their times, so it may be 0.1 s past that.

    Returns:
        Float32 (samples,), at least 0.1 s.

    Raises:
        AudioError: as `load_audio`; also when the recording has no such part.
    """
    name = f"audio of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    if isinstance(source, bytes):
        _refuse(container_fault(source), name)
    else:
        with _open(Path(source)) as file:
            about = os.fstat(file.fileno())
        _refuse(_fault_of_file(Path(source), about.st_size, about.st_mtime_ns), name)
    # As a file object: soundfile would judge a path by its suffix, not by its content.
    with (
        io.BytesIO(source) if isinstance(source, bytes) else _open(Path(source)) as data,
        _decoding(name),
        soundfile.SoundFile(data) as audio,
    ):
        _refuse_header(audio, name)
        rate_hz, seconds = audio.samplerate, audio.frames / audio.samplerate
        end_s = seconds if end_s is None else end_s
        if not 0 <= start_s < end_s <= seconds + _PART_TOLERANCE_S:
            raise AudioError(
                f"{name} has no part from {start_s:.3f} to {end_s:.3f} s, it lasts {seconds:.3f} s: correct the times"
            )
        if end_s - start_s > _MAX_SECONDS:
            raise AudioError(f"{name} has a part of {end_s - start_s:.0f} s, more than {_MAX_SECONDS:.0f}: divide it")
        first, stop = round(start_s * rate_hz), min(round(end_s * rate_hz), audio.frames)
        audio.seek(first)
        channels = audio.read(stop - first, dtype="float32", always_2d=True)
    _refuse_missing(len(channels), stop - first, name)
    return _as_one_channel(channels, rate_hz, sample_rate_hz, name)


@lru_cache(maxsize=1024)  # a recording has many parts
def _fault_of_file(path: Path, _size: int, _modified_ns: int) -> str | None:
    with _open(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return container_fault(data)


def stream_audio(path: str | Path, *, sample_rate_hz: int, block_s: float = 10.0) -> Iterator[np.ndarray]:
    """Read an audio file of any length in blocks; together they are what `load_audio` returns.

    The file is decoded twice, which takes the memory of a few blocks. The first time, before this returns, it is
    checked and its channels are weighed as a whole, so that nothing is given out of a file that cannot be used.

    Args:
        path: the file.
        sample_rate_hz: wanted sampling rate.
        block_s: length of a block before it is resampled.

    Returns:
        Iterator over blocks of one channel, float32 (samples,), none of them empty.

    Raises:
        AudioError: as `load_audio`, but for length; while iterating, if the file has changed since it was checked.
        ValueError: `block_s` is not above 0.
    """
    if block_s <= 0:
        raise ValueError(f"block_s is {block_s}: give a length above 0")
    name = str(path)
    with _open(Path(path)) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _refuse(container_fault(data), name)
        survey = None
        for channels, rate_hz in _decode_blocks(path, block_s):
            survey = survey or _Survey(channels.shape[1], rate_hz)
            survey.add(channels)
        survey = survey or _Survey(num_channels=1, rate_hz=sample_rate_hz)
        _refuse(mp3_fault(data, survey.num_samples), name)
    survey.refuse_unusable(name)
    return _resampled_blocks(path, survey, sample_rate_hz, block_s)


def save_wav(path: str | Path, audio: np.ndarray, sample_rate_hz: int) -> None:
    """Write a waveform (samples,) in −1 … 1 as 16-bit WAV; louder samples are clipped.

    Raises:
        AudioError: the waveform has another shape, or NaN or infinite samples.
        OSError: the file cannot be written; nothing half-written stays.
    """
    if audio.ndim != 1:
        raise AudioError(f"audio for {path} has shape {audio.shape}: give one channel, (samples,)")
    if not np.isfinite(audio).all():
        raise AudioError(f"audio for {path} has NaN or infinite samples: repair it first")
    file = io.BytesIO()
    soundfile.write(file, np.clip(audio, -1, 1), sample_rate_hz, format="WAV", subtype="PCM_16")
    write_atomically(Path(path), file.getvalue())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file aside and rename it, so that it is whole or not there at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; names the path.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(data)
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def check_output(output: Path, *, is_folder: bool = False) -> None:
    """Say before long work what writing its output would say after it.

    Args:
        output: what will be written.
        is_folder: whether that is a folder, which need not be there yet, and not a file.

    Raises:
        ValueError: there is something else at the path, no folder to write it into, or one that takes no files.
    """
    if output.exists() and output.is_dir() != is_folder:
        raise ValueError(
            f"output {output} is a file: give the name of a folder"
            if is_folder
            else f"output {output} is a folder: give the name of a file in a folder that is there"
        )
    folder = output if is_folder else output.parent
    while is_folder and not folder.exists():  # all of them will be made
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(
            f"output {output} lies in {folder}, which is not a folder: give a path in a folder that is there"
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output {output} cannot be written, {folder} takes no files ({error.strerror}): give another path, or "
            "leave to write there"
        ) from error


def _read_bytes(source: str | Path | bytes) -> tuple[bytes, str]:
    """Content and name of a file."""
    if isinstance(source, bytes):
        name = f"audio of {len(source)} bytes"
        if not source:
            raise AudioError(f"{name} is empty: leave it out or copy it again")
    else:
        name = str(source)
        with _open(Path(source)) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > 4 * _MAX_SAMPLES:
                raise AudioError(f"{name} has {num_bytes / 1e9:.1f} GB, {_TOO_LONG}")
            source = file.read()
    return source, name


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """A regular file that is there and not empty."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise AudioError(f"{path} is a folder: give an audio file in it")
        if not stat.S_ISREG(mode):  # opening a pipe could wait for ever, a device never end
            raise AudioError(f"{path} is a pipe or a device: save the audio to a file first")
        file = open(path, "rb")  # noqa: SIM115, closed below: the error is said of opening alone
    except OSError as error:
        raise AudioError(f"{path} cannot be read ({error.strerror}): correct the path") from error
    with file:
        if os.fstat(file.fileno()).st_size == 0:
            raise AudioError(f"{path} is empty: leave it out or copy it again")
        yield file


def _refuse(fault: str | None, name: str) -> None:
    if fault:
        raise AudioError(f"{name} {fault}")


def _decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples, float32 (samples, channels), and sampling rate of a file."""
    _refuse(container_fault(data), name)
    with _decoding(name), soundfile.SoundFile(io.BytesIO(data)) as file:
        _refuse_header(file, name)
        seconds = file.frames / file.samplerate
        if seconds > _MAX_SECONDS or file.frames * file.channels > _MAX_SAMPLES:
            raise AudioError(f"{name} lasts {seconds / 3600:.1f} h in {file.channels} channels, {_TOO_LONG}")
        channels = file.read(file.frames, dtype="float32", always_2d=True)
        num_promised, rate_hz = file.frames, file.samplerate
    _refuse_missing(len(channels), num_promised, name)
    _refuse(mp3_fault(data, len(channels)), name)
    return channels, rate_hz


def _decode_blocks(path: str | Path, block_s: float) -> Iterator[tuple[np.ndarray, int]]:
    """Samples, float32 (samples, channels), and sampling rate of each block of a file; none of them empty."""
    name, num_samples = str(path), 0
    # A descriptor has no name that libsndfile could take for the format.
    with _open(Path(path)) as opened, _decoding(name), soundfile.SoundFile(opened.fileno(), closefd=False) as file:
        _refuse_header(file, name)
        block_samples = max(1, round(block_s * file.samplerate))
        while len(channels := file.read(block_samples, dtype="float32", always_2d=True)):
            num_samples += len(channels)
            yield channels, file.samplerate
        num_promised = file.frames
    _refuse_missing(num_samples, num_promised, name)


def _resampled_blocks(path: str | Path, survey: "_Survey", sample_rate_hz: int, block_s: float) -> Iterator[np.ndarray]:
    resampler, num_samples = None, 0
    for channels, rate_hz in _decode_blocks(path, block_s):
        num_samples += len(channels)
        if channels.shape[1] != len(survey.energies) or num_samples > survey.num_samples:
            break
        audio = np.ascontiguousarray(survey.mix_down(channels), dtype=np.float32)
        if rate_hz != sample_rate_hz:
            resampler = resampler or soxr.ResampleStream(rate_hz, sample_rate_hz, 1, dtype="float32")
            audio = resampler.resample_chunk(audio, last=num_samples == survey.num_samples)
        if len(audio):
            yield audio
    if num_samples != survey.num_samples:
        raise AudioError(f"{path} has changed while it was read: read it again when it is whole")


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Says of what libsndfile refuses which file it is, and what to do."""
    try:
        yield
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} cannot be decoded ({error.error_string}): it is broken or no audio; copy it again or "
            "convert it to WAV"
        ) from error


def _refuse_header(file: soundfile.SoundFile, name: str) -> None:
    """Refuse what a header says before anything is decoded."""
    if file.format not in FORMATS:
        raise AudioError(
            f"{name} is a {file.format} file, in which a cut one cannot be told from a whole one: convert it to WAV"
        )
    lowest, highest = _SAMPLE_RATES_HZ
    if not lowest <= file.samplerate <= highest:
        raise AudioError(
            f"{name} has a sampling rate of {file.samplerate} Hz, outside of {lowest} … {highest}: its header is "
            "wrong; convert it again"
        )
    if file.channels > _MAX_CHANNELS:
        raise AudioError(f"{name} has {file.channels} channels, more than {_MAX_CHANNELS}: keep the one that speaks")
    if file.frames == _UNKNOWN_FRAMES:
        raise AudioError(f"{name} does not say how long it is, it was written to a pipe: convert it again")


def _refuse_missing(num_samples: int, num_promised: int, name: str) -> None:
    if num_samples < num_promised:
        raise AudioError(f"{name} is broken: {num_samples} of {num_promised} samples can be decoded; copy it again")


def _as_one_channel(channels: np.ndarray, rate_hz: int, sample_rate_hz: int, name: str) -> np.ndarray:
    """Checked and mixed down, at the wanted rate: float32 (samples, channels) → (samples,)."""
    survey = _Survey(channels.shape[1], rate_hz)
    survey.add(channels)
    survey.refuse_unusable(name)
    audio = survey.mix_down(channels)
    if rate_hz != sample_rate_hz:
        audio = soxr.resample(audio, rate_hz, sample_rate_hz)
    return np.ascontiguousarray(audio, dtype=np.float32)


def _from_array(array: np.ndarray, rate_hz: int | None, name: str) -> tuple[np.ndarray, int]:
    """Samples, float32 (samples, channels), and sampling rate of an array."""
    if rate_hz is None or rate_hz <= 0:
        raise AudioError(f"source_rate_hz is {rate_hz}: give the sampling rate of the array")
    if array.dtype == np.int16:
        array = array.astype(np.float32) / 32768
    elif not np.issubdtype(array.dtype, np.floating):
        raise AudioError(f"{name} has type {array.dtype}: give floats in −1 … 1 or int16")
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or not 1 <= array.shape[1] <= _MAX_CHANNELS:
        raise AudioError(f"{name} has an unfit shape: give (samples,) or (samples, channels); transpose it")
    return array.astype(np.float32), rate_hz


class _Survey:
    """What the samples of a file are like as a whole."""

    def __init__(self, num_channels: int, rate_hz: int) -> None:
        self.rate_hz = rate_hz
        self.num_samples = 0
        self.is_finite = True
        self.peak = 0.0
        self.energies = np.zeros(num_channels)  # of each channel
        self.mix_energy = 0.0

    def add(self, channels: np.ndarray) -> None:
        """Take in samples, float32 (samples, channels)."""
        self.num_samples += len(channels)
        self.is_finite = self.is_finite and bool(np.isfinite(channels).all())
        if not self.is_finite or not len(channels):
            return
        self.peak = max(self.peak, float(np.abs(channels).max()))
        self.energies += np.square(channels, dtype=np.float64).sum(axis=0)
        self.mix_energy += float(np.square(channels.mean(axis=1), dtype=np.float64).sum())

    def refuse_unusable(self, name: str) -> None:
        """Raise for audio that is empty, not finite, too short, silent or too loud."""
        if not self.num_samples:
            raise AudioError(f"{name} has no samples: leave it out or record it again")
        if not self.is_finite:
            raise AudioError(f"{name} has NaN or infinite samples: repair it or leave it out")
        seconds = self.num_samples / self.rate_hz
        if seconds < _MIN_SECONDS:
            raise AudioError(f"{name} lasts {seconds:.3f} s, less than {_MIN_SECONDS} s: leave it out")
        if self.peak < _SILENCE_PEAK:
            raise AudioError(f"{name} is silent (peak {self.peak:.1e}): leave it out or record it again")
        if self.peak > _MAX_PEAK:
            raise AudioError(f"{name} has samples up to {self.peak:.0f}: scale it to −1 … 1")

    def mix_down(self, channels: np.ndarray) -> np.ndarray:
        """One channel (samples,) of some of the samples (samples, channels)."""
        if self.mix_energy < _CANCELLATION**2 * self.energies.max():
            return channels[:, self.energies.argmax()]
        return channels.mean(axis=1)
