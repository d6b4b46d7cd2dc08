"""Word times that other programs have written: readers for JSON, TextGrid, CTM, lhotse cuts and Whisper.

Every reader gives timed words; `smoltolk.speech.alignment.align_words` puts them to a text.
"""

import gzip
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from smoltolk.data.utterance import WORD_END_TOLERANCE_S
from smoltolk.speech.alignment import AlignmentError, TimedWord

_ROUNDING_S = 1e-3  # starts and durations are rounded each for itself
_SILENCES = frozenset({"", "<eps>", "sil", "sp"})  # how aligners label what is no word
_WORDS_TIER = "words"
OnError = Callable[[str, AlignmentError], None]


def read_alignment(
    path: str | Path, *, seconds: float | None = None, on_error: OnError | None = None
) -> list[TimedWord] | dict[str, list[TimedWord]]:
    """Timed words of a file of any kind that this module reads.

    The kind follows from the name: .TextGrid, .ctm, .jsonl and .jsonl.gz (lhotse cuts, such as Libriheavy's); in a
    .json file from what it holds: a list is ours, an object Whisper's.

    Args:
        path: the file.
        seconds: length of the audio, for files of one recording: no word may end after it.
        on_error: for files of many utterances, gets the id and the error of each bad one, which is then left out;
            by default the first one is raised.

    Returns:
        The words of a recording in time; of a CTM file or of cuts, those of each utterance by its id.

    Raises:
        AlignmentError: the file is of no known kind or damaged, or a time is missing, not finite, negative, before
            the word's start, before the end of the word before, or after the end of the audio; names the file and
            the word.
        ImportError: the file is a TextGrid and praatio is not installed.
    """
    path = Path(path)
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_cuts(path, on_error=on_error)
    if name.endswith(".ctm"):
        return read_ctm(path, on_error=on_error)
    if name.endswith(".textgrid"):
        return read_textgrid(path, seconds=seconds)
    if name.endswith(".json"):
        return read_json(path, seconds=seconds)
    raise AlignmentError(f"{path} is of no known kind: give .json, .TextGrid, .ctm, .jsonl or .jsonl.gz")


def words_of_utterance(path: Path, names: Sequence[str]) -> list[TimedWord]:
    """The timed words of one utterance from a file of it alone, or of many; the last few files are kept.

    Args:
        path: the file.
        names: what a file of many utterances may call this one; the first that is there counts.

    Raises:
        AlignmentError: see `read_alignment`; or the file does not have the utterance.
    """
    found, errors = _kept(path, path.stat().st_mtime_ns if path.is_file() else 0)
    if isinstance(found, list):
        return found
    for name in names:
        if name in errors:
            raise errors[name]
        if name in found:
            return found[name]
    raise AlignmentError(f"{path} has no words of {' or '.join(map(repr, names))}: align it")


@lru_cache(maxsize=4)
def _kept(
    path: Path, _modified_ns: int
) -> tuple[list[TimedWord] | dict[str, list[TimedWord]], dict[str, AlignmentError]]:
    errors: dict[str, AlignmentError] = {}
    try:
        return read_alignment(path, on_error=errors.__setitem__), errors
    except OSError as error:
        raise AlignmentError(f"{path} cannot be read ({error.strerror}): correct the path") from error


def cut_words(cut: Mapping[str, Any], where: str) -> list[TimedWord] | None:
    """The timed words of a lhotse cut, None if it has none; see `read_cuts`.

    Raises:
        AlignmentError: a time cannot be right; see `read_alignment`.
    """
    entries = _cut_entries(cut["supervisions"])
    return None if entries is None else _checked(entries, where, _number(cut["duration"]))


def read_json(path: str | Path, *, seconds: float | None = None) -> list[TimedWord]:
    """Timed words of a JSON file: a list of `{"text", "start_s", "end_s"}`, or what Whisper writes.

    Of Whisper's kinds it knows openai-whisper's with `word_timestamps=True` (`segments` with `words`), WhisperX's
    (the same, or `word_segments`) and that of the transformers pipeline with `return_timestamps="word"` (`chunks`).

    Raises:
        AlignmentError: see `read_alignment`.
    """
    path = Path(path)
    try:
        content = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise AlignmentError(f"{path} is not JSON ({error}): write it again") from None
    if isinstance(content, list):
        entries = [_fields(entry, ("text", "start_s", "end_s"), path) for entry in content]
    elif isinstance(content, dict):
        entries = _whisper_entries(content, path)
    else:
        raise AlignmentError(f"{path} holds a {type(content).__name__}: give a list of timed words, or Whisper's JSON")
    return _checked(entries, str(path), seconds)


