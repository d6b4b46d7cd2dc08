"""Sources: what `prepare` reads, row by row, before anything is tokenized.

A `Source` has its rows in an order that never changes, and gives them in pieces. A piece can be sent to another
process or machine, which reads its rows there. Most sources list their rows (`RowSource`): manifests and folders
here, the named corpora in `smoltolk.data.corpora`; Hugging Face datasets are in `smoltolk.data.hub`.
"""

import csv
import gzip
import hashlib
import json
import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

STRING_COLUMNS = ("id", "audio", "text", "alignment", "speaker", "split")
SPLITS = ("train", "validation", "test")  # training draws from the first two, and nothing from the third
COLUMNS = (*STRING_COLUMNS, "word_ends_s", "start_s", "end_s")
# Not all of them can be decoded: a recording of another kind is quarantined with its reason, not passed over.
AUDIO_SUFFIXES = frozenset({
    ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka",
    ".mp2", ".mp3", ".mp4", ".mpga", ".oga", ".ogg", ".opus", ".rf64", ".snd", ".spx", ".sph", ".voc", ".w64", ".wav",
    ".weba", ".webm", ".wma", ".wv",
})  # fmt: skip
_MAX_CELL_CHARACTERS = 1 << 30  # of CSV; its own limit of 131,072 is less than a book


class SourceRow(NamedTuple):
    """One row of a source, before anything is read or tokenized.

    Args:
        id: name of the utterance, used once in a source.
        source: where the row came from, for people: the audio as the source names it, else file and line.
        audio: path of the recording, relative to the source's `audio_folder` or absolute; or the bytes of a file.
        start_s: where the utterance starts in the recording, None for its start.
        end_s: where it ends, None for the recording's end.
        byte_range: first byte and number of bytes of the recording in the file `audio`, such as a tar archive.
        text: the transcript.
        word_ends_s: when each word ends, in seconds from the start of the utterance.
        alignment: file with timed words of another program (`smoltolk.data.alignments`), as a path like `audio`.
        speaker: who speaks.
        split: the split it belongs to, None to draw one.
        error: why the row cannot be used, if reading it has already shown that.
    """

    id: str
    source: str
    audio: str | bytes | None = None
    start_s: float | None = None
    end_s: float | None = None
    byte_range: tuple[int, int] | None = None
    text: str | None = None
    word_ends_s: tuple[float, ...] | None = None
    alignment: str | None = None
    speaker: str | None = None
    split: str | None = None
    error: str | None = None


class Piece(Protocol):
    """Some consecutive rows of a source; can be pickled, and is read where it is worked on."""

    def rows(self) -> Iterator[SourceRow]:
        """The rows, always the same ones in the same order."""


@dataclass(frozen=True)
class Scan:
    """What is known of a source before the work begins.

    Args:
        fingerprint: changes when the rows change.
        num_pieces: number of pieces.
        num_rows: number of rows, None if only reading everything would tell.
        text_in: where the first text is, None for a source without text.
        audio_in: where the first audio is, None for a source without audio.
    """

    fingerprint: str
    num_pieces: int
    num_rows: int | None
    text_in: str | None
    audio_in: str | None


class Source(ABC):
    """Rows in a fixed order.

    Attributes:
        name: what messages call it.
        audio_folder: where relative audio paths start.
    """

    name: str
    audio_folder: Path | None = None

    @abstractmethod
    def scan(self, rows_per_piece: int) -> Scan:
        """Look at everything that can be looked at before the work.

        Args:
            rows_per_piece: about how many rows a piece is to have.

        Raises:
            ValueError: the source cannot be read, or something in it would go wrong everywhere.
        """

    @abstractmethod
    def pieces(self, rows_per_piece: int) -> Iterator[Piece]:
        """The rows in pieces of about so many."""


@dataclass(frozen=True)
class ListedRows:
    """A piece that brings its rows along."""

    listed: list[SourceRow]

    def rows(self) -> Iterator[SourceRow]:
        """The rows."""
        return iter(self.listed)


