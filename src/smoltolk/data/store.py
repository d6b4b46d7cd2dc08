"""The store: utterances as text tokens and speech units in Parquet shards.

A store is a folder:

    manifest.json         format version and, for every shard, its file, rows, bytes and SHA-256
    shard-00000.parquet   one row per utterance; the schema metadata names both tokenizers
    …

Shards are ordinary Parquet (`SCHEMA`, and a few columns derived from it, see `smoltolk.data.shard`): Hugging Face
`datasets`, DuckDB, Spark and Ray read them as they are.
Everything is written aside and renamed, the manifest last: a folder without one is not (yet) a store.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltolk.data.shard import (
    DECODED,
    ROWS_PER_GROUP,
    SHARD_SCHEMA,
    RowGroup,
    Tokens,
    decoded_columns,
    encode_shard,
    tokens_of,
)
from smoltolk.data.utterance import (
    FORMAT_VERSION,
    StoreMetadata,
    Utterance,
    check_utterance,
    check_version,
)
from smoltolk.speech.audio import write_atomically

MANIFEST = "manifest.json"
LOCK = ".lock"  # stays in every folder that was ever written to
ROWS_PER_SHARD = ROWS_PER_GROUP


@dataclass(frozen=True)
class Shard:
    """An entry of the manifest: one Parquet file and what it must be."""

    file: str
    rows: int
    bytes: int
    sha256: str


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one writer; the operating system frees it when the process ends, however it ends.

    Raises:
        ValueError: another writer holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file, _not_inherited(file):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is being written by another process: wait for it to end, or choose another folder"
            ) from None
        for pattern in (".*.part", "blocks/.*.part", "blocks/*/.*.part"):  # where writers write, and no deeper
            for leftover in folder.glob(pattern):  # of a writer that was killed
                if leftover.is_file():
                    leftover.unlink()
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for a process just forked, which has not closed the file yet


@contextlib.contextmanager
def _not_inherited(file: IO[str]) -> Iterator[None]:
    """Keeps a file from forked processes: one that outlives its killed parent for seconds would hold its lock on."""
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)


def _close_held() -> None:
    for file in _held:
        file.close()


_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=_close_held)


def write_shard(folder: Path, number: int, utterances: Sequence[Utterance], metadata: StoreMetadata) -> Shard:
    """Check utterances and write them as one shard.

    Raises:
        ValueError: an utterance is not consistent (see `check_utterance`).
        OSError: the shard cannot be written; nothing is left of it.
    """
    for utterance in utterances:
        check_utterance(utterance, metadata)
    data = encode_shard(utterances, metadata)
    file = f"shard-{number:05d}.parquet"
    write_atomically(folder / file, data)
    return Shard(file, len(utterances), len(data), hashlib.sha256(data).hexdigest())


def write_manifest(folder: Path, shards: Iterable[Shard]) -> None:
    """Write the manifest: from now on the folder is a store."""
    manifest = {"format_version": FORMAT_VERSION, "shards": [asdict(shard) for shard in shards]}
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


class StoreWriter:
    """Writes a store, one utterance after another; use it in a `with` block.

    The folder becomes a store when the block ends; when it ends by an error, what was written is removed.

    Args:
        path: folder of the new store.
        text_tokenizer_fingerprint: fingerprint of the text tokenizer, None for a store without text.
        speech_tokenizer: card of the speech tokenizer, None for a store without speech.
        rows_per_shard: utterances in a shard.

    Raises:
        ValueError: there is a store at `path` already, or files that are not of a writer of stores, or another
            writer is at work there.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        text_tokenizer_fingerprint: str | None,
        speech_tokenizer: dict[str, Any] | None,
        rows_per_shard: int = ROWS_PER_SHARD,
    ) -> None:
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}: give 1 or more")
        self.path = Path(path)
        self.metadata = StoreMetadata(text_tokenizer_fingerprint, speech_tokenizer)
        self._rows_per_shard = rows_per_shard
        self._pending: list[Utterance] = []
        self._shards: list[Shard] = []
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "StoreWriter":
        _refuse_files_of_others(self.path)
        self._lock.enter_context(lock(self.path))
        if (self.path / MANIFEST).exists():
            self._lock.close()
            raise ValueError(f"{self.path} holds a store already: delete it, or choose another folder")
        for leftover in self.path.glob("shard-*.parquet"):  # of a writer that was killed
            leftover.unlink()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        with self._lock:
            try:
                if error_type is None:
                    if self._pending or not self._shards:  # the first shard carries the metadata: always there
                        self._flush()
                    write_manifest(self.path, self._shards)
            finally:
                if not (self.path / MANIFEST).exists():
                    for shard in self._shards:
                        (self.path / shard.file).unlink()

    def write(self, utterance: Utterance) -> None:
        """Add one utterance.

        Raises:
            ValueError: the utterance is not consistent (see `check_utterance`).
        """
        check_utterance(utterance, self.metadata)
        self._pending.append(utterance)
        if len(self._pending) == self._rows_per_shard:
            self._flush()

    def _flush(self) -> None:
        self._shards.append(write_shard(self.path, len(self._shards), self._pending, self.metadata))
        self._pending = []


