"""Audio in and out: one loader for files, bytes and arrays that lets no broken audio pass in silence."""

import io
import os
import stat
from pathlib import Path

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
_MAX_SECONDS = 4 * 3600.0
_MAX_SAMPLES = 1 << 28  # of all channels: 1 GiB as float32, of which a few copies are made
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
            shorter than 0.1 s, too long to be held in memory, out of range or holds NaN; or the array has an
            unfit type or shape.
    """
    if isinstance(source, np.ndarray):
        name = f"audio array {source.shape}"
        channels, rate_hz = _from_array(source, source_rate_hz, name)
    else:
        data, name = _read_bytes(source)
        channels, rate_hz = _decode(data, name)

    if not len(channels):
        raise AudioError(f"{name} has no samples: leave it out or record it again")
    peak = max(channels.max(), -channels.min())  # one without a copy of all samples; NaN if there is one
    if not np.isfinite(peak):
        raise AudioError(f"{name} has NaN or infinite samples: repair it or leave it out")
    seconds = len(channels) / rate_hz
    if seconds < _MIN_SECONDS:
        raise AudioError(f"{name} lasts {seconds:.3f} s, less than {_MIN_SECONDS} s: leave it out")
    if peak < _SILENCE_PEAK:
        raise AudioError(f"{name} is silent (peak {peak:.1e}): leave it out or record it again")
    if peak > _MAX_PEAK:
        raise AudioError(f"{name} has samples up to {peak:.0f}: scale it to −1 … 1")

    audio = _mix_down(channels)
    if rate_hz != sample_rate_hz:
        audio = soxr.resample(audio, rate_hz, sample_rate_hz)
    return np.ascontiguousarray(audio, dtype=np.float32)


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


def _read_bytes(source: str | Path | bytes) -> tuple[bytes, str]:
    """Content and name of a file."""
    if isinstance(source, bytes):
        name = f"audio of {len(source)} bytes"
    else:
        path = Path(source)
        name = str(path)
        try:
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                raise AudioError(f"{name} is a folder: give an audio file in it")
            if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever, a device never end
                raise AudioError(f"{name} is a pipe or a device: save the audio to a file first")
            if status.st_size > 4 * _MAX_SAMPLES:
                raise AudioError(f"{name} has {status.st_size / 1e9:.1f} GB: read it in pieces, or cut it")
            source = path.read_bytes()
        except OSError as error:
            raise AudioError(f"{name} cannot be read ({error.strerror}): correct the path") from error
    if not source:
        raise AudioError(f"{name} is empty: leave it out or copy it again")
    return source, name


def _decode(data: bytes, name: str) -> tuple[np.ndarray, int]:
    """Samples, float32 (samples, channels), and sampling rate of a file."""
    if fault := container_fault(data):
        raise AudioError(f"{name} {fault}")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _refuse_header(file, name)
            channels = file.read(dtype="float32", always_2d=True, frames=file.frames)
            num_promised, rate_hz, format_ = file.frames, file.samplerate, file.format
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name} cannot be decoded ({error.error_string}): it is broken or no audio; copy it again or "
            "convert it to WAV"
        ) from error
    if len(channels) < num_promised:
        raise AudioError(f"{name} is broken: {len(channels)} of {num_promised} samples can be decoded; copy it again")
    if format_ == "MP3" and (fault := mp3_fault(data, len(channels))):
        raise AudioError(f"{name} {fault}")
    return channels, rate_hz


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
    seconds = file.frames / file.samplerate
    if seconds > _MAX_SECONDS or file.frames * file.channels > _MAX_SAMPLES:
        raise AudioError(
            f"{name} lasts {seconds / 3600:.1f} h in {file.channels} channels, too long to hold in memory: "
            "read it in pieces, or cut it"
        )


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


def _mix_down(channels: np.ndarray) -> np.ndarray:
    """One channel (samples,) of (samples, channels)."""
    if channels.shape[1] == 1:
        return channels[:, 0]
    mix = channels.mean(axis=1)
    powers = np.square(channels, dtype=np.float64).mean(axis=0)
    if np.square(mix, dtype=np.float64).mean() < _CANCELLATION**2 * powers.max():
        return channels[:, powers.argmax()]
    return mix
