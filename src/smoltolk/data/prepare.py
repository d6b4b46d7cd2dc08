"""Preparation: from recordings and transcripts to a store.

The rows of the source are worked on in pieces (`smoltolk.data.sources`), by one of the engines
(`smoltolk.data.engines`), in blocks that each become a shard (`smoltolk.data.blocks`). What is finished is never done
again (`smoltolk.data.work_folder`): a killed preparation goes on where it was, and its store is the same byte for
byte, in one process or on many machines.
"""

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from smoltolk.data.blocks import BATCH_S, Preparer
from smoltolk.data.corpora import open_source
from smoltolk.data.engines import Job, run_here, run_processes, run_ray
from smoltolk.data.sources import Piece, Scan, Source
from smoltolk.data.store import ROWS_PER_SHARD
from smoltolk.data.summary import PrepareSummary, read_summary
from smoltolk.data.text import tokenizer_fingerprint
from smoltolk.data.utterance import FORMAT_VERSION, StoreMetadata
from smoltolk.data.work_folder import WorkFolder
from smoltolk.speech.alignment import Aligner
from smoltolk.speech.audio import check_output
from smoltolk.speech.units import SpeechTokenizer
from smoltolk.terminal import progress_bar

_PIECES = 16  # at least, of sources that have as many rows


def prepare(
    source: str | Path | Source,
    output: str | Path,
    *,
    speech_tokenizer: SpeechTokenizer | None,
    text_tokenizer: PreTrainedTokenizerBase | None,
    aligner: Aligner | None = None,
    validation_share: float = 0.0,
    rows_per_shard: int | None = None,
    batch_s: float = BATCH_S,
    device: str | None = None,
    dtype: str = "float32",
    workers: int = 1,
    engine: Literal["local", "ray"] = "local",
    gpus_per_worker: float = 0.0,
    part: tuple[int, int] = (1, 1),
    join: Sequence[str | Path] = (),
    progress: bool = True,
) -> PrepareSummary | None:
    """Make a store from a source.

    A row that cannot be used goes to `quarantine.jsonl` (id, source, reason) and changes no other row. Word
    times are never guessed: without an aligner, text and audio without them are kept, but not interleaved; with one,
    rows whose words it cannot find go to the quarantine.

    Stopped at any point, by Ctrl-C or worse, it goes on where it was when called again in the same way.

    Several machines share the work when each does a part of it, (1, n) to (n, n). With one output folder for all,
    the last part to end makes the store. With a folder each, a last call joins them: `join` names the folders.

    Args:
        source: a `Source`, or what `open_source` takes: a manifest, a folder, the name of a corpus or dataset.
        output: folder of the store.
        speech_tokenizer: turns audio into units; may be None for a source without audio.
        text_tokenizer: a fast tokenizer; may be None for a source without text.
        aligner: finds word times for rows with text and audio but without them.
        validation_share: share of the rows that become the split "validation", drawn from each row's id; the
            others are "train". Rows that name their split keep it.
        rows_per_shard: rows in a block, the most that a kill can lose per worker; by default 2,048, or a sixteenth
            of a smaller source, so that several workers or machines have something to do.
        batch_s: audio in seconds that is encoded together; the result does not depend on it.
        device: where a neural speech tokenizer runs, in each worker; by default where it is.
        dtype: what it computes in there: "float32", "bfloat16" or "float16".
        workers: number of local processes, or of Ray actors.
        engine: "local" for processes on this machine, "ray" for Ray.
        gpus_per_worker: GPUs for each Ray actor.
        part: which part of how many, counted from 1.
        join: output folders of parts whose finished blocks are taken over.
        progress: whether to show a progress bar.

    Returns:
        The summary, or None when this part is done but others are not.

    Raises:
        ValueError: the source cannot be read, a setting is out of range, a tokenizer is missing, the output was
            begun with other settings, or a file has changed since its rows were prepared.
        OSError: the output cannot be written; names the path.
        ImportError: an extra is needed that is not installed.
    """
    _check_settings(validation_share, rows_per_shard, batch_s, workers, engine, gpus_per_worker, part)
    check_output(Path(output), is_folder=True)
    source = source if isinstance(source, Source) else open_source(source)
    scan = source.scan(rows_per_shard or ROWS_PER_SHARD)
    if rows_per_shard is None:
        rows_per_shard = ROWS_PER_SHARD
        if scan.num_rows is not None and scan.num_rows < _PIECES * ROWS_PER_SHARD:
            rows_per_shard = -(-scan.num_rows // _PIECES)
            scan = source.scan(rows_per_shard)
    if scan.text_in is not None and text_tokenizer is None:
        raise ValueError(
            f"{scan.text_in} has text, but text_tokenizer is None: give a text tokenizer (--text-tokenizer)"
        )
    if scan.audio_in is not None and speech_tokenizer is None:
        raise ValueError(
            f"{scan.audio_in} has audio, but speech_tokenizer is None: give a speech tokenizer (--speech-tokenizer)"
        )
    metadata = StoreMetadata(
        None if text_tokenizer is None else tokenizer_fingerprint(text_tokenizer),
        None if speech_tokenizer is None else speech_tokenizer.card(),
    )
    settings = {
        "format_version": FORMAT_VERSION,
        "source_rows": scan.num_rows,
        "source_sha256": scan.fingerprint,
        "source_pieces": scan.num_pieces,
        "text_tokenizer_fingerprint": metadata.text_tokenizer_fingerprint,
        "speech_tokenizer": metadata.speech_tokenizer,
        "aligner_fingerprint": None if aligner is None else aligner.fingerprint,
        "dtype": dtype,
        "validation_share": validation_share,
        "rows_per_shard": rows_per_shard,
    }
    preparer = Preparer(
        metadata,
        source.audio_folder,
        text_tokenizer,
        speech_tokenizer,
        aligner,
        validation_share,
        batch_s,
        device,
        dtype,
    )
    folder = WorkFolder(Path(output))
    job = Job(preparer, folder, rows_per_shard)
    try:
        with folder.lock(*part):
            folder.agree_on(settings)
            if folder.is_store:
                folder.tidy()
                return read_summary(folder.path)
            for other in join:
                folder.take_over(Path(other))
            folder.refuse_changed_files(range(part[0] - 1, scan.num_pieces, part[1]), source.audio_folder)
            _work(job, source, scan, workers, engine, gpus_per_worker, part, progress)
            if part[1] == 1:
                return folder.finish(scan.num_pieces)
        return _finish_parts(folder, scan.num_pieces)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        reason = f"{error.strerror}; finished blocks are kept, make room and start again"
        raise OSError(error.errno, reason, error.filename) from error


def _check_settings(
    validation_share: float,
    rows_per_shard: int | None,
    batch_s: float,
    workers: int,
    engine: str,
    gpus_per_worker: float,
    part: tuple[int, int],
) -> None:
    if rows_per_shard is not None and rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}: give 1 or more")
    if workers < 1:
        raise ValueError(f"workers is {workers}: give 1 or more")
    if batch_s <= 0:
        raise ValueError(f"batch_s is {batch_s}: give more than 0 seconds")
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share is {validation_share}: give a share from 0 to less than 1")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine is {engine!r}: choose local or ray")
    if gpus_per_worker < 0 or (gpus_per_worker and engine != "ray"):
        raise ValueError(f"gpus_per_worker is {gpus_per_worker}: give 0 or more, and with the engine ray only")
    if not 1 <= part[0] <= part[1]:
        raise ValueError(f"part is {part[0]}/{part[1]}: count parts from 1, as in 3/8")