def read_textgrid(path: str | Path, *, tier: str | None = None, seconds: float | None = None) -> list[TimedWord]:
    """Timed words of a tier of a Praat TextGrid, short or long, as the Montreal Forced Aligner writes it.

    Empty intervals are silences, and so are `<eps>`, `sil` and `sp`.

    Args:
        path: the file, in UTF-8 or UTF-16.
        tier: name of the tier; by default the one called "words", or the only one whose name ends so.
        seconds: length of the audio.

    Raises:
        AlignmentError: there is no such tier, or it holds points; and see `read_alignment`.
        ImportError: praatio is not installed.
    """
    try:
        from praatio.utilities import errors, textgrid_io
    except ImportError as error:
        raise ImportError("TextGrids need praatio, which is not installed: pip install 'smoltolk[align]'") from error

    path = Path(path)
    try:
        grid = textgrid_io.parseTextgridStr(_read_text(path), includeEmptyIntervals=False)
    except (errors.PraatioException, ValueError, IndexError, KeyError) as error:
        raise AlignmentError(f"{path} is no TextGrid, or is damaged ({error}): write it again") from error
    tiers = {entry["name"]: entry for entry in grid["tiers"]}
    name = tier if tier is not None else _words_tier(list(tiers), path)
    if name not in tiers:
        raise AlignmentError(f"{path} has no tier {name!r}: its tiers are {', '.join(tiers) or 'none'}")
    if tiers[name]["class"] != "IntervalTier":
        raise AlignmentError(f"{path}: tier {name!r} holds points, which have no ends: give a tier of intervals")
    entries = [(text, start, end) for start, end, text in tiers[name]["entries"]]
    end_s = float(grid["xmax"])
    return _checked(entries, str(path), end_s if seconds is None else min(seconds, end_s))


def read_ctm(path: str | Path, *, on_error: OnError | None = None) -> dict[str, list[TimedWord]]:
    """Timed words of a NIST CTM file, by recording.

    A line is `recording channel start duration word [confidence]`; lines that begin with `;;` are comments, and
    the word `<eps>` is a silence.

    Raises:
        AlignmentError: a line has another form, or a recording has two channels; and see `read_alignment`.
    """
    path = Path(path)
    recordings: dict[str, list[tuple[Any, Any, Any]]] = {}
    channels: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        cells = line.split()
        if not cells or line.lstrip().startswith(";;"):
            continue
        if len(cells) not in (5, 6):
            raise AlignmentError(
                f"{path}:{number} has {len(cells)} columns: give recording, channel, start, duration, word and "
                "perhaps a confidence"
            )
        recording, channel, start, duration, word = cells[:5]
        if channels.setdefault(recording, channel) != channel:
            raise AlignmentError(
                f"{path}:{number}: recording {recording!r} has the channels {channels[recording]!r} and {channel!r}: "
                "give each channel a file of its own"
            )
        start_s, duration_s = _number(start), _number(duration)
        recordings.setdefault(recording, []).append((word, start_s, _sum(start_s, duration_s)))
    return _checked_each(
        ((recording, entries, None) for recording, entries in recordings.items()), f"{path}, recording", on_error
    )


