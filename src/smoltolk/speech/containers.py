"""Whether an audio file is whole: what its headers promise against what is there.

libsndfile decodes what it finds. Of a file that was cut, or whose header is wrong, it gives the beginning
without a word; so the container is looked at first.
"""

import mmap

FORMATS = frozenset({"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3"})
"""Formats, as soundfile names them, in which a cut file can be told from a whole one."""

Data = bytes | mmap.mmap

_UNKNOWN_SIZES = (0, 0xFFFFFFFF, 2**64 - 1)  # what programs write to a header when they stream
_FLAC_START = b"fLaC\0\0\0\x22"  # the mark of a stream and the head of its first block, always 34 bytes long
# Bit rates of MPEG layer III in kbit/s by their index; 0 is "free", 15 is forbidden (ISO 11172-3, 13818-3).
_KBPS = (None, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, None)
_KBPS_LOW_RATES = (None, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, None)
_MPEG_RATES_HZ = (44_100, 48_000, 32_000, None)  # halved in version 2, a quarter in version 2.5
_MPEG_SLACK_FRAMES = 4  # a header without sound, and the delays of encoder and decoder that are cut off


def container_fault(data: Data) -> str | None:
    """What is wrong with a file of chunks or pages, None when nothing is known to be.

    Args:
        data: the content of a WAV, RF64, W64, AIFF, CAF, AU, NIST SPHERE, Ogg or FLAC file; nothing is said of others.
    """
    kind, form = data[:4], data[8:12]
    if kind in (b"RIFF", b"RF64") and form == b"WAVE":
        return _chunk_fault(data, b"data", start=12, is_little_endian=True)
    if kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _chunk_fault(data, b"SSND", start=12)
    if kind == b"caff":
        return _chunk_fault(data, b"data", start=8, size_bytes=8, is_padded=False)
    if kind == b"riff":  # W64: the size of the whole file stands behind a name of 16 bytes
        return _missing(data, int.from_bytes(data[16:24], "little"))
    if kind == b".snd":
        size = int.from_bytes(data[8:12])
        return None if size in _UNKNOWN_SIZES else _missing(data, int.from_bytes(data[4:8]) + size)
    if kind == b"NIST":
        return _nist_fault(data)
    if kind == b"OggS":
        return _ogg_fault(data)
    if kind == b"fLaC" and data.find(_FLAC_START, 4) > 0:
        return "holds more than one FLAC stream, of which only the first would be read: convert it to one"
    return None


def mp3_fault(data: Data, num_decoded: int) -> str | None:
    """What is wrong with an MP3 file of which `num_decoded` samples were decoded, None when nothing is known to be.

    An MP3 has no length of its own. Decoders guess it by the first frame where the "Xing" header is missing,
    and stop too early when the bit rate varies; two files put together have the header of the first. So the
    frames are counted. A file that was cut just between two frames, and has no such header, passes.
    """
    start = 0
    if data[:3] == b"ID3":
        start = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
    num_samples = frame_samples = 0
    while found := _mpeg_frame(data[start : start + 4]):
        num_bytes, frame_samples = found
        start += num_bytes
        num_samples += frame_samples
    if start > len(data):
        return _missing(data, start)
    if num_decoded < num_samples - _MPEG_SLACK_FRAMES * frame_samples:
        return (
            f"has about {num_samples} samples, of which only {num_decoded} are found by its header: decode it to "
            "WAV with a program that reads all of it"
        )
    return None


def _mpeg_frame(header: bytes) -> tuple[int, int] | None:
    """Bytes and samples of a frame of MPEG layer III, None where no such frame begins."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:  # 11 bits of sync, then layer III
        return None
    version = header[1] >> 3 & 3  # 3 is version 1, 2 is version 2, 0 is version 2.5
    rate_hz = _MPEG_RATES_HZ[header[2] >> 2 & 3]
    kbps = (_KBPS if version == 3 else _KBPS_LOW_RATES)[header[2] >> 4]
    if rate_hz is None or kbps is None or version == 1:
        return None
    rate_hz //= {3: 1, 2: 2, 0: 4}[version]
    frame_samples = 1152 if version == 3 else 576
    return frame_samples // 8 * 1000 * kbps // rate_hz + (header[2] >> 1 & 1), frame_samples


def _missing(data: Data, end: int) -> str | None:
    return f"is truncated ({end - len(data)} bytes are missing): copy it again" if end > len(data) else None


def _chunk_fault(
    data: Data,
    samples_chunk: bytes,
    *,
    start: int,
    size_bytes: int = 4,
    is_little_endian: bool = False,
    is_padded: bool = True,
) -> str | None:
    """Fault of a file of chunks (name, size, content), one of which holds the samples."""
    is_rf64 = data[:4] == b"RF64"
    while start + 4 + size_bytes <= len(data):
        content = start + 4 + size_bytes
        size = int.from_bytes(data[start + 4 : content], "little" if is_little_endian else "big")
        is_samples = data[start : start + 4] == samples_chunk
        if is_samples and is_rf64 and size == 0xFFFFFFFF:  # then it stands in "ds64", always the first chunk
            size = int.from_bytes(data[28:36], "little")
        start = content + size + (size % 2 if is_padded else 0)  # chunks start at even bytes
        if is_samples and size in _UNKNOWN_SIZES:
            return None
        if is_samples:
            return _missing(data, content + size) or _leftover(data, start)
    return "ends before its samples, it is truncated or broken: copy it again"


def _leftover(data: Data, end: int) -> str | None:
    """Behind the samples come other chunks, or zeros; else the header promises too few samples."""
    rest = data[end : end + 8]
    if len(rest) < 8 or not any(rest) or (rest[:4].isascii() and rest[:4].decode("ascii").isprintable()):
        return None
    return (
        f"has {len(data) - end} bytes behind the samples that its header promises, so its header is wrong: "
        "copy it again or convert it again"
    )


def _nist_fault(data: Data) -> str | None:
    """Fault of a NIST SPHERE file; its header is a text of "name -type value" lines."""
    lines = data[:1024].decode("latin-1").split("\n")
    fields = {words[0]: words[2] for words in map(str.split, lines) if len(words) == 3}
    try:
        count, channels, width = (int(fields[key]) for key in ("sample_count", "channel_count", "sample_n_bytes"))
        header_bytes = int(lines[1])
    except (KeyError, ValueError, IndexError):
        return "has no length in its header, it is truncated or broken: copy it again or convert it to WAV"
    return _missing(data, header_bytes + count * channels * width)


def _ogg_fault(data: Data) -> str | None:
    """Fault of a file of Ogg pages; each says how long it is, and whether a stream begins or ends there."""
    start, num_streams, is_ended = 0, 0, False
    while data[start : start + 4] == b"OggS":
        header = data[start : start + 27]
        if len(header) < 27:
            return _missing(data, start + 27)
        segments = data[start + 27 : start + 27 + header[26]]
        start += 27 + header[26] + sum(segments)
        num_streams += header[5] >> 1 & 1
        is_ended = bool(header[5] & 4)
    if start > len(data):
        return _missing(data, start)
    if num_streams > 1:
        return f"holds {num_streams} streams, of which only the first would be read: convert it to one"
    if not is_ended:
        return "is truncated (its last page is not marked as the last): copy it again or convert it again"
    return None
