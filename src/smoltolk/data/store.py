"""The store: utterances as text tokens and speech units in Parquet shards.

A store is a folder:

    manifest.json         format version and, for every shard, its file, rows, bytes and SHA-256
    shard-00000.parquet   one row per utterance; the schema metadata names both tokenizers
    …

Shards are ordinary Parquet (`SCHEMA`): Hugging Face `datasets`, DuckDB, Spark and Ray read them as they are.
Everything is written aside and renamed, the manifest last: a folder without one is not (yet) a store.
"""

import contextlib
import fcntl
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smoltolk.data.utterance import (
    FORMAT_VERSION,
    LIST_TYPES,
    SCHEMA,
    StoreMetadata,
    Utterance,
    check_utterance,
    check_version,
)
from smoltolk.speech.audio import write_atomically

MANIFEST = "manifest.json"
ROWS_PER_SHARD = 2048
ROWS_PER_GROUP = 256  # what one random access decodes when nothing is cached


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
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is being written by another process: wait for it to end, or choose another folder"
            ) from None
        for leftover in folder.rglob(".*.part"):  # of a writer that was killed
            leftover.unlink()
        yield


def write_shard(folder: Path, number: int, utterances: Sequence[Utterance], metadata: StoreMetadata) -> Shard:
    """Check utterances and write them as one shard.

    Raises:
        ValueError: an utterance is not consistent (see `check_utterance`).
        OSError: the shard cannot be written; nothing is left of it.
    """
    for utterance in utterances:
        check_utterance(utterance, metadata)
    columns = []
    for field in SCHEMA:
        values = [getattr(utterance, field.name) for utterance in utterances]
        if field.name in LIST_TYPES:
            dtype = LIST_TYPES[field.name]
            values = [None if value is None else np.asarray(value, dtype=dtype) for value in values]
        columns.append(pa.array(values, type=field.type))
    sink = pa.BufferOutputStream()
    table = pa.Table.from_arrays(columns, schema=metadata.to_schema())
    pq.write_table(table, sink, row_group_size=ROWS_PER_GROUP, compression="zstd")
    data = sink.getvalue().to_pybytes()
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
        ValueError: there is a store at `path` already, or another writer is at work there.
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


class RowGroup:
    """A decoded row group: offsets and values of each list column as NumPy views of Arrow memory."""

    def __init__(self, table: pa.Table) -> None:
        self.num_bytes = table.nbytes
        self._scalars: dict[str, pa.Array] = {}
        self._lists: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for name in SCHEMA.names:
            column = table[name].combine_chunks()
            if name in LIST_TYPES:
                valid = column.is_valid().to_numpy(zero_copy_only=False)
                self._lists[name] = (valid, column.offsets.to_numpy(), column.values.to_numpy())
            else:
                self._scalars[name] = column

    def __getitem__(self, row: int) -> Utterance:
        fields: dict[str, Any] = {name: column[row].as_py() for name, column in self._scalars.items()}
        for name, (valid, offsets, values) in self._lists.items():
            fields[name] = values[offsets[row] : offsets[row + 1]] if valid[row] else None
        return Utterance(**fields)


