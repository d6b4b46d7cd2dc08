"""Sources: what `prepare` reads, row by row, before anything is tokenized."""

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COLUMNS = ("id", "audio", "text", "word_ends_s", "speaker", "split")
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"})


@dataclass(frozen=True)
class SourceRow:
    """One row of a source, before anything is read or tokenized.

    Args:
        id: name of the utterance: the column "id", else the audio path, else file and line.
        source: the audio path as it is written in the source, else file and line.
        audio: path of the recording, relative to the manifest's folder or absolute.
        text: the transcript.
        word_ends_s: when each word ends, in seconds.
        speaker: who speaks.
        split: the split it belongs to, None to draw one.
        error: why the row cannot be used, if reading it has already shown that.
    """

    id: str
    source: str
    audio: str | None = None
    text: str | None = None
    word_ends_s: tuple[float, ...] | None = None
    speaker: str | None = None
    split: str | None = None
    error: str | None = None


def read_rows(source: Path) -> Iterator[SourceRow]:
    """The rows of a manifest or of a folder, in an order that does not change.

    Raises:
        ValueError: the source is of no known kind, or a line of a manifest is not as it must be; names it.
    """
    if source.is_dir():
        yield from _read_folder(source)
    else:
        for line, fields in _numbered_lines(source):
            yield _manifest_row(fields, f"{source.name}:{line}")


def read_manifest(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of any JSONL or CSV manifest by column; empty CSV cells are None.

    Raises:
        ValueError: the file is of no known kind, or a line is not JSON or CSV; names the line.
    """
    for _, fields in _numbered_lines(path):
        yield fields


def audio_files(paths: Iterable[Path]) -> list[Path]:
    """The given files, and the audio files in the given folders, in a fixed order."""
    files: list[Path] = []
    for path in paths:
        files += sorted(filter(_is_audio, path.rglob("*"))) if path.is_dir() else [path]
    return files


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()


def _read_folder(folder: Path) -> Iterator[SourceRow]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with_audio = {path.with_suffix("") for path in files if _is_audio(path)}
    for path in files:
        name = path.relative_to(folder).as_posix()
        transcript = path.with_suffix(".txt")
        if _is_audio(path):
            text, error = _read_transcript(transcript) if transcript.is_file() else (None, None)
            yield SourceRow(id=name, source=name, audio=name, text=text, error=error)
        elif path == transcript and path.with_suffix("") not in with_audio:
            text, error = _read_transcript(path)
            yield SourceRow(id=name, source=name, text=text, error=error)


def _read_transcript(path: Path) -> tuple[str | None, str | None]:
    try:
        return path.read_text(encoding="utf-8"), None
    except UnicodeDecodeError as error:
        return None, f"{path.name} is not UTF-8 ({error}): save it as UTF-8"


def _numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of each row of a JSONL or CSV file."""
    if not path.exists():
        raise ValueError(f"source {path} does not exist: give a .jsonl or .csv manifest, or a folder")
    if path.suffix not in (".jsonl", ".csv"):
        raise ValueError(f"source {path} is of no known kind: give a .jsonl or .csv manifest, or a folder")
    try:
        yield from _read_jsonl(path) if path.suffix == ".jsonl" else _read_csv(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"source {path} is not UTF-8 ({error}): save it as UTF-8") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for line, content in enumerate(file, start=1):
            if not content.strip():
                continue
            try:
                fields = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path.name}:{line} is not JSON ({error}): correct the line") from None
            if not isinstance(fields, dict):
                raise ValueError(f"{path.name}:{line} is not a JSON object: give one object for each line")
            yield line, fields


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for cells in reader:
                if None in cells:
                    raise ValueError(
                        f"{path.name}:{reader.line_num} has more cells than the header: quote cells with commas"
                    )
                yield reader.line_num, {name: cell or None for name, cell in cells.items()}
        except csv.Error as error:
            raise ValueError(f"{path.name}:{reader.line_num} is not CSV ({error}): correct it") from None


def _manifest_row(fields: dict[str, Any], where: str) -> SourceRow:
    if unknown := [name for name in fields if name not in COLUMNS]:
        raise ValueError(f"{where} has the unknown column {unknown[0]!r}: columns are {', '.join(COLUMNS)}")
    for name in ("id", "audio", "text", "speaker", "split"):
        if not isinstance(fields.get(name), str | None):
            raise ValueError(f"{where}: {name} is {fields[name]!r}: give a string")
    times = fields.get("word_ends_s")
    if isinstance(times, str):  # in CSV
        with contextlib.suppress(json.JSONDecodeError):  # stays a string, refused below
            times = json.loads(times)
    if times is not None and not (
        isinstance(times, list) and all(isinstance(t, int | float) and not isinstance(t, bool) for t in times)
    ):
        raise ValueError(f"{where}: word_ends_s is {times!r}: give a JSON list of seconds")
    origin = fields.get("audio") or where
    return SourceRow(
        id=fields.get("id") or origin,
        source=origin,
        audio=fields.get("audio"),
        text=fields.get("text"),
        word_ends_s=None if times is None else tuple(float(time) for time in times),
        speaker=fields.get("speaker"),
        split=fields.get("split"),
    )
