"""Preparation: from recordings and transcripts to a store.

The rows of the source are worked on in fixed blocks; each becomes one shard. While the work goes on, the
output folder holds, beside the finished shards,

    prepare.json    what is prepared with what: a later start must agree with it
    blocks/         a record for each finished block: its shard, its counts, and what was quarantined

and when all blocks are there, the records are put together to `quarantine.jsonl` and to the manifest that
makes the folder a store. So a killed preparation goes on where it was, and its store is the same byte for
byte.
"""

import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits
from transformers import PreTrainedTokenizerBase

from smoltolk.data.sources import SourceRow, read_rows
from smoltolk.data.store import MANIFEST, ROWS_PER_SHARD, Shard, lock, write_manifest, write_shard
from smoltolk.data.text import encode_words, tokenizer_fingerprint
from smoltolk.data.utterance import FORMAT_VERSION, StoreMetadata, Utterance, check_utterance
from smoltolk.speech.audio import load_audio, write_atomically
from smoltolk.speech.units import SpeechTokenizer

SETTINGS = "prepare.json"
QUARANTINE = "quarantine.jsonl"
BLOCKS = "blocks"


@dataclass(frozen=True)
class PrepareSummary:
    """What a preparation made.

    Args:
        utterances: number of utterances in the store.
        splits: number of utterances in each split.
        quarantined: number of rows in `quarantine.jsonl`.
        unaligned: utterances with text and speech but without word times: they serve as speech and as text,
            but are never interleaved.
        words: number of written words.
        units: number of speech units.
        seconds: length of all audio.
    """

    utterances: int
    splits: dict[str, int]
    quarantined: int
    unaligned: int
    words: int
    units: int
    seconds: float

    @property
    def hours(self) -> float:
        """Length of all audio in hours."""
        return self.seconds / 3600

    @property
    def units_per_s(self) -> float:
        """Speech units for each second of audio, 0 without audio."""
        return self.units / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class _Job:
    """Everything a block needs besides its rows; sent once to each worker."""

    output: Path
    source_folder: Path
    metadata: StoreMetadata
    text_tokenizer: PreTrainedTokenizerBase | None
    speech_tokenizer: SpeechTokenizer | None
    validation_share: float