class RowSource(Source):
    """A source that lists its rows; it is read twice, once to check it and once to work on it.

    Reading costs a few microseconds and eight bytes of memory a row.

    Args:
        name: what messages call it.
        read: gives the rows, each time the same.
        audio_folder: where relative audio paths start.
    """

    def __init__(self, name: str, read: Callable[[], Iterable[SourceRow]], audio_folder: Path | None = None) -> None:
        self.name, self.audio_folder, self._read = name, audio_folder, read

    def scan(self, rows_per_piece: int) -> Scan:
        """Read all rows once.

        Raises:
            ValueError: there are no rows, an id is there twice, or a row cannot be read.
        """
        sha256 = hashlib.sha256()
        ids = array("q")  # hashes: millions of names would need gigabytes
        text_in = audio_in = None
        has_errors = False
        for row in self._read():
            sha256.update(repr(tuple(row)).encode("utf-8", "surrogatepass"))
            ids.append(hash(row.id))
            if text_in is None and row.text is not None:
                text_in = row.source
            if audio_in is None and row.audio is not None:
                audio_in = row.source
            has_errors = has_errors or row.error is not None
        if not ids:
            raise ValueError(f"source {self.name} has no rows: give a source with audio or text")
        if text_in is None and audio_in is None and not has_errors:
            raise ValueError(f"source {self.name} has neither audio nor text in any row: give one of them or both")
        self._refuse_equal_ids(np.frombuffer(ids, dtype=np.int64))
        return Scan(sha256.hexdigest(), -(-len(ids) // rows_per_piece), len(ids), text_in, audio_in)

    def _refuse_equal_ids(self, hashes: np.ndarray) -> None:
        ordered = np.sort(hashes)
        suspicious = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        seen: dict[str, str] = {}
        for row in self._read() if suspicious else ():
            if row.id in seen:
                raise ValueError(
                    f"{self.name} has the id {row.id!r} twice ({seen[row.id]} and {row.source}): give every row its own"
                )
            if hash(row.id) in suspicious:
                seen[row.id] = row.source

    def pieces(self, rows_per_piece: int) -> Iterator[Piece]:
        """The rows in pieces of so many; the last one may have fewer."""
        rows = iter(self._read())
        while listed := list(islice(rows, rows_per_piece)):
            yield ListedRows(listed)


def manifest_source(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    audio_folder: Path | None = None,
    splits: Mapping[str, str] | None = None,
) -> RowSource:
    """A JSONL or CSV manifest, gzipped or not.

    Its columns are "audio" and "text" (one of them may be missing or empty) and, where wanted, "id",
    "word_ends_s" (a JSON list of seconds) or "alignment" (a file with timed words), "start_s" and "end_s" (the part
    of the recording), "speaker" and "split". All audio has to be in one folder: a manifest from elsewhere must not
    make units of any file on this machine, which are then shared with the store.

    Args:
        path: the manifest.
        columns: the manifest's names of our columns; then no other column is read. By default they are the
            same, and a column of another name is an error.
        audio_folder: the folder with the audio, where relative paths start; by default the manifest's.
        splits: what a split of the manifest becomes, such as {"dev-clean": "validation"}; see `mapped_split`.
    """
    folder = audio_folder or path.parent

    def read() -> Iterator[SourceRow]:
        named = None if columns is None else checked_columns(columns)
        checked_splits(splits)
        for line, fields in _numbered_lines(path):
            where = f"{path.name}:{line}"
            row = _manifest_row(fields if named is None else _renamed(fields, named, where), where, folder)
            yield row._replace(split=mapped_split(row.split, splits, where))

    return RowSource(str(path), read, folder)


def checked_columns(columns: Mapping[str, str], known: Iterable[str] = COLUMNS) -> Mapping[str, str]:
    """The columns, if all of them are ours.

    Raises:
        ValueError: names one that is not.
    """
    for ours in columns:
        if ours not in known:
            raise ValueError(f"columns names {ours!r}: columns are {', '.join(known)}")
    return columns


def checked_splits(splits: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """The mapping of splits, if all of them become one of `SPLITS`, or stay what they are.

    Raises:
        ValueError: one becomes something else.
    """
    for theirs, ours in (splits or {}).items():
        if ours not in (*SPLITS, theirs):
            raise ValueError(f"splits makes {theirs!r} {ours!r}: choose {', '.join(SPLITS)}, or {theirs!r} to keep it")
    return splits


def mapped_split(name: str | None, splits: Mapping[str, str] | None, where: str) -> str | None:
    """The split of the store that a row is to be in, None to draw one.

    Args:
        name: what the source calls it.
        splits: what its names become; those of `SPLITS` need no entry.
        where: the row.

    Raises:
        ValueError: a name that training would never draw from, and that no entry has.
    """
    known = {split: split for split in SPLITS} | dict(splits or {})
    if not name or name in known:
        return known[name] if name else None
    raise ValueError(
        f"{where}: split is {name!r}, which training never draws from; it draws from train and validation, and leaves "
        f"test alone: say what it becomes with --split {name}=validation, or keep it with --split {name}={name}"
    )


def folder_source(folder: Path) -> RowSource:
    """A folder of audio files, each with its text in the .txt file of the same stem beside it.

    A .txt file without audio is a row of text.
    """
    return RowSource(str(folder), lambda: _read_folder(folder), folder)


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
        if path.is_dir():
            files += sorted(filter(_is_audio, (here / name for here, names in walk(path) for name in names)))
        else:
            files.append(path)
    return files


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below (itself included) with the names of its files, in an order that does not change.

    Links to folders are followed; a folder that several paths lead to is listed once, at the first of them.

    Raises:
        ValueError: there is no such folder.
        OSError: a folder cannot be listed.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: correct the path")

    def fail(error: OSError) -> None:
        raise error

    visited: set[tuple[int, int]] = set()  # links can lead back to where they are
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort()
        yield Path(here), sorted(names)


def open_text(path: Path) -> IO[str]:
    """A UTF-8 file, gzipped if its name ends so; a byte order mark is left out, line ends stay."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a JSONL file, gzipped or not; empty lines are left out.

    Raises:
        ValueError: a line is not a JSON object; names it.
    """
    with open_text(path) as file:
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


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()


def _read_folder(folder: Path) -> Iterator[SourceRow]:
    for here, names in walk(folder):
        # A transcript belongs to one recording: a.wav and a.flac would both claim a.txt, and both get it.
        with_audio = {Path(name).stem for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES}
        for name in names:
            path = here / name
            relative = path.relative_to(folder).as_posix()
            transcript = f"{path.stem}.txt"
            if path.suffix.lower() in AUDIO_SUFFIXES:
                text, error = _read_transcript(here / transcript) if transcript in names else (None, None)
                yield SourceRow(id=relative, source=relative, audio=relative, text=text, error=error)
            elif name == transcript and path.stem not in with_audio:
                text, error = _read_transcript(path)
                yield SourceRow(id=relative, source=relative, text=text, error=error)


def _read_transcript(path: Path) -> tuple[str | None, str | None]:
    """Text of a file without its last line end, and why it cannot be used."""
    try:
        return path.read_text(encoding="utf-8-sig").rstrip("\r\n"), None
    except UnicodeDecodeError as error:
        return None, f"{path.name} is not UTF-8 ({error}): save it as UTF-8"


def _numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and columns of each row of a JSONL or CSV file."""
    if not path.exists():
        raise ValueError(f"source {path} does not exist: give a .jsonl or .csv manifest, or a folder")
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".csv")):
        raise ValueError(f"source {path} is of no known kind: give a .jsonl or .csv manifest, or a folder")
    try:
        yield from json_lines(path) if name.endswith(".jsonl") else _read_csv(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"source {path} is not UTF-8 ({error}): save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"source {path} is broken ({error}): copy it again") from None


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with open_text(path) as file:
        reader = csv.DictReader(file, strict=True)
        try:
            names = list(reader.fieldnames or ())
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{path.name} has the column {repeated[0]!r} twice: name every column once")
            for cells in reader:
                if None in cells:
                    raise ValueError(
                        f"{path.name}:{reader.line_num} has more cells than the header: quote cells with commas"
                    )
                yield reader.line_num, {name: cell or None for name, cell in cells.items()}
        except csv.Error as error:
            raise ValueError(f"{path.name}:{reader.line_num} is not CSV ({error}): correct it") from None


def _renamed(fields: dict[str, Any], named: Mapping[str, str], where: str) -> dict[str, Any]:
    for theirs in named.values():
        if theirs not in fields:
            raise ValueError(
                f"{where} has no column {theirs!r}: it has {', '.join(map(str, fields))}; correct --columns"
            )
    return {ours: fields[theirs] for ours, theirs in named.items()}


def _manifest_row(fields: dict[str, Any], where: str, folder: Path) -> SourceRow:
    for name in fields:
        if name not in COLUMNS:
            raise ValueError(
                f"{where} has the unknown column {name!r}: columns are {', '.join(COLUMNS)}; say with --columns "
                f"which ones to read"
            )
    for name in STRING_COLUMNS:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name} is {value!r}: give a string")
        if name != "text" and not _is_unicode(value):
            raise ValueError(f"{where}: {name} is {value!r}, which is no Unicode text: correct it")
    audio = fields.get("audio") or None
    origin = audio or where
    times = _seconds(fields, "word_ends_s", where)
    if times is not None and not isinstance(times, list):
        raise ValueError(f"{where}: word_ends_s is {times!r}: give a JSON list of seconds")
    alignment = fields.get("alignment") or None
    if alignment is not None and (audio is None or times is not None):
        raise ValueError(f"{where}: alignment is {alignment!r} without audio or beside word_ends_s: leave it out")
    cut = {name: _seconds(fields, name, where) for name in ("start_s", "end_s")}
    for name, value in cut.items():
        if isinstance(value, list):
            raise ValueError(f"{where}: {name} is {value!r}: give seconds")
        if value is not None and audio is None:
            raise ValueError(f"{where}: {name} is {value!r} without audio: give the audio, or leave it out")
    is_part = any(value is not None for value in cut.values())
    return SourceRow(
        id=fields.get("id") or (where if is_part else origin),
        source=origin,
        audio=None if audio is None else path_inside(folder, audio, where),
        text=fields.get("text"),
        word_ends_s=None if times is None else tuple(times),
        alignment=None if alignment is None else path_inside(folder, alignment, where),
        speaker=fields.get("speaker"),
        split=fields.get("split"),
        **cut,
    )


def _seconds(fields: dict[str, Any], name: str, where: str) -> Any:
    """A number of seconds or a list of them; in CSV they are strings of JSON."""
    value = fields.get(name)
    if value is None:
        return None
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None  # refused below
    numbers: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        expected = "a JSON list of seconds" if name == "word_ends_s" else "seconds"
        raise ValueError(f"{where}: {name} is {given!r}: give {expected}")
    seconds = [float(number) for number in numbers]
    return seconds if isinstance(value, list) else seconds[0]


def _is_unicode(text: str) -> bool:
    """Whether a string can be written as UTF-8; JSON escapes can name halves of a character."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def path_inside(folder: Path, path: str, where: str) -> str:
    """A path relative to the folder it is in; links inside the folder are the owner's own.

    Raises:
        ValueError: it leads out of the folder.
    """
    if not path.startswith("/") and ".." not in path:
        return path
    relative = os.path.relpath(os.path.join(os.path.abspath(folder), path), os.path.abspath(folder))
    if relative == ".." or relative.startswith("../"):
        raise ValueError(
            f"{where}: audio is {path!r}, outside of the folder {folder}: "
            f"give the folder with all audio as --audio-folder"
        )
    return relative
