"""Check of a whole store: everything that is wrong with it at once, and what is odd about its rows.

`Store` stops at the first fault, since a training run must. Here nothing stops: shards are read batch by batch,
and every finding says how often it occurs, where, and what to do. Of each row some 50 bytes are kept, to find
rows that occur twice and to say how the rows are spread.
"""

import fcntl
import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import TaskProgressColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from smoltolk.data.shard import SHARD_SCHEMA, RowGroup, Tokens, tokens_of
from smoltolk.data.sources import SPLITS
from smoltolk.data.store import MANIFEST, Shard
from smoltolk.data.text import decode_tokens, encode_words, tokenizer_fingerprint
from smoltolk.data.utterance import (
    FORMAT_VERSION,
    LIST_TYPES,
    SCHEMA,
    StoreMetadata,
    Utterance,
    check_utterance,
    check_version,
    word_units,
)
from smoltolk.data.work_folder import BLOCKS, QUARANTINE, SETTINGS
from smoltolk.terminal import progress_bar

PREPARE_AGAIN = "prepare the store again"
COPY_AGAIN = "copy it again, or prepare the store again"
_NUM_EXAMPLES = 5
_ROWS_PER_BATCH = 256
_LENGTH_SLACK_FRAMES = 3  # tokenizers differ in what they do with the last frames of the audio


@dataclass(frozen=True)
class Limits:
    """What is taken for ordinary speech; rows outside are reported, they are not faults.

    Args:
        words_per_s: slowest and fastest speech.
        word_s: longest time from the end of one word to the end of the next.
        unaligned_s: longest time after the last word.
        empty_words: largest share of an utterance's words without a unit.
        units_per_s: fewest units in a second.
    """

    words_per_s: tuple[float, float] = (0.5, 7.0)
    word_s: float = 5.0
    unaligned_s: float = 5.0
    empty_words: float = 0.2
    units_per_s: float = 1.0


