"""Hugging Face datasets as a source: of the hub or on disk, streamed, with audio or text.

Pieces are consecutive files or row groups of the dataset, and each process reads its own. Audio is not decoded by
`datasets`: its bytes go to our own loader, which refuses what is broken.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoltolk.data.sources import (
    Piece,
    Scan,
    Source,
    SourceRow,
    checked_columns,
    checked_splits,
    mapped_split,
    walk,
)

COLUMNS = ("audio", "text", "id", "speaker", "split", "word_ends_s", "words")
# Pieces are whole row groups, which differ in size: a tenth more of them keeps most within one shard.
_SPARE_PIECES = 1.1
# What names of files and folders say, as in https://huggingface.co/docs/hub/datasets-file-names-and-splits
_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


@dataclass(frozen=True)
class HubPiece:
    """Part of a dataset.

    Args:
        dataset: an iterable dataset of these rows alone.
        columns: what each of our columns is called in it.
        name: beginning of the ids.
        splits: what the names in the column "split" become.
    """

    dataset: Any
    columns: Mapping[str, str]
    name: str
    splits: Mapping[str, str] | None = None

    def rows(self) -> Iterator[SourceRow]:
        """The rows.

        Raises:
            ValueError: a row is of a split that `splits` does not have; see `mapped_split`.
        """
        for number, fields in enumerate(self.dataset):
            row = _row({ours: fields[theirs] for ours, theirs in self.columns.items()}, f"{self.name}-{number:06d}")
            yield row._replace(split=mapped_split(row.split, self.splits, row.id))


class HubSource(Source):
    """A dataset of the hub, or one on disk: what `save_to_disk` wrote, Parquet files, or a copy of a hub folder.

    The ids of rows are made of split, piece and row: a stream cannot be searched for equal ids before the work.
    The column "id", where given, becomes the `source` of the utterance. Besides the columns of a manifest there is
    "words", a list of `{word, start_time, end_time}`: their ends are the word times, and the words are the text
    where it has another number of words.

    Args:
        name: name on the hub, or a path.
        config: configuration of the dataset.
        split: split of the dataset. Plain Parquet files are of the split that their names or folders tell (`train`,
            `validation`, `valid`, `dev`, `test` and the like, apart from other words), else of "train"; a single
            file is read as "train" whatever its name.
        revision: revision on the hub, by default the newest; a preparation goes on only with the same.
        columns: what each of our columns is called in the dataset; by default those that have the same name.
        splits: what the names in the column "split" become; see `mapped_split`. The first row of another one ends the
            work: a stream cannot be searched for it before.

    Raises:
        ImportError: `datasets` is not installed.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str = "train",
        *,
        revision: str | None = None,
        columns: Mapping[str, str] | None = None,
        splits: Mapping[str, str] | None = None,
    ) -> None:
        self.name = f"hf:{name}"
        self._splits = checked_splits(splits)
        self._address, self._config, self._split, self._revision = name, config, split, revision
        self._wanted = None if columns is None else checked_columns(columns, COLUMNS)

    def scan(self, rows_per_piece: int) -> Scan:
        """Open the dataset and look at its columns.

        Raises:
            ValueError: there is no such dataset, or it lacks a column.
        """
        dataset, identity, num_rows = self._open()
        features = dataset.features or {}
        if not features:
            raise ValueError(
                f"{self.name} does not say its columns: of a folder, Parquet and JSON files and what save_to_disk "
                f"wrote are read; give .txt and .csv files one by one, for their texts as text:FILE"
            )
        if self._wanted is None:
            self._columns = {column: column for column in COLUMNS if column in features}
        else:
            self._columns = dict(self._wanted)
        missing = [theirs for theirs in self._columns.values() if theirs not in features]
        if missing or not {"audio", "text"} & self._columns.keys():
            raise ValueError(
                f"{self.name} has {f'no column {missing[0]!r}' if missing else 'neither a column audio nor text'}, "
                f"but {', '.join(features)}: say with --columns which ones to read"
            )
        if self._splits and "split" not in self._columns:
            raise ValueError(f"{self.name} has no column split to read, so splits have no effect: leave out --split")
        dataset = dataset.select_columns(list(dict.fromkeys(self._columns.values())))
        if "audio" in self._columns:
            from datasets import Audio

            if isinstance(features[self._columns["audio"]], Audio):
                dataset = dataset.cast_column(self._columns["audio"], Audio(decode=False))
        self._num_pieces = dataset.num_shards
        if num_rows is not None:
            wanted = math.ceil(_SPARE_PIECES * num_rows / rows_per_piece)
            if dataset.num_shards < wanted:
                dataset = dataset.reshard()
            self._num_pieces = max(1, min(dataset.num_shards, wanted))
        self._dataset = dataset
        described = json.dumps([identity, self._config, self._split, self._columns, self._splits], sort_keys=True)
        return Scan(
            hashlib.sha256(described.encode()).hexdigest(),
            self._num_pieces,
            num_rows,
            self.name if {"text", "words"} & self._columns.keys() else None,
            self.name if "audio" in self._columns else None,
        )

    def pieces(self, rows_per_piece: int) -> Iterator[Piece]:
        """Consecutive parts of the dataset, as `scan` has divided it."""
        for index in range(self._num_pieces):
            part = self._dataset.shard(num_shards=self._num_pieces, index=index, contiguous=True)
            yield HubPiece(part, self._columns, f"{self._split}-{index:05d}", self._splits)

    def _open(self) -> tuple[Any, Any, int | None]:
        """The dataset, what identifies its content, and its number of rows if that is known."""
        try:
            import datasets
        except ImportError as error:
            raise ImportError("Hugging Face datasets need: pip install 'smoltolk[datasets]'") from error
        path = Path(self._address)
        try:
            if path.exists():
                return self._open_local(datasets, path)
            from huggingface_hub import HfApi

            sha = HfApi().dataset_info(self._address, revision=self._revision).sha
            dataset = datasets.load_dataset(
                self._address, self._config, split=self._split, revision=sha, streaming=True
            )
        except (OSError, ValueError, KeyError) as error:  # what the libraries raise for names that are not there
            raise ValueError(
                f"{self.name} cannot be opened ({error}): correct name, configuration and split"
            ) from error
        known = (dataset.info.splits or {}).get(self._split)
        return dataset, sha, None if known is None else known.num_examples or None

    def _open_local(self, datasets: Any, path: Path) -> tuple[Any, Any, int | None]:
        files = [path] if path.is_file() else sorted(file for file in _files_below(path) if file.is_file())
        # Names and sizes: hashing terabytes at every start would take longer than the work.
        identity = [(file.relative_to(path).as_posix(), file.stat().st_size) for file in files]
        if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[self._split]
            else:
                self._refuse_other_splits({"train", str(dataset.split or "train")})
            return dataset.to_iterable_dataset(num_shards=max(1, len(dataset))), identity, len(dataset)
        tables = [file for file in files if file.suffix == ".parquet"]
        if tables and not (path / "README.md").exists():
            import pyarrow.parquet as pq

            if path.is_file():
                self._refuse_other_splits({"train", _split_of_file(Path(path.name))})
            else:
                splits = {table: _split_of_file(table.relative_to(path)) for table in tables}
                self._refuse_other_splits(splits.values())
                tables = [table for table in tables if splits[table] == self._split]
            dataset = datasets.load_dataset(
                "parquet", data_files=[str(table) for table in tables], split="train", streaming=True
            )
            return dataset, identity, sum(pq.read_metadata(table).num_rows for table in tables)
        dataset = datasets.load_dataset(str(path), self._config, split=self._split, streaming=True)
        return dataset, identity, None

    def _refuse_other_splits(self, splits: Iterable[str]) -> None:
        if self._split not in splits:
            raise ValueError(f"its files are of the split {', '.join(sorted(set(splits)))}, not {self._split!r}")