def _refuse_files_of_others(folder: Path) -> None:
    """Raise if a folder that was never locked, by no writer of stores that is, holds files."""
    if not folder.is_dir() or (folder / LOCK).exists() or (folder / MANIFEST).exists():
        return
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if files:
        raise ValueError(
            f"{folder} holds files that are not of a store, such as {files[0].name}: choose another folder, or move "
            f"them away"
        )


def write_store(
    path: str | Path,
    utterances: Iterable[Utterance],
    *,
    text_tokenizer_fingerprint: str | None,
    speech_tokenizer: dict[str, Any] | None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> "Store":
    """Write utterances that are made in memory as a store; the arguments are those of `StoreWriter`."""
    with StoreWriter(
        path,
        text_tokenizer_fingerprint=text_tokenizer_fingerprint,
        speech_tokenizer=speech_tokenizer,
        rows_per_shard=rows_per_shard,
    ) as writer:
        for utterance in utterances:
            writer.write(utterance)
    return Store(path)


class Store:
    """Reads a store in random access: `store[i]` is an `Utterance`, `store.tokens(i)` what rows are made of.

    Opening looks at every shard's size, row count and footer, not at its data (`verify` does). Tokens are read where
    they lie in the mapped shards, so a draw costs the same in any store; what else an utterance has (`id`, `speaker`,
    `source`, …) is decoded per row group when first asked for.

    A store can be sent to another process, which opens it anew.

    Args:
        path: folder of the store.
        cache_bytes: decoded columns kept in memory, the most recently used ones.

    Raises:
        ValueError: there is no store at `path`, a shard is missing, truncated or of another store or version,
            or holds units that its speech tokenizer does not have.
    """

    def __init__(self, path: str | Path, *, cache_bytes: int = 1 << 28) -> None:
        self.path = Path(path)
        self.shards = self._read_manifest()
        self.max_text_id = -1
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[int, dict[str, pa.Array]] = OrderedDict()
        self._groups: list[RowGroup] = []
        self._places: list[tuple[Path, int]] = []  # shard and number in it, of each row group
        self._starts = [0]  # first row of each row group, and the end
        self._ids_of_split: dict[tuple[str, bool, bool, bool], np.ndarray] = {}
        for number, shard in enumerate(self.shards):
            self._open_shard(number, shard)

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_store, (self.path, self._cache_bytes)

    def _read_manifest(self) -> list[Shard]:
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(
                f"{self.path} is not a store (no {MANIFEST}): give the output folder of a finished `prepare`"
            ) from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): prepare the store again") from None
        if not isinstance(manifest, dict):
            raise ValueError(f"{path} is damaged (it holds no object): prepare the store again")
        check_version(manifest.get("format_version"), path)
        try:
            shards = [Shard(**shard) for shard in manifest["shards"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged (its shards cannot be read: {error}): prepare the store again"
            ) from None
        if not shards:
            raise ValueError(f"{path} is damaged (it names no shards): prepare the store again")
        return shards

    def _open_shard(self, number: int, shard: Shard) -> None:
        path = self._check_file(shard)
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                footer, schema = file.metadata, file.schema_arrow
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged ({error}): prepare the store again") from None
        metadata = StoreMetadata.from_schema(schema, path, SHARD_SCHEMA)
        if number == 0:
            self.metadata = metadata
        elif metadata != self.metadata:
            raise ValueError(f"{path} was made with other tokenizers than the first shard: prepare the store again")
        if footer.num_rows != shard.rows:
            raise ValueError(f"{path} has {footer.num_rows} rows instead of {shard.rows}: prepare the store again")
        self.max_text_id = max(self.max_text_id, _max_value(footer, "text_ids"))
        if (max_unit := _max_value(footer, "units")) >= (metadata.num_units or 0):
            raise ValueError(
                f"{path} holds unit {max_unit}, but its speech tokenizer has {metadata.num_units} units: "
                f"prepare the store again"
            )

        # Arrow's mapping outlives its file descriptor: thousands of shards need no descriptors.
        with pa.memory_map(str(path)) as file:
            buffer = file.read_buffer()
        for group in range(footer.num_row_groups):
            self._groups.append(RowGroup(buffer, footer.row_group(group), path))
            self._places.append((path, group))
            self._starts.append(self._starts[-1] + self._groups[-1].num_rows)

    def check_files(self) -> None:
        """Check that every shard is still there, and of its size.

        Raises:
            ValueError: a shard is missing or truncated; names it.
        """
        for shard in self.shards:
            self._check_file(shard)

    def _check_file(self, shard: Shard) -> Path:
        path = self.path / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise ValueError(
                f"{path} is missing ({error.strerror}): copy the whole store, or prepare it again"
            ) from None
        if size != shard.bytes:
            raise ValueError(
                f"{path} has {size} bytes instead of {shard.bytes}, it is truncated or "
                f"changed: copy it again, or prepare the store again"
            )
        return path

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, row: int) -> tuple[int, int]:
        """Row group, and row in it."""
        if not 0 <= row < self._starts[-1]:
            raise IndexError(f"row {row} of a store with {len(self)} rows")
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def __getitem__(self, row: int) -> Utterance:
        group, row = self._place(row)
        fields: dict[str, Any] = {name: column[row].as_py() for name, column in self._decoded(group).items()}
        fields |= self._groups[group].arrays(row)
        return Utterance(text=bytes(self._groups[group].text(row)).decode() or None, **fields)

    def tokens(self, row: int, *, reads_text: bool = False) -> Tokens:
        """The tokens of a row, without decoding anything; its text only where asked for."""
        group, row = self._place(row)
        return self._groups[group].tokens(row, reads_text=reads_text)

    def _decoded(self, group: int) -> dict[str, pa.Array]:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        columns = decoded_columns(*self._places[group], DECODED)
        self._cache[group] = columns
        self._cached_bytes += _num_bytes(columns)
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= _num_bytes(self._cache.popitem(last=False)[1])
        return columns

    @property
    def unit_rate_hz(self) -> float | None:
        """Frames per second of the speech tokenizer before merging, None in a store without speech."""
        return self.metadata.unit_rate_hz

    @property
    def num_units(self) -> int | None:
        """Number of different units, None in a store without speech."""
        return self.metadata.num_units

    def ids_of_split(
        self, split: str, *, has_text: bool = False, has_speech: bool = False, is_aligned: bool = False
    ) -> np.ndarray:
        """Row numbers (n,) of a split, in order: `store[i]` for each of them.

        Args:
            split: "train", "validation", …
            has_text: only rows with a text half.
            has_speech: only rows with a speech half.
            is_aligned: only rows with both halves and the times that align them.
        """
        wanted = (split, has_text, has_speech, is_aligned)
        if wanted not in self._ids_of_split:  # tasks and stages ask for the same ones
            keep = self._is_in_split(split)
            for column, is_needed in (("text_ids", has_text), ("units", has_speech), ("word_ends_s", is_aligned)):
                if is_needed:
                    keep &= self.lengths(column) > 0
            self._ids_of_split[wanted] = np.flatnonzero(keep)
        return self._ids_of_split[wanted]

    def lengths(self, column: str) -> np.ndarray:
        """Number of values of each utterance in a column (len(self),), 0 where it has none."""
        return np.concatenate([np.zeros(0, np.int32), *(group.lengths(column) for group in self._groups)])

    def _is_in_split(self, split: str) -> np.ndarray:
        names, numbers = self._splits
        return numbers == names.index(split) if split in names else np.zeros(len(self), dtype=bool)

    @cached_property
    def _splits(self) -> tuple[list[str | None], np.ndarray]:
        """Names of the splits, and the number of each row's in them."""
        names: list[str | None] = []
        numbers = np.zeros(len(self), dtype=np.int16)
        for place, start, end in zip(self._places, self._starts, self._starts[1:], strict=False):
            column = decoded_columns(*place, ["split"])["split"].dictionary_encode(null_encoding="encode")
            found = column.dictionary.to_pylist()
            names += [name for name in found if name not in names]
            numbers[start:end] = np.array([names.index(name) for name in found], np.int16)[column.indices.to_numpy()]
        return names, numbers

    def require(self, *, speech_fingerprint: str | None = None, text_fingerprint: str | None = None) -> None:
        """Check that the store was made with these tokenizers; None is not compared.

        Raises:
            ValueError: a fingerprint differs; names both.
        """
        for kind, wanted, found in (
            ("speech", speech_fingerprint, self.metadata.speech_tokenizer_fingerprint),
            ("text", text_fingerprint, self.metadata.text_tokenizer_fingerprint),
        ):
            if wanted is not None and wanted != found:
                raise ValueError(
                    f"{self.path} was made with the {kind} tokenizer {found}, {wanted} is needed: "
                    f"prepare the store with that {kind} tokenizer"
                )

    def verify(self) -> None:
        """Read everything: every shard's hash, and every utterance's consistency.

        Raises:
            ValueError: a shard or an utterance is not as it was written.
        """
        for shard in self.shards:
            with open(self.path / shard.file, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != shard.sha256:
                raise ValueError(
                    f"{self.path / shard.file} has the hash {sha256} instead of {shard.sha256}, it was "
                    f"changed: copy it again, or prepare the store again"
                )
        for row in range(len(self)):
            utterance = self[row]
            check_utterance(utterance, self.metadata)
            expected = tokens_of(utterance, self.unit_rate_hz)
            for name, values, right in zip(Tokens._fields, self.tokens(row, reads_text=True), expected, strict=True):
                if bytes(values) != bytes(right):
                    raise ValueError(
                        f"utterance {utterance.id!r}: {name} differs from what {self.path} derives it from: "
                        f"prepare the store again"
                    )


def _open_store(path: Path, cache_bytes: int) -> Store:
    return Store(path, cache_bytes=cache_bytes)


def _num_bytes(columns: dict[str, pa.Array]) -> int:
    return sum(column.nbytes for column in columns.values())


def _max_value(footer: pq.FileMetaData, column: str) -> int:
    """Largest value of a list column by the statistics in the footer, −1 for none."""
    index = next(i for i in range(footer.num_columns) if footer.schema.column(i).path.partition(".")[0] == column)
    largest = -1
    for group in range(footer.num_row_groups):
        statistics = footer.row_group(group).column(index).statistics
        if statistics is not None and statistics.has_min_max:
            largest = max(largest, statistics.max)
    return largest