@dataclass(frozen=True)
class Finding:
    """One kind of thing that was found.

    Args:
        kind: short name.
        is_fault: whether the store is broken or its content wrong; else it is worth a look.
        count: how often it occurs.
        examples: the first few places: ids, files, or messages that name them.
        remedy: what to do.
    """

    kind: str
    is_fault: bool
    count: int
    examples: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Spread:
    """How a number is spread over rows: the 1st, 50th and 99th percentile."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class StoreReport:
    """What `check_store` found.

    Args:
        path: the store.
        rows: rows that could be read.
        splits: rows of each split; "" are rows without one.
        hours: length of all audio.
        words: number of written words.
        units: number of speech units.
        units_used: number of different units that occur.
        spreads: how words/s, units/s, seconds and the like are spread over rows.
        findings: faults first.
    """

    path: str
    rows: int
    splits: dict[str, int]
    hours: float
    words: int
    units: int
    units_used: int
    spreads: dict[str, Spread]
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether there is no fault."""
        return not any(finding.is_fault for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The report as it is written to JSON."""
        return {"is_sound": self.is_sound, **asdict(self)}


def check_store(
    path: str | Path,
    *,
    speech_fingerprint: str | None = None,
    text_tokenizer: PreTrainedTokenizerBase | None = None,
    limits: Limits | None = None,
    progress: bool = True,
) -> StoreReport:
    """Read everything in a store and report all that is wrong or odd.

    Faults: a manifest that is missing, damaged or of another version; a preparation that is not finished or
    still at work; shards that are missing, truncated, changed, listed twice or of another version, schema or
    tokenizer; rows that are not consistent (`check_utterance`), whose units last longer or shorter than their
    audio, or whose ids occur twice; text ids that do not decode to the text; other tokenizers than the given.

    Worth a look: speech outside of `limits`, rows that are the same (above all in two splits), a store without
    a split that training needs, rows in quarantine, and leftovers in the folder.

    Args:
        path: folder of the store.
        speech_fingerprint: fingerprint of the speech tokenizer that the store should be of.
        text_tokenizer: the text tokenizer that the store should be of; every text is tokenized again.
        limits: what is taken for ordinary speech.
        progress: whether to show a progress bar.

    Raises:
        ValueError: `path` is no folder, or the text tokenizer is not a fast one.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder: give the folder of a store")
    text_fingerprint = None if text_tokenizer is None else tokenizer_fingerprint(text_tokenizer)
    check = _Check(path, text_tokenizer, limits or Limits())
    check.folder()
    total_bytes = sum((path / shard.file).stat().st_size for shard in check.shards if (path / shard.file).is_file())
    with progress_bar(TaskProgressColumn(), TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task("check", total=total_bytes)
        for shard in check.shards:
            check.shard(shard)
            bar.advance(task, shard.bytes)
    check.fingerprints(speech_fingerprint, text_fingerprint)
    check.all_rows()
    return check.report()


@dataclass
class _Found:
    """A finding while it grows."""

    is_fault: bool
    remedy: str
    count: int = 0
    examples: list[str] = field(default_factory=list)


class _Check:
    """The state of a check: what is found, and what is remembered of each row."""

    def __init__(self, path: Path, text_tokenizer: PreTrainedTokenizerBase | None, limits: Limits) -> None:
        self.path = path
        self.shards: list[Shard] = []
        self._text_tokenizer = text_tokenizer
        self._limits = limits
        self._metadata: StoreMetadata | None = None
        self._found: dict[str, _Found] = {}
        self._shard_rows: list[tuple[str, int]] = []  # file and number of rows of each shard that was read
        self._splits: Counter[str] = Counter()
        self._split_numbers: dict[str, int] = {}
        self._row_splits = array("B")
        self._id_hashes, self._text_hashes, self._unit_hashes = array("Q"), array("Q"), array("Q")
        self._numbers = {name: array("f") for name in ("seconds", "words/s", "units/s", "units/word", "s/word")}
        self._rows = self._words = self._units = self._aligned = self._paired = 0
        self._seconds = 0.0
        self._unit_counts = np.zeros(0, dtype=np.int64)

    def _fault(self, kind: str, example: str, remedy: str) -> None:
        self._add(kind, example, remedy, is_fault=True)

    def _note(self, kind: str, example: str, remedy: str) -> None:
        self._add(kind, example, remedy, is_fault=False)

    def _add(self, kind: str, example: str, remedy: str, *, is_fault: bool, count: int = 1) -> None:
        found = self._found.setdefault(kind, _Found(is_fault, remedy))
        found.count += count
        if len(found.examples) < _NUM_EXAMPLES:
            found.examples.append(example)

    # The folder

    def folder(self) -> None:
        """Look at the manifest, and at what lies beside the shards."""
        files = sorted(path.relative_to(self.path).as_posix() for path in self.path.rglob("*.parquet"))
        if not (self.path / MANIFEST).exists():
            self._no_manifest()
            self.shards = [Shard(file, -1, (self.path / file).stat().st_size, "") for file in files]
        else:
            self._manifest()
            listed = {shard.file for shard in self.shards}
            for file in files:
                if file not in listed:
                    self._note("shard that the manifest does not list", file, "delete it: it is not read")
            if (self.path / BLOCKS).exists():
                self._note("records of a finished preparation", BLOCKS, "delete the folder, or run `prepare` once more")
        for part in sorted(self.path.rglob(".*.part")):
            self._note(
                "half-written file of a killed writer",
                part.relative_to(self.path).as_posix(),
                "delete it: it is not read",
            )
        self._writer_at_work()
        self._quarantine()

    def _no_manifest(self) -> None:
        settings = self.path / SETTINGS
        if not settings.exists():
            self._fault(
                "no manifest", MANIFEST, f"this is not (yet) a store: {PREPARE_AGAIN}, or copy the whole folder"
            )
            return
        try:
            begun = json.loads(settings.read_bytes())
            num_pieces = begun["source_pieces"]
            chosen = f"--validation-share {begun['validation_share']} and --rows-per-shard {begun['rows_per_shard']}"
        except (ValueError, KeyError, TypeError):
            self._fault("preparation not finished", f"{SETTINGS} is damaged", f"delete the folder and {PREPARE_AGAIN}")
            return
        num_done = len(list((self.path / BLOCKS).glob("*/done.json")))
        self._fault(
            "preparation not finished",
            f"{num_done} of {num_pieces} pieces of the source are done",
            f"go on with the same `smoltolk prepare` command (it had {chosen}): what is done is kept",
        )

    def _manifest(self) -> None:
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError as error:
            return self._fault("damaged manifest", str(error), COPY_AGAIN)
        try:
            check_version(manifest.get("format_version"), path)
        except AttributeError:
            return self._fault("damaged manifest", "it is not a JSON object", COPY_AGAIN)
        except ValueError:
            version = f"version {manifest['format_version']!r}, this smoltolk reads {FORMAT_VERSION}"
            self._fault("other format version", version, f"{PREPARE_AGAIN}, or use the smoltolk that wrote it")
        entries = manifest.get("shards")
        for entry in entries if isinstance(entries, list) else []:
            shard = _shard(entry)
            if shard is None:
                self._fault("damaged manifest", f"{entry!r} is no shard", COPY_AGAIN)
            elif shard.file in {other.file for other in self.shards}:
                self._fault("shard listed twice", shard.file, COPY_AGAIN)
            else:
                self.shards.append(shard)
        if not isinstance(entries, list) or not entries:
            self._fault("damaged manifest", "it lists no shards", COPY_AGAIN)
        return None

    def _writer_at_work(self) -> None:
        try:
            with open(self.path / ".lock", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._fault("being written by another process", ".lock is held", "wait for it to end, then check again")
        except OSError:
            pass  # there is none, or it may not be read: nobody writes

    def _quarantine(self) -> None:
        try:
            with open(self.path / QUARANTINE, encoding="utf-8") as file:
                for line in file:
                    entry = json.loads(line)
                    self._note("row in quarantine", f"{entry['id']}: {entry['reason']}", f"see {QUARANTINE}")
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError) as error:
            self._fault("damaged quarantine list", str(error), COPY_AGAIN)

    # Shards

    def shard(self, shard: Shard) -> None:
        """Check a shard's file, and its rows as far as they can be read."""
        path = self.path / shard.file
        try:
            num_bytes = path.stat().st_size
            if num_bytes != shard.bytes:
                self._fault("shard of another size", f"{shard.file}: {num_bytes} bytes, not {shard.bytes}", COPY_AGAIN)
            elif shard.sha256 and _sha256(path) != shard.sha256:
                self._fault("changed shard", f"{shard.file} has another SHA-256", COPY_AGAIN)
            with pq.ParquetFile(path) as file:
                self._shard_rows.append((shard.file, 0))
                metadata = StoreMetadata.from_schema(file.schema_arrow, path, SHARD_SCHEMA)
                if self._metadata is None:
                    self._metadata = metadata
                    self._unit_counts = np.zeros(metadata.num_units or 0, dtype=np.int64)
                elif metadata != self._metadata:
                    return self._fault("shard of other tokenizers", shard.file, PREPARE_AGAIN)
                if shard.rows not in (-1, file.metadata.num_rows):
                    example = f"{shard.file}: {file.metadata.num_rows} rows, not {shard.rows}"
                    self._fault("shard of another number of rows", example, COPY_AGAIN)
                with pa.memory_map(str(path)) as mapped:
                    buffer = mapped.read_buffer()
                for group in range(file.num_row_groups):
                    in_place = RowGroup(buffer, file.metadata.row_group(group), path)
                    start = 0
                    for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=[group]):
                        self._batch(batch, in_place, start, metadata)
                        start += len(batch)
                        self._shard_rows[-1] = (shard.file, self._shard_rows[-1][1] + len(batch))
        except FileNotFoundError:
            self._fault("missing shard", shard.file, "copy the whole store, or prepare it again")
        except (pa.ArrowException, OSError) as error:
            self._fault("damaged shard", f"{shard.file}: {_first_line(error)}", COPY_AGAIN)
        except (ValueError, KeyError, TypeError) as error:  # the metadata or the columns
            self._fault("shard of another kind", _first_line(error), PREPARE_AGAIN)
        return None

    def _batch(self, batch: pa.RecordBatch, in_place: RowGroup, start: int, metadata: StoreMetadata) -> None:
        for row, utterance in enumerate(_utterances(batch), start):
            self._remember(utterance)
            try:
                check_utterance(utterance, metadata)
            except ValueError as error:
                self._fault("inconsistent row", str(error), f"{PREPARE_AGAIN}, or report how it was made")
                continue
            self._row(utterance, metadata)
            expected = tokens_of(utterance, metadata.unit_rate_hz)
            for name, found, right in zip(Tokens._fields, in_place.tokens(row, reads_text=True), expected, strict=True):
                if bytes(found) != bytes(right):
                    self._fault("derived column that differs from its row", f"{utterance.id}: {name}", PREPARE_AGAIN)

    # Rows

    def _remember(self, utterance: Utterance) -> None:
        """What is needed to find rows that occur twice; 0 stands for nothing."""
        split = utterance.split or ""
        self._rows += 1
        self._splits[split] += 1
        self._row_splits.append(self._split_numbers.setdefault(split, min(len(self._split_numbers), 255)))
        if not utterance.id:
            self._fault("row without an id", self._shard_rows[-1][0], f"{PREPARE_AGAIN}, or report how it was made")
        self._id_hashes.append(_hash(utterance.id.encode()) if utterance.id else 0)
        words = re.findall(r"\w+", (utterance.text or "").casefold())
        same = (" ".join(words), utterance.speaker, round(utterance.seconds or 0.0, 1))
        self._text_hashes.append(_hash(repr(same).encode()) if words else 0)
        self._unit_hashes.append(0 if utterance.units is None else _hash(utterance.units.tobytes()))

    def _row(self, utterance: Utterance, metadata: StoreMetadata) -> None:
        """Statistics of a consistent row, and what is odd about it."""
        if utterance.text_ids is not None:
            self._words += len(utterance.array("word_token_counts"))
            if self._text_tokenizer is not None:
                self._tokens(utterance, self._text_tokenizer)
        if utterance.units is not None:
            self._speech(utterance, metadata)
        if utterance.text_ids is not None and utterance.units is not None:
            self._paired += 1
            self._alignment(utterance, metadata)

    def _tokens(self, utterance: Utterance, tokenizer: PreTrainedTokenizerBase) -> None:
        ids, text = utterance.array("text_ids"), utterance.text or ""
        try:
            again, counts = encode_words(tokenizer, text)
            if np.array_equal(again, ids) and np.array_equal(counts, utterance.array("word_token_counts")):
                return
        except ValueError:
            pass  # the text cannot be tokenized any more: then its ids have to decode to it
        decoded = decode_tokens(tokenizer, [ids])[0] if ids.max() < len(tokenizer) else ""
        if decoded.split() != text.split():
            self._fault("text ids that are not the text's", utterance.id, "prepare it with the right text tokenizer")
        else:
            self._note("text that would be tokenized otherwise", utterance.id, "fine if it was imported as it is")

    def _speech(self, utterance: Utterance, metadata: StoreMetadata) -> None:
        units, durations = utterance.array("units"), utterance.array("unit_durations")
        seconds, unit_rate_hz = utterance.seconds or 0.0, metadata.unit_rate_hz or 0.0
        self._units += len(units)
        self._seconds += seconds
        self._unit_counts += np.bincount(units, minlength=len(self._unit_counts))
        self._numbers["seconds"].append(seconds)
        self._numbers["units/s"].append(len(units) / seconds)
        units_s = float(durations.sum(dtype=np.int64)) / unit_rate_hz
        if abs(units_s - seconds) > _LENGTH_SLACK_FRAMES / unit_rate_hz + 0.001:
            self._fault(
                "units of another length than the audio",
                f"{utterance.id}: {units_s:.2f} s of units, {seconds:.2f} s of audio",
                "prepare these rows again: units and audio do not belong together",
            )
        if len(units) / seconds < self._limits.units_per_s:
            self._note(
                "few units", f"{utterance.id}: {len(units)} in {seconds:.1f} s", "listen: silence, noise or music?"
            )
        if np.any(units[1:] == units[:-1]):
            self._note("equal units side by side", utterance.id, "merge them, as a tokenizer does")

    def _alignment(self, utterance: Utterance, metadata: StoreMetadata) -> None:
        limits, seconds = self._limits, utterance.seconds or 0.0
        num_words = len(utterance.array("word_token_counts"))
        words_per_s = num_words / seconds
        self._numbers["words/s"].append(words_per_s)
        self._numbers["units/word"].append(len(utterance.array("units")) / num_words)
        slowest, fastest = limits.words_per_s
        if not slowest <= words_per_s <= fastest:
            self._note(
                f"speech outside of {slowest:g} … {fastest:g} words/s",
                f"{utterance.id}: {words_per_s:.1f}",
                "listen: is the text that of the audio?",
            )
        if utterance.word_ends_s is None:
            return
        self._aligned += 1
        ends_s = utterance.word_ends_s.astype(np.float64)
        lengths_s = np.diff(ends_s, prepend=0.0)
        self._numbers["s/word"].append(float(np.median(lengths_s)))
        longest = int(lengths_s.argmax())
        if lengths_s[longest] > limits.word_s:
            word = (utterance.text or "").split()[longest]
            self._note(
                f"word longer than {limits.word_s:g} s",
                f"{utterance.id}: {word!r} {lengths_s[longest]:.1f} s",
                "align it again, or look for a pause or for speech that is not in the text",
            )
        if seconds - ends_s[-1] > limits.unaligned_s:
            example = f"{utterance.id}: {seconds - ends_s[-1]:.1f} s"
            self._note("audio after the last word", example, "align it again: is there speech that is not in the text?")
        if ends_s[-1] > seconds + 0.001:  # the times are stored in float32
            example = f"{utterance.id}: {1000 * (ends_s[-1] - seconds):.0f} ms"
            self._note("last word ends after the audio", example, "fine for a few milliseconds")
        empty = float((np.diff(word_units(utterance, metadata.unit_rate_hz or 0.0)) == 0).mean())
        if empty > limits.empty_words:
            example = f"{utterance.id}: {100 * empty:.0f} %"
            self._note(f"more than {100 * limits.empty_words:g} % words without units", example, "align it again")

    # All together

    def fingerprints(self, speech: str | None, text: str | None) -> None:
        """Compare the store's tokenizers with those it should be of."""
        if self._metadata is None:
            return
        for kind, wanted, found in (
            ("speech", speech, self._metadata.speech_tokenizer_fingerprint),
            ("text", text, self._metadata.text_tokenizer_fingerprint),
        ):
            if wanted is not None and wanted != found:
                remedy = f"give the {kind} tokenizer it was made with, or prepare it with this one"
                self._fault(f"other {kind} tokenizer", f"the store is of {found}, not of {wanted}", remedy)

    def all_rows(self) -> None:
        """Look for rows that occur twice, for splits, and for what cannot be drawn."""
        self._twice("id that occurs twice", self._id_hashes, "give every row its own id", is_fault=True)
        remedy = "leave all but one out: they weigh twice"
        self._twice("rows of the same units", self._unit_hashes, remedy)
        self._twice("rows of the same words, speaker and length", self._text_hashes, remedy)
        if self._rows == 0:
            self._note("no rows", str(self.path), "fine only for a store that is never drawn from")
            return
        for split in ("train", "validation"):
            if not self._splits[split]:
                self._note(
                    f"no rows in the split {split!r}", ", ".join(map(repr, self._splits)), "give rows that split"
                )
        if others := sorted(self._splits.keys() - {"", *SPLITS}):
            counts = ", ".join(f"{split!r}: {self._splits[split]} rows" for split in others)
            self._note("splits that training never draws from", counts, "prepare with --split NAME=validation")
        if self._splits[""]:
            self._note(
                "rows without a split", f"{self._splits['']} of {self._rows}", "give them one: they are never drawn"
            )
        if self._paired and not self._aligned:
            self._note("no word times", f"{self._paired} rows with text and speech", "align them, to interleave them")

    def _twice(self, kind: str, hashes: array, remedy: str, *, is_fault: bool = False) -> None:
        values = np.frombuffer(hashes, dtype=np.uint64)
        order = values.argsort(kind="stable")
        order = order[values[order] != 0]
        is_same = values[order[1:]] == values[order[:-1]]
        pairs = np.stack([order[:-1][is_same], order[1:][is_same]], axis=1)
        splits = np.frombuffer(self._row_splits, dtype=np.uint8)
        is_leak = splits[pairs[:, 0]] != splits[pairs[:, 1]]
        for name, chosen in ((kind, pairs[~is_leak]), (f"{kind}, in two splits", pairs[is_leak])):
            for number, (first, second) in enumerate(chosen[:_NUM_EXAMPLES]):
                count = len(chosen) if number == 0 else 0
                example = " = ".join(self._place(int(row)) for row in (first, second))
                self._add(name, example, remedy, is_fault=is_fault, count=count)

    def _place(self, row: int) -> str:
        """Id and shard of a row by its number."""
        for file, num_rows in self._shard_rows:
            if row < num_rows:
                return f"{pq.read_table(self.path / file, columns=['id'])['id'][row].as_py()} ({file})"
            row -= num_rows
        raise IndexError(row)

    def report(self) -> StoreReport:
        """Everything that was found, faults first."""
        findings = [
            Finding(kind, found.is_fault, found.count, tuple(found.examples), found.remedy)
            for kind, found in self._found.items()
        ]
        spreads = {
            name: Spread(*(float(q) for q in np.percentile(np.frombuffer(values, dtype=np.float32), (1, 50, 99))))
            for name, values in self._numbers.items()
            if values
        }
        return StoreReport(
            path=str(self.path),
            rows=self._rows,
            splits=dict(sorted(self._splits.items())),
            hours=self._seconds / 3600,
            words=self._words,
            units=self._units,
            units_used=int((self._unit_counts > 0).sum()),
            spreads=spreads,
            findings=tuple(sorted(findings, key=lambda finding: not finding.is_fault)),
        )


def _utterances(batch: pa.RecordBatch) -> Iterator[Utterance]:
    """The rows of a batch, decoded by Arrow."""
    columns = {name: batch.column(name) for name in SCHEMA.names}
    lists = {name: (columns[name].offsets.to_numpy(), columns[name].values.to_numpy()) for name in LIST_TYPES}
    for row in range(len(batch)):
        fields: dict[str, Any] = {}
        for name, column in columns.items():
            if name not in lists or not column[row].is_valid:
                fields[name] = column[row].as_py()
            else:
                offsets, values = lists[name]
                fields[name] = values[offsets[row] : offsets[row + 1]]
        yield Utterance(**fields)


def _shard(entry: Any) -> Shard | None:
    """An entry of a manifest, None when it is not one; a file of another folder is not one."""
    try:
        shard = Shard(**entry)
    except TypeError:
        return None
    types = (shard.file, str), (shard.rows, int), (shard.bytes, int), (shard.sha256, str)
    if not all(isinstance(value, type_) for value, type_ in types) or Path(shard.file).name != shard.file:
        return None
    return shard


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) or 1


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