def _work(
    job: Job,
    source: Source,
    scan: Scan,
    workers: int,
    engine: str,
    gpus_per_worker: float,
    part: tuple[int, int],
    progress: bool,
) -> None:
    """Do the pieces of this part that are missing."""
    mine = {number for number in range(part[0] - 1, scan.num_pieces, part[1]) if not job.folder.is_done(number)}
    if not mine:
        return
    with progress_bar(disable=not progress) as bar:
        total = None if scan.num_rows is None else round(scan.num_rows * len(mine) / scan.num_pieces)
        task = bar.add_task("prepare", total=total)

        def on_rows(rows: int) -> None:
            bar.advance(task, rows)

        def pieces() -> Iterator[tuple[int, Piece]]:
            for number, piece in enumerate(source.pieces(job.rows_per_block)):
                if number in mine:
                    yield number, piece

        if engine == "ray":
            run_ray(job, pieces(), workers, on_rows, gpus_per_worker)
        elif workers == 1:
            run_here(job, pieces(), on_rows)
        else:
            run_processes(job, pieces(), workers, on_rows)


def _finish_parts(folder: WorkFolder, num_pieces: int) -> PrepareSummary | None:
    """Finish the store if all parts are done.

    Every part looks, after it has let the folder go, so the last one of them finds it free.
    """
    if not folder.is_store and not all(folder.is_done(number) for number in range(num_pieces)):
        return None
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder.lock(1, 1))
        except ValueError:  # another part holds it: that one will look after us
            return None
        return read_summary(folder.path) if folder.is_store else folder.finish(num_pieces)