def prepare(
    source: str | Path,
    output: str | Path,
    *,
    speech_tokenizer: SpeechTokenizer | None,
    text_tokenizer: PreTrainedTokenizerBase | None,
    validation_share: float = 0.0,
    rows_per_shard: int = ROWS_PER_SHARD,
    workers: int = 1,
    progress: bool = True,
) -> PrepareSummary:
    """Make a store from a manifest or a folder.

    A manifest is JSONL or CSV with the columns "audio" and "text" (one of them may be missing or empty) and,
    where wanted, "id", "word_ends_s" (a JSON list), "speaker" and "split"; audio paths are relative to it. In
    a folder every audio file is a row, with the text of the .txt file of the same stem beside it; a .txt file
    without audio is a row of text.

    A row that cannot be used goes to `quarantine.jsonl` (id, source, reason) and changes no other row. Word
    times are never guessed: text and audio without them are kept, but not interleaved.

    Stopped at any point, by Ctrl-C or worse, it goes on where it was when called again in the same way.

    Args:
        source: a .jsonl or .csv file, or a folder.
        output: folder of the store.
        speech_tokenizer: turns audio into units; may be None for a source without audio.
        text_tokenizer: a fast tokenizer; may be None for a source without text.
        validation_share: share of the rows that become the split "validation", drawn from each row's id; the
            others are "train". Rows that name their split keep it.
        rows_per_shard: rows in a block, the most that a kill can lose per worker.
        workers: number of local processes.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the source cannot be read, a setting is out of range, a tokenizer is missing, or the
            output was begun with other settings.
        OSError: the output cannot be written; names the path.
    """
    source, output = Path(source), Path(output)
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}: give 1 or more")
    if workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}: give a share from 0 to less than 1")
    num_rows, sha256 = _scan(source, text_tokenizer is not None, speech_tokenizer is not None)
    metadata = StoreMetadata(
        None if text_tokenizer is None else tokenizer_fingerprint(text_tokenizer),
        None if speech_tokenizer is None else speech_tokenizer.card(),
    )
    settings = {
        "format_version": FORMAT_VERSION,
        "source_rows": num_rows,
        "source_sha256": sha256,
        "text_tokenizer_fingerprint": metadata.text_tokenizer_fingerprint,
        "speech_tokenizer": metadata.speech_tokenizer,
        "validation_share": validation_share,
        "rows_per_shard": rows_per_shard,
    }
    source_folder = source if source.is_dir() else source.parent
    job = _Job(output, source_folder, metadata, text_tokenizer, speech_tokenizer, validation_share)
    with lock(output):
        _agree_on_settings(output, settings)
        if (output / MANIFEST).exists():
            shutil.rmtree(output / BLOCKS, ignore_errors=True)
            return PrepareSummary(**json.loads((output / SETTINGS).read_text())["summary"])
        (output / BLOCKS).mkdir(exist_ok=True)
        columns = (TextColumn("prepare"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("prepare", total=num_rows)
            blocks = _missing_blocks(read_rows(source), rows_per_shard, output, lambda rows: bar.advance(task, rows))
            if workers == 1:
                for number, rows in blocks:
                    _prepare_block(job, number, rows, on_row=lambda: bar.advance(task))
            else:
                _run_workers(job, blocks, workers, lambda rows: bar.advance(task, rows))
        return _finish(output, settings, num_blocks=math.ceil(num_rows / rows_per_shard))


def _scan(source: Path, has_text_tokenizer: bool, has_speech_tokenizer: bool) -> tuple[int, str]:
    """Read all rows once before any work: their number and hash; refuses what would fail everywhere."""
    sha256 = hashlib.sha256()
    sources: dict[str, str] = {}
    for row in read_rows(source):
        sha256.update(json.dumps(asdict(row)).encode())
        if row.id in sources:
            raise ValueError(
                f"{source} has the id {row.id!r} twice ({sources[row.id]} and {row.source}): give every row its own"
            )
        sources[row.id] = row.source
        if row.text is not None and not has_text_tokenizer:
            raise ValueError(f"{row.source} has text, but text_tokenizer is None: give a text tokenizer")
        if row.audio is not None and not has_speech_tokenizer:
            raise ValueError(f"{row.source} has audio, but speech_tokenizer is None: give a speech tokenizer")
    if not sources:
        raise ValueError(f"source {source} has no rows: give a manifest with rows, or a folder with audio or .txt")
    return len(sources), sha256.hexdigest()


def _agree_on_settings(output: Path, settings: dict[str, Any]) -> None:
    """Write down the settings of a new preparation; refuse others for one that was begun."""
    path = output / SETTINGS
    if not path.exists():
        if (output / MANIFEST).exists():
            raise ValueError(f"output {output} holds a store already: delete it, or choose another folder")
        _write_json(path, settings)
        return
    begun = json.loads(path.read_text())
    differing = [name for name, value in json.loads(json.dumps(settings)).items() if begun.get(name) != value]
    if differing:
        changes = "; ".join(f"{name} was {begun.get(name)!r}, is {settings[name]!r}" for name in differing)
        raise ValueError(
            f"output {output} was begun with other settings ({changes}): "
            f"use the same ones, delete it, or choose another folder"
        )


def _missing_blocks(
    rows: Iterator[SourceRow], rows_per_shard: int, output: Path, on_done: Callable[[int], None]
) -> Iterator[tuple[int, list[SourceRow]]]:
    """The blocks of rows whose shard or record is not there; `on_done` gets the rows of the others."""
    number = 0
    while block := list(islice(rows, rows_per_shard)):
        record = _block_record(output, number)
        shard = Shard(**json.loads(record.read_text())["shard"]) if record.exists() else None
        path = None if shard is None else output / shard.file
        if shard and path and path.exists() and path.stat().st_size == shard.bytes:
            on_done(len(block))
        else:
            yield number, block
        number += 1


def _prepare_block(
    job: _Job, number: int, rows: list[SourceRow], *, on_row: Callable[[], object] = lambda: None
) -> int:
    """Prepare one block: write its shard, then its record. Returns its number of rows."""
    utterances, quarantined = [], []
    for row in rows:
        try:
            utterance = _prepare_row(job, row)
            check_utterance(utterance, job.metadata)
        except ValueError as error:
            quarantined.append({"id": row.id, "source": row.source, "reason": str(error)})
        else:
            utterances.append(utterance)
        on_row()
    shard = write_shard(job.output, number, utterances, job.metadata)
    record = {
        "shard": asdict(shard),
        "splits": Counter(utterance.split for utterance in utterances),
        "words": sum(len(utterance.array("word_token_counts")) for utterance in utterances if utterance.has_text),
        "units": sum(len(utterance.array("units")) for utterance in utterances if utterance.has_speech),
        "seconds": sum(utterance.seconds or 0.0 for utterance in utterances),
        "unaligned": sum(u.has_text and u.has_speech and not u.is_aligned for u in utterances),
        "quarantined": quarantined,
    }
    _write_json(_block_record(job.output, number), record)
    return len(rows)


def _prepare_row(job: _Job, row: SourceRow) -> Utterance:
    """Read and tokenize one row.

    Raises:
        ValueError: the row cannot be used; the reason for the quarantine.
    """
    if row.error is not None:
        raise ValueError(row.error)
    halves: dict[str, Any] = {}
    if row.text is not None and job.text_tokenizer is not None:
        halves["text"] = row.text
        halves["text_ids"], halves["word_token_counts"] = encode_words(job.text_tokenizer, row.text)
    if row.audio is not None and job.speech_tokenizer is not None:
        sample_rate_hz = job.speech_tokenizer.sample_rate_hz
        audio = load_audio(job.source_folder / row.audio, sample_rate_hz=sample_rate_hz)
        units = job.speech_tokenizer.encode(audio)
        halves["units"], halves["unit_durations"] = units.units, units.durations
        halves["seconds"] = len(audio) / sample_rate_hz
    if row.word_ends_s is not None:
        halves["word_ends_s"] = np.array(row.word_ends_s, dtype=np.float32)
    return Utterance(
        id=row.id,
        speaker=row.speaker,
        source=row.source,
        split=row.split or _draw_split(row.id, job.validation_share),
        **halves,
    )


def _draw_split(utterance_id: str, validation_share: float) -> str:
    """A split by the hash of the id alone: it stays the same when other rows come or go."""
    point = int.from_bytes(hashlib.sha256(utterance_id.encode()).digest()[:8]) / 2**64
    return "validation" if point < validation_share else "train"


_worker_job: _Job  # set once in each worker process


def _start_worker(job: _Job) -> None:
    global _worker_job
    _worker_job = job
    threadpool_limits(1)  # a process a core: NumPy's threads would only get in their way
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's: it stops the pool
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when the main process was killed; the pool itself would leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, rows: list[SourceRow]) -> int:
    return _prepare_block(_worker_job, number, rows)


def _run_workers(
    job: _Job, blocks: Iterator[tuple[int, list[SourceRow]]], workers: int, on_rows: Callable[[int], object]
) -> None:
    """Prepare blocks in local processes, a few blocks ahead of them at most."""
    # Spawned, not forked: tokenizers and Arrow run threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    running: set[Future[int]] = set()
    try:
        for number, rows in blocks:
            running.add(pool.submit(_work, number, rows))
            if len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                on_rows(sum(future.result() for future in done))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            on_rows(sum(future.result() for future in done))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process ended without a word, perhaps for lack of memory: "
            "start again with fewer workers; finished blocks are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # blocks in work are finished, waiting ones are dropped


def _finish(output: Path, settings: dict[str, Any], num_blocks: int) -> PrepareSummary:
    """Put the records of all blocks together; the manifest comes last."""
    records = [json.loads(_block_record(output, number).read_text()) for number in range(num_blocks)]
    quarantined = [entry for record in records for entry in record["quarantined"]]
    splits: Counter[str] = Counter()
    for record in records:
        splits.update(record["splits"])
    summary = PrepareSummary(
        utterances=sum(record["shard"]["rows"] for record in records),
        splits=dict(sorted(splits.items())),
        quarantined=len(quarantined),
        unaligned=sum(record["unaligned"] for record in records),
        words=sum(record["words"] for record in records),
        units=sum(record["units"] for record in records),
        seconds=sum(record["seconds"] for record in records),
    )
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in quarantined)
    write_atomically(output / QUARANTINE, lines.encode())
    _write_json(output / SETTINGS, settings | {"summary": asdict(summary)})
    write_manifest(output, [Shard(**record["shard"]) for record in records])
    shutil.rmtree(output / BLOCKS)
    return summary


def _block_record(output: Path, number: int) -> Path:
    return output / BLOCKS / f"{number:05d}.json"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
