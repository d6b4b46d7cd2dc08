"""A shard: one Parquet file whose lists are read where they lie, without decoding.

Rows of training are drawn at random from all utterances. Decoding a row group for each draw would cost the more
the less of a store fits into a cache, so the columns that rows are made of are written without compression and
without dictionary, one page per row group. The values of such a column are the last bytes of its column chunk
(Parquet's PLAIN encoding: integers of up to 32 bits as 4 bytes, strings with their length before them; repetition
and definition levels come first): https://parquet.apache.org/docs/file-format/data-pages/. Where the values of a
row end is a column too. So any utterance is read in place, at the cost of a few slices of a mapped file, however
large the store is; any Parquet reader still reads the shard as it is.

Beside the utterances' own fields (`SCHEMA`) a shard has, derived from them,

    word_unit_ends    where the units of each word end among the utterance's, null without word times
    <column>_end      where a row's values end among those of its row group, for each column read in place
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smoltolk.data.utterance import LIST_TYPES, SCHEMA, StoreMetadata, Utterance, word_units

ROWS_PER_GROUP = 2048
MAX_PAGE_BYTES = 1 << 30

# column → the column that says where its rows end; columns of equal lengths share one
ENDS = {
    "text_ids": "text_ids_end",
    "units": "units_end",
    "unit_durations": "units_end",
    "word_ends_s": "word_ends_s_end",
    "word_unit_ends": "word_ends_s_end",
    "word_token_counts": "word_token_counts_end",
    "text": "text_end",
}
END_COLUMNS = sorted(set(ENDS.values()))
SHARD_SCHEMA = pa.schema(
    [
        *SCHEMA,
        pa.field("word_unit_ends", pa.list_(pa.uint32())),
        *(pa.field(name, pa.int32(), nullable=False) for name in END_COLUMNS),
    ]
)
DECODED = [name for name in SCHEMA.names if name not in ENDS]  # by Arrow: names, speakers, splits, …


class Tokens(NamedTuple):
    """What rows are made of: the ids of an utterance, where its words end in them, and its text.

    An array is empty where its half, or the alignment, is missing.

    Args:
        text_ids: text tokens (num_tokens,) uint32.
        word_token_counts: number of text tokens of each word (num_words,) uint32.
        units: speech units (num_units,) uint32.
        word_unit_ends: where the units of each word end (num_words,) uint32.
        text: the words in UTF-8.
    """

    text_ids: np.ndarray
    word_token_counts: np.ndarray
    units: np.ndarray
    word_unit_ends: np.ndarray
    text: memoryview | bytes = b""


def tokens_of(utterance: Utterance, unit_rate_hz: float | None) -> Tokens:
    """The tokens of an utterance in memory, as a store of this unit rate would give them."""

    def array(values: np.ndarray | None) -> np.ndarray:
        return np.zeros(0, np.uint32) if values is None else values.astype(np.uint32)

    return Tokens(
        array(utterance.text_ids),
        array(utterance.word_token_counts),
        array(utterance.units),
        array(_word_unit_ends(utterance, unit_rate_hz)),
        (utterance.text or "").encode(),
    )


def _word_unit_ends(utterance: Utterance, unit_rate_hz: float | None) -> np.ndarray | None:
    if utterance.word_ends_s is None or unit_rate_hz is None:
        return None
    return word_units(utterance, unit_rate_hz)[1:]


def encode_shard(utterances: Sequence[Utterance], metadata: StoreMetadata) -> bytes:
    """The Parquet file of some utterances; the same ones always give the same bytes.

    Raises:
        ValueError: the utterances are too long for one row group.
    """
    columns: dict[str, pa.Array] = {}
    for field in SCHEMA:
        values = [getattr(utterance, field.name) for utterance in utterances]
        if field.name in LIST_TYPES:
            dtype = LIST_TYPES[field.name]
            values = [None if value is None else np.asarray(value, dtype=dtype) for value in values]
        columns[field.name] = pa.array(values, type=field.type)
    unit_ends = [_word_unit_ends(utterance, metadata.unit_rate_hz) for utterance in utterances]
    columns["word_unit_ends"] = pa.array(unit_ends, type=SHARD_SCHEMA.field("word_unit_ends").type)
    for name, end_name in ENDS.items():
        columns[end_name] = _row_ends(columns[name])
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays([columns[name] for name in SHARD_SCHEMA.names], schema=metadata.to_schema(SHARD_SCHEMA)),
        sink,
        row_group_size=ROWS_PER_GROUP,
        compression=dict.fromkeys(DECODED, "zstd"),  # none for the others
        use_dictionary=[name for name in DECODED if SHARD_SCHEMA.field(name).type == pa.string()],
        write_statistics=[f"{name}.list.element" for name in ("text_ids", "units")],
        data_page_size=2 * MAX_PAGE_BYTES - 1,  # more than is let through: one page for each column chunk
        data_page_version="1.0",
        version="2.6",
    )
    return sink.getvalue().to_pybytes()


def _row_ends(column: pa.Array) -> pa.Array:
    """Where the values of each row end among those of its row group, in values (lists) or bytes (strings)."""
    is_text = column.type == pa.string()
    offsets = np.frombuffer(column.buffers()[1], np.int32, len(column) + 1) if len(column) else np.zeros(1, np.int32)
    lengths = np.diff(offsets).astype(np.int64)
    if is_text:
        lengths += 4 * column.is_valid().to_numpy(zero_copy_only=False)  # a string's length stands before it
    groups = [np.cumsum(lengths[start : start + ROWS_PER_GROUP]) for start in range(0, len(lengths), ROWS_PER_GROUP)]
    if any(ends[-1] * (1 if is_text else 4) > MAX_PAGE_BYTES for ends in groups):
        raise ValueError(
            f"{ROWS_PER_GROUP} utterances have more than {MAX_PAGE_BYTES} bytes in one column: "
            f"cut such long utterances into shorter ones, or lower rows_per_shard"
        )
    return pa.array(np.concatenate(groups) if groups else np.zeros(0), type=pa.int32())


class RowGroup:
    """A row group read in place.

    Args:
        buffer: the whole shard, mapped.
        layout: where the row group lies, from the shard's footer.
        path: the shard, for errors.

    Raises:
        ValueError: the columns were written in another way.
    """

    def __init__(self, buffer: pa.Buffer, layout: pq.RowGroupMetaData, path: Path) -> None:
        self.num_rows = layout.num_rows
        chunks = {}
        for index in range(layout.num_columns):
            chunk = layout.column(index)
            chunks[chunk.path_in_schema.partition(".")[0]] = chunk
        for name in (*ENDS, *END_COLUMNS):
            if chunks[name].compression != "UNCOMPRESSED" or not set(chunks[name].encodings) <= {"PLAIN", "RLE"}:
                raise ValueError(
                    f"{path} was written by something else (column {name} is compressed or encoded): "
                    f"prepare the store again"
                )
        bytes_of_shard = memoryview(buffer)

        def last_bytes(name: str, count: int) -> memoryview:
            end = chunks[name].data_page_offset + chunks[name].total_compressed_size
            return bytes_of_shard[end - count : end]

        self._ends = {name: last_bytes(name, 4 * self.num_rows).cast("i") for name in END_COLUMNS}
        self._text = last_bytes("text", self._ends["text_end"][-1]) if self.num_rows else memoryview(b"")
        self._arrays: dict[str, np.ndarray] = {}
        for name in (*LIST_TYPES, "word_unit_ends"):
            count = self._ends[ENDS[name]][-1] if self.num_rows else 0
            dtype = np.float32 if LIST_TYPES.get(name) is np.float32 else np.uint32
            self._arrays[name] = np.frombuffer(last_bytes(name, 4 * count), dtype)
        self._token_columns = tuple(
            (self._arrays[name], self._ends[ENDS[name]])
            for name in ("text_ids", "word_token_counts", "units", "word_unit_ends")
        )

    def tokens(self, row: int, *, reads_text: bool = False) -> Tokens:
        """The tokens of a row as views of the mapped file; its text only where asked for."""
        before = row - 1
        (ids, ids_end), (counts, counts_end), (units, units_end), (ends, ends_end) = self._token_columns
        return Tokens(
            ids[ids_end[before] if row else 0 : ids_end[row]],
            counts[counts_end[before] if row else 0 : counts_end[row]],
            units[units_end[before] if row else 0 : units_end[row]],
            ends[ends_end[before] if row else 0 : ends_end[row]],
            self.text(row) if reads_text else b"",
        )

    def text(self, row: int) -> memoryview:
        """The text of a row in UTF-8, empty where it has none."""
        ends = self._ends["text_end"]
        return self._text[ends[row - 1] if row else 0 : ends[row]][4:]

    def arrays(self, row: int) -> dict[str, np.ndarray | None]:
        """The lists of a row as `Utterance` has them, None where they are missing."""
        found: dict[str, np.ndarray | None] = {}
        for name, dtype in LIST_TYPES.items():
            ends = self._ends[ENDS[name]]
            values = self._arrays[name][ends[row - 1] if row else 0 : ends[row]].astype(dtype)
            values.flags.writeable = False
            found[name] = values if len(values) else None  # no half of an utterance is without tokens
        return found

    def lengths(self, name: str) -> np.ndarray:
        """Number of values of each row in a column (num_rows,)."""
        return np.diff(np.frombuffer(self._ends[ENDS[name]], np.int32), prepend=0)


def decoded_columns(path: Path, group: int, columns: list[str]) -> dict[str, Any]:
    """Columns of a row group, decoded by Arrow."""
    with pq.ParquetFile(path, memory_map=True) as file:
        table = file.read_row_group(group, columns=columns, use_threads=False)
    return {name: table[name].combine_chunks() for name in columns}
