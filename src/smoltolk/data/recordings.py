"""Recordings that are used as they are, not through a store: for vocoders and for resynthesis."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from smoltolk.data.sources import audio_files, read_manifest
from smoltolk.speech.audio import AudioError, load_audio, stream_audio
from smoltolk.speech.mel_vocoder import MelVocoder
from smoltolk.speech.resynthesis import Recording
from smoltolk.speech.units import SpeechTokenizer, Units

_SHORTEST_STREAM_S = 0.1  # above a frame of any tokenizer, which it takes to fit one
_SHORTEST_CUT_S = 1.0  # what is left below this when the bound is near is not worth a cut


@dataclass(frozen=True)
class FittedVocoder:
    """A vocoder and what it was trained on.

    Args:
        vocoder: the vocoder.
        num_files: recordings that were used; of the last one perhaps the beginning only.
        seconds: length of the audio that was used.
        failed: files that could not be used, with the reasons.
    """

    vocoder: MelVocoder
    num_files: int
    seconds: float
    failed: tuple[tuple[Path, str], ...]


def find_recordings(sources: Iterable[Path]) -> list[Recording]:
    """The recordings in files, folders and manifests, in a fixed order.

    Args:
        sources: audio files; folders, where a .txt file of the same stem beside an audio file is its text; JSONL or
            CSV manifests with the column "audio", relative to the manifest, and perhaps "text".

    Raises:
        ValueError: a manifest cannot be read, or a .txt file is not UTF-8.
    """
    recordings: list[Recording] = []
    for source in sources:
        if source.suffix in (".jsonl", ".csv"):
            recordings += _manifest_recordings(source)
        else:
            for audio in audio_files([source]):
                name = audio.relative_to(source).as_posix() if source.is_dir() else audio.name
                recordings.append(Recording(audio, name, _text_beside(audio)))
    return recordings


def fit_mel_vocoder(
    recordings: Sequence[Recording],
    tokenizer: SpeechTokenizer,
    *,
    max_seconds: float = 1800.0,
    steps: int = 300,
    seed: int = 0,
    encoding: Callable[[float], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> FittedVocoder:
    """Train a vocoder on recordings of one voice.

    Args:
        recordings: the recordings; texts are not needed.
        tokenizer: what makes the units.
        max_seconds: how much audio is used at most, which bounds memory: about 500 MB for half an hour. Recordings
            are taken in an order drawn with the seed until it is reached.
        steps: training steps.
        seed: decides which recordings are used, the initial weights and the order of training.
        encoding: called with the seconds of each recording once it is encoded.
        progress: called with 1 after each training step.

    Raises:
        ValueError: `max_seconds` or `steps` is out of range, or no recording can be used.
    """
    if max_seconds < _SHORTEST_CUT_S:
        raise ValueError(f"max_seconds is {max_seconds:g}: give {_SHORTEST_CUT_S:g} s or more")
    if steps < 1:
        raise ValueError(f"steps is {steps}: give 1 or more")
    used_s: list[float] = []
    failed: list[tuple[Path, str]] = []

    def pairs() -> Iterator[tuple[Units, np.ndarray]]:
        rate_hz = tokenizer.sample_rate_hz
        for i in np.random.default_rng(seed).permutation(len(recordings)):
            rest_s = max_seconds - sum(used_s)
            if rest_s < _SHORTEST_CUT_S:
                return
            path = recordings[i].audio
            try:
                audio = load_audio(path, sample_rate_hz=rate_hz)[: round(rest_s * rate_hz)]
                units = tokenizer.encode(audio)
            except ValueError as error:
                failed.append((path, str(error)))
                continue
            used_s.append(len(audio) / rate_hz)
            if encoding is not None:
                encoding(used_s[-1])
            yield units, audio
        if not used_s:
            reason = f"the first: {failed[0][1]}" if failed else "there are none"
            raise ValueError(f"no recording can be used ({reason}): give recordings of one voice")

    vocoder = MelVocoder.fit(pairs(), tokenizer, steps=steps, seed=seed, progress=progress)
    return FittedVocoder(vocoder, len(used_s), sum(used_s), tuple(failed))


def stream_usable(
    paths: Iterable[Path], *, sample_rate_hz: int, on_failure: Callable[[Path, str], None]
) -> Iterator[Iterator[np.ndarray]]:
    """The blocks of each recording that can be used, to fit a speech tokenizer.

    Args:
        paths: audio files.
        sample_rate_hz: wanted sampling rate.
        on_failure: called with each file that cannot be used, or is shorter than 0.1 s, and the reason.

    Raises:
        ValueError: no recording can be used; names the first.
    """
    num_used = 0
    first_reason = "there are none"
    for path in paths:
        try:
            blocks = stream_audio(path, sample_rate_hz=sample_rate_hz)
            start = _start_of(blocks, path, sample_rate_hz)
        except AudioError as error:
            if first_reason == "there are none":
                first_reason = f"the first: {error}"
            on_failure(path, str(error))
            continue
        num_used += 1
        yield chain(start, blocks)
    if not num_used:
        raise ValueError(f"no recording can be used ({first_reason}): give recordings of speech")


def _start_of(blocks: Iterator[np.ndarray], path: Path, sample_rate_hz: int) -> list[np.ndarray]:
    """So many blocks of a recording that it is known not to be too short."""
    start: list[np.ndarray] = []
    seconds = 0.0
    for block in blocks:
        start.append(block)
        seconds += len(block) / sample_rate_hz
        if seconds >= _SHORTEST_STREAM_S:
            return start
    raise AudioError(f"{path} lasts {seconds:.3f} s: {_SHORTEST_STREAM_S:g} s or more are needed")


def _manifest_recordings(manifest: Path) -> Iterator[Recording]:
    for row, fields in enumerate(read_manifest(manifest), start=1):
        audio, text = fields.get("audio"), fields.get("text")
        if not isinstance(audio, str) or not isinstance(text, str | None):
            raise ValueError(
                f"{manifest}, row {row}: audio is {audio!r} and text is {text!r}: give the path of a recording, and "
                "a text or none"
            )
        path = Path(audio)
        name = path.name if path.is_absolute() or ".." in path.parts else path.as_posix()
        yield Recording(manifest.parent / path, name, text)


def _text_beside(audio: Path) -> str | None:
    path = audio.with_suffix(".txt")
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from None