def _files_below(folder: Path) -> Iterator[Path]:
    for here, names in walk(folder):
        for name in names:
            yield here / name


def _split_of_file(path: Path) -> str:
    """The split that the name of a file tells, or else that of the innermost folder which tells one."""
    for part in (path.stem, *(folder.name for folder in path.parents)):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLIT_OF_WORD:
                return _SPLIT_OF_WORD[word]
    return "train"


def _row(fields: dict[str, Any], name: str) -> SourceRow:
    """The row of a dataset's row; what is of a wrong type becomes its error."""
    error = None
    for column in ("text", "speaker", "split", "id"):
        value = fields.get(column)
        if isinstance(value, int) and column != "text":
            fields[column] = str(value)
        elif not isinstance(value, str | None):
            error = f"{column} is {value!r}: give a string"
    audio = fields.get("audio")
    content: str | bytes | None = None
    try:
        text, ends = fields.get("text"), fields.get("word_ends_s")
        if fields.get("words") is not None:
            text, ends = _timed(fields["words"], text)
        times = None if ends is None else tuple(float(end) for end in ends)
        if audio is not None:
            content = _audio(audio)
    except (TypeError, KeyError, ValueError) as wrong:
        error = error or f"its columns are not as they should be ({wrong!r})"
    if error is not None:
        return SourceRow(id=name, source=str(fields.get("id") or name), error=error)
    path = audio.get("path") if isinstance(audio, dict) else None
    return SourceRow(
        id=name,
        source=fields.get("id") or path or name,
        audio=content,
        text=text,
        word_ends_s=times,
        speaker=fields.get("speaker"),
        split=fields.get("split"),
    )


def _timed(words: Any, text: str | None) -> tuple[str | None, list[float]]:
    """Text and ends of timed words: a list of objects, or an object of lists."""
    if isinstance(words, dict):
        spoken, ends = words["word"], words["end_time"]
    else:
        spoken, ends = [word["word"] for word in words], [word["end_time"] for word in words]
    if text is None or len(text.split()) != len(spoken):
        text = " ".join(spoken)
    return text, ends


def _audio(audio: Any) -> str | bytes:
    """Bytes of a file, or the path of a local one."""
    if isinstance(audio, bytes | str):
        return audio
    if audio["bytes"] is not None:
        return audio["bytes"]
    if "://" not in audio["path"]:
        return audio["path"]
    import fsspec

    with fsspec.open(audio["path"], "rb") as file:
        return file.read()