class Store:
    """Reads a store in random access: `store[i]` is an `Utterance` whose arrays are read-only views.

    Opening looks at every shard's size, row count and metadata, not at its data (`verify` does). Reading maps
    the shards into memory and decodes row groups of 256 utterances when they are first asked for.

    Args:
        path: folder of the store.
        cache_bytes: decoded row groups kept in memory, the most recently used ones.

    Raises:
        ValueError: there is no store at `path`, a shard is missing, truncated or of another store or version,
            or holds units that its speech tokenizer does not have.
    """

    def __init__(self, path: str | Path, *, cache_bytes: int = 1 << 30) -> None:
        self.path = Path(path)
        self.shards = self._read_manifest()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._cache: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._group_starts: list[np.ndarray] = []  # first row of each row group, per shard
        self.max_text_id = -1
        for number, shard in enumerate(self.shards):
            self._open_shard(number, shard)
        self._shard_starts = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards])])

    def _read_manifest(self) -> list[Shard]:
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ValueError(
                f"{self.path} is not a store (no {MANIFEST}): give the output folder of a finished `prepare`"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged ({error}): prepare the store again") from None
        check_version(manifest.get("format_version"), path)
        return [Shard(**shard) for shard in manifest["shards"]]

    def _open_shard(self, number: int, shard: Shard) -> None:
        path = self.path / shard.file
        if not path.exists():
            raise ValueError(f"{path} is missing: copy the whole store, or prepare it again")
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes instead of {shard.bytes}, it is truncated or "
                f"changed: copy it again, or prepare the store again"
            )
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                footer, schema = file.metadata, file.schema_arrow
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is damaged ({error}): prepare the store again") from None
        metadata = StoreMetadata.from_schema(schema, path)
        if number == 0:
            self.metadata = metadata
        elif metadata != self.metadata:
            raise ValueError(f"{path} was made with other tokenizers than the first shard: prepare the store again")
        if footer.num_rows != shard.rows:
            raise ValueError(f"{path} has {footer.num_rows} rows instead of {shard.rows}: prepare the store again")
        sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        self._group_starts.append(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
        self.max_text_id = max(self.max_text_id, _max_value(footer, "text_ids"))
        if (max_unit := _max_value(footer, "units")) >= (metadata.num_units or 0):
            raise ValueError(
                f"{path} holds unit {max_unit}, but its speech tokenizer has {metadata.num_units} units: "
                f"prepare the store again"
            )

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    def __getitem__(self, row: int) -> Utterance:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store with {len(self)} rows")
        shard = int(self._shard_starts.searchsorted(row, side="right")) - 1
        row -= int(self._shard_starts[shard])
        group = int(self._group_starts[shard].searchsorted(row, side="right")) - 1
        return self._row_group(shard, group)[row - int(self._group_starts[shard][group])]

    def _row_group(self, shard: int, group: int) -> RowGroup:
        if (shard, group) in self._cache:
            self._cache.move_to_end((shard, group))
            return self._cache[shard, group]
        with pq.ParquetFile(self.path / self.shards[shard].file, memory_map=True) as file:
            decoded = RowGroup(file.read_row_group(group))
        self._cache[shard, group] = decoded
        self._cached_bytes += decoded.num_bytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].num_bytes
        return decoded

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
        found = []
        for shard, start in zip(self.shards, self._shard_starts, strict=False):
            columns = ["split", "seconds", "word_token_counts", "word_ends_s"]
            table = pq.read_table(self.path / shard.file, columns=columns, memory_map=True)
            keep = pc.fill_null(pc.equal(table["split"], split), False)
            if has_text:
                keep = pc.and_(keep, pc.is_valid(table["word_token_counts"]))
            if has_speech:
                keep = pc.and_(keep, pc.is_valid(table["seconds"]))
            if is_aligned:
                keep = pc.and_(keep, pc.is_valid(table["word_ends_s"]))
            found.append(np.flatnonzero(keep.to_numpy()) + start)
        return np.concatenate(found)

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
                    f"{self.path} was made with the {kind} tokenizer {found}, the model needs {wanted}: "
                    f"prepare the store with the model's {kind} tokenizer"
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
            check_utterance(self[row], self.metadata)


def _max_value(footer: pq.FileMetaData, column: str) -> int:
    """Largest value of a list column by the statistics in the footer, −1 for none."""
    index = next(i for i in range(footer.num_columns) if footer.schema.column(i).path.partition(".")[0] == column)
    largest = -1
    for group in range(footer.num_row_groups):
        statistics = footer.row_group(group).column(index).statistics
        if statistics is not None and statistics.has_min_max:
            largest = max(largest, statistics.max)
    return largest