def read_cuts(path: str | Path, *, on_error: OnError | None = None) -> dict[str, list[TimedWord]]:
    """Timed words of lhotse cuts, .jsonl or .jsonl.gz, by the cuts' ids.

    A cut's words are in `supervisions[].alignment.word`, or the same in the supervision's `custom`, as
    `[symbol, start, duration, …]` or as objects. As lhotse has it, their times are those of the cut, not of the
    recording it is cut from: 0 is where the cut starts. Libriheavy as it is published has texts, but no times.

    Raises:
        AlignmentError: a line is no cut, or a cut has no word times; and see `read_alignment`.
    """
    path = Path(path)
    cuts: dict[str, tuple[list[tuple[Any, Any, Any]] | None, float | None]] = {}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            cut = json.loads(line)
            supervisions = cut["supervisions"]
            cut_id, seconds = str(cut["id"]), _number(cut["duration"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise AlignmentError(
                f"{path}:{number} is no cut ({type(error).__name__}: {error}): give one JSON cut for each line"
            ) from None
        if cut_id in cuts:
            raise AlignmentError(f"{path}:{number} has the cut {cut_id!r} again: give every cut its own id")
        cuts[cut_id] = (_cut_entries(supervisions), seconds)
    return _checked_each(((cut_id, *cut) for cut_id, cut in cuts.items()), f"{path}, cut", on_error)


def _read_text(path: Path) -> str:
    """Content of a file in UTF-8 or UTF-16, compressed by gzip or not."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise AlignmentError(f"{path} cannot be read ({error}): correct the path, or copy the file again") from error
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise AlignmentError(f"{path} is neither UTF-8 nor UTF-16 ({error}): save it as UTF-8") from None


def _whisper_entries(content: dict[str, Any], path: Path) -> list[tuple[Any, Any, Any]]:
    """Words with their times as Whisper's kinds of JSON hold them."""
    if isinstance(content.get("chunks"), list):
        entries = []
        for chunk in content["chunks"]:
            text, times = _fields(chunk, ("text", "timestamp"), path)
            start, end = times if isinstance(times, list) and len(times) == 2 else (None, None)
            entries.append((text, start, end))
        if any(isinstance(text, str) and len(text.split()) > 1 for text, _, _ in entries):
            raise AlignmentError(f'{path} has chunks of several words: transcribe with return_timestamps="word"')
        return entries
    segments = content.get("segments", [])
    words = content.get("word_segments")
    if isinstance(segments, list) and all(isinstance(segment, dict) and "words" in segment for segment in segments):
        words = [word for segment in segments for word in segment["words"]] or words
    if not isinstance(words, list):
        raise AlignmentError(f"{path} has no words with times: transcribe with word_timestamps=True")
    return [_fields(word, ("word", "start", "end"), path) for word in words]


def _cut_entries(supervisions: Any) -> list[tuple[Any, Any, Any]] | None:
    """The words of a cut with their times; None if one of its supervisions has none."""
    entries: list[tuple[Any, Any, Any]] = []
    for supervision in sorted(supervisions, key=lambda supervision: supervision.get("start", 0)):
        alignment = supervision.get("alignment") or (supervision.get("custom") or {}).get("alignment") or {}
        items = alignment.get("word")
        if items is None:
            return None
        for item in items:
            symbol, start, duration = (
                (item.get("symbol"), item.get("start"), item.get("duration")) if isinstance(item, dict) else item[:3]
            )
            entries.append((symbol, start, _sum(start, duration)))
    return entries or None


def _words_tier(names: Sequence[str], path: Path) -> str:
    if _WORDS_TIER in names:
        return _WORDS_TIER
    found = [name for name in names if name.lower().endswith(_WORDS_TIER)]  # "speaker - words"
    if len(found) != 1:
        raise AlignmentError(f"{path} has {len(found)} tiers of words: name one of its tiers, {', '.join(names)}")
    return found[0]


def _fields(entry: Any, names: tuple[str, ...], path: Path) -> tuple[Any, ...]:
    """Values of an object; None for what it lacks."""
    if not isinstance(entry, dict):
        raise AlignmentError(f"{path} holds {entry!r} for a word: give objects with {', '.join(names)}")
    return tuple(entry.get(name) for name in names)


def _number(value: Any) -> float | None:
    """A number that is written as one or as text; None if it is neither."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _sum(a: Any, b: Any) -> float | None:
    first, second = _number(a), _number(b)
    return None if first is None or second is None else first + second


def _checked_each(
    utterances: Iterable[tuple[str, list[tuple[Any, Any, Any]] | None, float | None]],
    where: str,
    on_error: OnError | None,
) -> dict[str, list[TimedWord]]:
    """The checked words of every utterance; bad ones are handed over or raised."""
    checked = {}
    for utterance_id, entries, seconds in utterances:
        try:
            if entries is None:
                raise AlignmentError(f"{where} {utterance_id!r} has no word times: align it")
            checked[utterance_id] = _checked(entries, f"{where} {utterance_id!r}", seconds)
        except AlignmentError as error:
            if on_error is None:
                raise
            on_error(utterance_id, error)
    return checked


def _checked(entries: Iterable[Sequence[Any]], where: str, seconds: float | None) -> list[TimedWord]:
    """Timed words without silences.

    Raises:
        AlignmentError: there are none, or a time cannot be right; names the file and the word.
    """
    words: list[TimedWord] = []
    for number, (text, start, end) in enumerate(entries):
        if not isinstance(text, str):
            raise AlignmentError(f"{where}: word number {number} is {text!r}: give its text")
        text = text.strip()
        if text.lower() in _SILENCES:
            continue
        name = f"{where}: word {text!r} (number {number})"
        start_s, end_s = _number(start), _number(end)
        if start_s is None or end_s is None:
            missing = "start" if start_s is None else "end"
            raise AlignmentError(f"{name} has no {missing} ({start!r} to {end!r}): align the recording again")
        if not (math.isfinite(start_s) and math.isfinite(end_s)) or start_s < 0:
            raise AlignmentError(f"{name} lasts from {start_s} to {end_s} s: give finite times from 0 on")
        if end_s < start_s:
            raise AlignmentError(f"{name} runs backwards, from {start_s:.3f} to {end_s:.3f} s: correct its times")
        if words and start_s < words[-1].start_s:
            raise AlignmentError(
                f"{name} starts at {start_s:.3f} s, before the word before it ({words[-1].start_s:.3f} s): "
                "give the words in time"
            )
        if words and start_s < words[-1].end_s - _ROUNDING_S:
            raise AlignmentError(
                f"{name} starts at {start_s:.3f} s and overlaps {words[-1].text!r}, which ends at "
                f"{words[-1].end_s:.3f} s: give words one after another"
            )
        if seconds is not None and end_s > seconds + WORD_END_TOLERANCE_S:
            raise AlignmentError(
                f"{name} ends at {end_s:.3f} s, past the {seconds:.3f} s of audio: give the times of this audio"
            )
        # Rounding may let words overlap by less than a millisecond; here they do not.
        words.append(TimedWord(text, start_s, max(end_s, words[-1].end_s) if words else end_s))
    if not words:
        raise AlignmentError(f"{where} has no words: align the recording again")
    return words
