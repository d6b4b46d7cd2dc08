"""Engines: who works on the pieces of a source. Whoever does, the blocks that are written are the same.

`run_here` is this process, `run_processes` local processes, and `run_ray` a pool of Ray actors, which may be on other
machines that see the same output folder.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from threadpoolctl import threadpool_limits

from smoltolk.data.blocks import Preparer, blocks_of
from smoltolk.data.sources import Piece, SourceRow
from smoltolk.data.work_folder import WorkFolder

_REPORT_EVERY_S = 0.5
OnRows = Callable[[int], object]
Work = Iterable[tuple[int, Piece]]


@dataclass(frozen=True)
class Job:
    """What is sent once to each worker.

    Args:
        preparer: does the work.
        folder: where the blocks go.
        rows_per_block: rows of a shard.
    """

    preparer: Preparer
    folder: WorkFolder
    rows_per_block: int

    def do(self, number: int, piece: Piece, on_rows: OnRows) -> None:
        """Make those blocks of a piece that are not there; `on_rows` gets the rows that are done, now and then."""
        report = _Report(on_rows)
        num_blocks = 0
        for block, rows in enumerate(blocks_of(piece.rows(), self.rows_per_block)):
            if self.folder.rows_done(number, block) is None:
                content = self.preparer.prepare(rows, on_row=report.one)
                self.folder.write_block(number, block, content, self.preparer.metadata)
            else:
                report.all(rows)
            num_blocks += 1
        self.folder.finish_piece(number, num_blocks)
        report.flush()


class _Report:
    """Counts rows, and tells of them twice a second."""

    def __init__(self, on_rows: OnRows) -> None:
        self._on_rows, self._rows, self._told = on_rows, 0, time.monotonic()

    def one(self) -> None:
        self._rows += 1
        if time.monotonic() - self._told > _REPORT_EVERY_S:
            self.flush()

    def all(self, rows: Iterator[SourceRow]) -> None:
        for _ in rows:
            self.one()

    def flush(self) -> None:
        self._on_rows(self._rows)
        self._rows, self._told = 0, time.monotonic()


def run_here(job: Job, work: Work, on_rows: OnRows) -> None:
    """Work in this process."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in any other engine: the units of a network may depend on it
    try:
        with threadpool_limits(1):
            job.preparer.start()
            for number, piece in work:
                job.do(number, piece, on_rows)
    finally:
        torch.set_num_threads(num_threads)


def run_processes(job: Job, work: Work, workers: int, on_rows: OnRows) -> None:
    """Work in local processes, each with its own pipe.

    Raises:
        ChildProcessError: a process was killed, or broke down.
        ValueError, OSError, ImportError, RuntimeError: what went wrong in a process.
    """
    # Not concurrent.futures: when a worker is killed while it starts, its pool can wait for ever. A pipe of which
    # the worker holds the only other end breaks at once.
    context = multiprocessing.get_context("spawn")  # tokenizers and Arrow run threads, which do not survive a fork
    pending = iter(work)
    crew: dict[Connection, Any] = {}  # pipe to process and first task
    task: tuple[int, Piece] | None
    try:
        for task in pending:  # no more workers than pieces
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            crew[ours] = (process, task)
            if len(crew) == workers:
                break
        while crew:
            for connection in wait(list(crew)):
                assert isinstance(connection, Connection)
                process, first = crew[connection]
                try:
                    message = connection.recv()
                    if isinstance(message, int):
                        on_rows(message)
                        continue
                    if isinstance(message, Exception):
                        raise message
                    if message == "started":
                        connection.send(job)
                        task = first
                    else:
                        task = next(pending, None)
                    connection.send(task)
                except (EOFError, ConnectionError) as error:
                    process.join()
                    raise ChildProcessError(
                        f"a worker process ended without a word (exit code {process.exitcode}), perhaps for "
                        f"lack of memory: start again, with fewer workers if so; finished blocks are kept"
                    ) from error
                if task is None:
                    process.join()
                    del crew[connection]
    finally:
        for process, _ in crew.values():
            process.terminate()
            process.join()


def _serve(connection: Connection) -> None:
    """A worker process: pieces come, numbers of rows and "done" go, until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's, which ends the workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _one_thread()
    connection.send("started")
    job = connection.recv()
    assert isinstance(job, Job)
    try:
        job.preparer.start()
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # such as a device that is not there
        connection.send(error)
        return
    while (task := connection.recv()) is not None:
        try:
            number, piece = task
            job.do(number, piece, connection.send)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            connection.send(error)  # raised again in the main process
            return
        connection.send("done")


def _exit_with_parent() -> None:
    """End this worker when the main process was killed, even in the middle of a block."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _one_thread() -> None:
    """A process for each core: more threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)
    threadpool_limits(1)


def run_ray(job: Job, work: Work, workers: int, on_rows: OnRows, gpus_per_worker: float = 0.0) -> None:
    """Work in Ray actors, each with the tokenizers loaded once.

    Starts a Ray of its own on this machine, unless `RAY_ADDRESS` names a cluster or the program is connected to one.
    All machines have to see the output folder, and the audio, at the same paths.

    Raises:
        ImportError: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray needs Ray: pip install 'smoltolk[ray]'") from error

    # Compressed, since all pieces wait in memory: 20 million rows take a few gigabytes.
    items = [{"piece": zlib.compress(pickle.dumps(task), 1)} for task in work]
    if not items:
        return
    is_own = not ray.is_initialized()
    if is_own and "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False)
    elif is_own:
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    try:
        done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=gpus_per_worker or None,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])  # noqa: S301 (of our own actor)
            on_rows(int(row["rows"]))
    finally:
        if is_own:
            ray.shutdown()


class _Actor:
    """A Ray actor: gets pieces, gives their numbers of rows or what went wrong."""

    def __init__(self, job: Job) -> None:
        _one_thread()
        self._job = job
        job.preparer.start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        counts: list[int] = []
        error = b""
        try:
            number, piece = pickle.loads(zlib.decompress(batch["piece"][0]))  # noqa: S301
            self._job.do(number, piece, counts.append)
        except (
            ValueError,
            OSError,
            ImportError,
            RuntimeError,
        ) as wrong:  # Ray would repeat and hide it
            error = pickle.dumps(wrong)
        return {"rows": [sum(counts)], "error": [error]}
