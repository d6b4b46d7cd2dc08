"""Word times for a whole source: a manifest with `word_ends_s` from one with audio and text.

While the work goes on, `OUTPUT.parts` beside the output holds what is aligned with what and a file for each
finished block of rows; at the end they are put together. So a killed run goes on where it was, and its files are
the same byte for byte.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits

from smoltolk.data.sources import SourceRow, read_rows
from smoltolk.data.store import lock
from smoltolk.speech.alignment import Aligner
from smoltolk.speech.audio import load_audio, write_atomically

ROWS_PER_BLOCK = 64
_SETTINGS = "align.json"


@dataclass(frozen=True)
class AlignSummary:
    """What an alignment made.

    Args:
        aligned: rows that got their times.
        kept: rows that have times already, or text or audio alone; they are passed on as they are.
        quarantined: rows that could not be aligned.
        confidence_quantiles: the confidence that 1, 5 and 50 % of the aligned rows do not reach.
    """

    aligned: int
    kept: int
    quarantined: int
    confidence_quantiles: tuple[float, float, float] | None


def confidence_path(output: Path) -> Path:
    """Where the confidence of each aligned row is written: one line of `id` and `alignment_confidence` for each."""
    return output.with_suffix(".confidence.jsonl")


def quarantine_path(output: Path) -> Path:
    """Where the rows that could not be aligned are written, with their reason."""
    return output.with_suffix(".quarantine.jsonl")


def align_source(
    source: str | Path, output: str | Path, aligner: Aligner, *, workers: int = 1, progress: bool = True
) -> AlignSummary:
    """Find the word times of all rows of a source that have audio and text, but no times.

    Writes a JSONL manifest with the rows in their order, and beside it `….confidence.jsonl` and
    `….quarantine.jsonl`. A row that cannot be aligned goes to the quarantine with its reason, and is not in the
    manifest. Audio paths are written relative to the new manifest. Stopped at any point, by Ctrl-C or worse, it
    goes on where it was when called again in the same way.

    Args:
        source: a .jsonl or .csv manifest, or a folder; see `smoltolk.data.sources`.
        output: the new manifest, .jsonl.
        aligner: finds the times.
        workers: number of local processes, each with a model of its own.
        progress: whether to show a progress bar.

    Raises:
        ValueError: the source cannot be read, the output is there already or was begun with other settings, or a
            setting is out of range.
        OSError: the output cannot be written; names the path.
    """
    source, output = Path(source), Path(output)
    if workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more")
    if output.suffix != ".jsonl":
        raise ValueError(f"output is {output}: give a name that ends in .jsonl")
    num_rows, sha256 = _scan(source)
    settings = {"source_sha256": sha256, "aligner": aligner.settings(), "rows_per_block": ROWS_PER_BLOCK}
    parts = output.with_name(output.name + ".parts")
    if output.exists() and not parts.exists():
        raise ValueError(f"output {output} is there already: delete it, or choose another name")
    folder = source if source.is_dir() else source.parent
    job = _Job(aligner, folder, output.parent, parts)
    with lock(parts):
        _agree_on_settings(parts, settings)
        columns = (TextColumn("align"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("align", total=num_rows)
            for rows in _run(job, source, workers):
                bar.advance(task, rows)
        num_blocks = -(-num_rows // ROWS_PER_BLOCK)
        summary = _finish(output, [json.loads(_block_path(parts, number).read_text()) for number in range(num_blocks)])
        shutil.rmtree(parts)
    return summary


@dataclass(frozen=True)
class _Job:
    """Everything a block needs besides its rows; sent once to each worker."""

    aligner: Aligner
    source_folder: Path
    output_folder: Path
    parts: Path


def _scan(source: Path) -> tuple[int, str]:
    """Read all rows once before any work: their number and hash."""
    sha256 = hashlib.sha256()
    ids: set[str] = set()
    for row in read_rows(source):
        sha256.update(json.dumps(asdict(row)).encode())
        if row.id in ids:
            raise ValueError(f"{source} has the id {row.id!r} twice: give every row its own")
        ids.add(row.id)
    if not ids:
        raise ValueError(f"source {source} has no rows: give a manifest with rows, or a folder with audio")
    return len(ids), sha256.hexdigest()


def _agree_on_settings(parts: Path, settings: dict[str, Any]) -> None:
    path = parts / _SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(settings).encode())
    elif json.loads(path.read_text()) != settings:
        raise ValueError(
            f"{parts} was begun with another source or other settings: use the same ones, or delete it to begin anew"
        )


def _block_path(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.json"


def _run(job: _Job, source: Path, workers: int) -> Iterator[int]:
    """Align the blocks that are not there yet; yields numbers of rows as they are done."""
    rows = read_rows(source)
    blocks = enumerate(iter(lambda: list(islice(rows, ROWS_PER_BLOCK)), []))
    if workers == 1:
        for number, block in blocks:
            yield _align_block(job, number, block)
        return
    # Spawned, not forked: models run threads, which do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    running: set[Future[int]] = set()
    try:
        for number, block in blocks:
            running.add(pool.submit(_work, number, block))
            if len(running) >= 2 * workers:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield sum(future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield sum(future.result() for future in done)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process ended without a word, perhaps for lack of memory: "
            "start again with fewer workers; finished blocks are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _align_block(job: _Job, number: int, rows: list[SourceRow]) -> int:
    """Align one block and write its file, unless that is there. Returns its number of rows."""
    path = _block_path(job.parts, number)
    if not path.exists():
        results = [_align_row(job, row) for row in rows]
        write_atomically(path, json.dumps(results, ensure_ascii=False).encode())
    return len(rows)


def _align_row(job: _Job, row: SourceRow) -> dict[str, Any]:
    """The row of the new manifest with its confidence, or the reason why there is none."""
    try:
        if row.error is not None:
            raise ValueError(row.error)
        word_ends_s, confidence = row.word_ends_s, None
        if row.audio is not None and row.text is not None and word_ends_s is None:
            audio = load_audio(job.source_folder / row.audio, sample_rate_hz=job.aligner.sample_rate_hz)
            alignment = job.aligner.align(audio, row.text)
            word_ends_s = tuple(round(float(end_s), 4) for end_s in alignment.word_ends_s)
            confidence = alignment.confidence
    except ValueError as error:
        return {"quarantined": {"id": row.id, "source": row.source, "reason": str(error)}}
    audio_path = None if row.audio is None else os.path.relpath(job.source_folder / row.audio, job.output_folder)
    fields = {
        "id": row.id,
        "audio": audio_path if audio_path is None or not Path(row.audio or "").is_absolute() else row.audio,
        "text": row.text,
        "word_ends_s": word_ends_s,
        "speaker": row.speaker,
        "split": row.split,
    }
    is_aligned = word_ends_s is not None and row.word_ends_s is None
    return {
        "row": {name: value for name, value in fields.items() if value is not None},
        "is_aligned": is_aligned,
        "confidence": confidence,
    }


def _finish(output: Path, blocks: list[list[dict[str, Any]]]) -> AlignSummary:
    """Put the blocks together; the manifest comes last."""
    results = [result for block in blocks for result in block]
    quarantined = [result["quarantined"] for result in results if "quarantined" in result]
    rows = [result for result in results if "row" in result]
    confidences = [
        {"id": result["row"]["id"], "alignment_confidence": round(result["confidence"], 4)}
        for result in rows
        if result["confidence"] is not None
    ]
    write_atomically(quarantine_path(output), _lines(quarantined))
    write_atomically(confidence_path(output), _lines(confidences))
    write_atomically(output, _lines([result["row"] for result in rows]))
    ranked = sorted(entry["alignment_confidence"] for entry in confidences)
    num_aligned = sum(result["is_aligned"] for result in rows)
    return AlignSummary(
        aligned=num_aligned,
        kept=len(rows) - num_aligned,
        quarantined=len(quarantined),
        confidence_quantiles=(
            (ranked[len(ranked) // 100], ranked[len(ranked) // 20], ranked[len(ranked) // 2]) if ranked else None
        ),
    )


def _lines(entries: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries).encode()


_worker_job: _Job  # set once in each worker process


def _start_worker(job: _Job) -> None:
    global _worker_job
    _worker_job = job
    threadpool_limits(1)  # a process a core: more threads would only get in their way
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's: it stops the pool
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when the main process was killed; the pool itself would leave it waiting for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, rows: list[SourceRow]) -> int:
    return _align_block(_worker_job, number, rows)
