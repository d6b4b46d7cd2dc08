"""Batches ahead of the training: drawn by other processes, the same ones in the same order."""

import gc
import signal
import threading
import time
from collections.abc import Generator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from smoltolk.data.dataset import Batch, BatchSource
from smoltolk.training.config import Recipe
from smoltolk.training.distributed import Ranks

BATCHES_AHEAD = 2  # per process
CHECK_EVERY_S = 30.0  # what looking costs: some microseconds a shard, or a round trip where the store is on a network


class StepBatches(Dataset[Batch]):
    """A rank's rows of every step of a run.

    Args:
        recipe: the run.
        sources: where the batches of each of its stages come from.
        ranks: the ranks that share a step's rows.
    """

    def __init__(self, recipe: Recipe, sources: Sequence[BatchSource], ranks: Ranks) -> None:
        self.recipe = recipe
        self.sources = sources
        self.ranks = ranks
        self._next_check_s = 0.0

    def __getitem__(self, step: int) -> Batch:
        if get_worker_info() is None or time.monotonic() >= self._next_check_s:
            self.check_files()
            self._next_check_s = time.monotonic() + CHECK_EVERY_S
        index, _ = self.recipe.stage_at(step)
        num_rows = self.recipe.stages[index].rows_per_step // self.ranks.size
        rows = range(self.ranks.rank * num_rows, (self.ranks.rank + 1) * num_rows)
        return self.sources[index].batch(self.recipe.seed, step, rows=rows)

    def check_files(self) -> None:
        """Raises if a file of a store is gone or was changed: reading from a mapped file that was cut kills a process.

        The trainer looks before it draws a batch itself, and when a process that draws ahead has died; such a process
        looks every `CHECK_EVERY_S`.

        Raises:
            ValueError: names the file.
        """
        for store in {store.path: store for source in self.sources for store in source.stores}.values():
            store.check_files()


def load_batches(
    recipe: Recipe, sources: Sequence[BatchSource], ranks: Ranks, first_step: int, num_workers: int
) -> Generator[Batch, None, None]:
    """A rank's batches of all steps of a run from `first_step` on, drawn ahead by `num_workers` processes, if any.

    A batch is a function of seed and step, so nothing has to be kept for a resume, and no number of processes
    changes a batch.

    Raises:
        ValueError: a file of a store is gone or was changed.
        ChildProcessError: a process that draws batches died for another reason.
    """
    batches = StepBatches(recipe, sources, ranks)
    loader = DataLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=range(first_step, recipe.num_steps),
        num_workers=num_workers,
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it draws a number from the global one
    )
    drawn = iter(loader)
    if num_workers and threading.current_thread() is threading.main_thread():
        # torch's handler raises in the midst of a step or of a save when a process dies: without it, it is found dead
        # when its batch is waited for, within seconds.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from drawn
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        if num_workers:
            batches.check_files()  # what a process that died of it could not say
        if not num_workers or str(error).startswith("Caught"):  # so torch hands on what a living process has raised
            raise
        raise ChildProcessError(
            f"a process that drew batches has died ({type(error).__name__}: {error}): run the same command to go on; "
            "if it dies again, it may be short of memory: lower loader_workers"
        ) from error


def _start_worker(_: int) -> None:
    """Ctrl-C reaches every process of a terminal, but the trainer ends its step and saves, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()  # a full collection over all that torch has loaded takes 0.2 s, and finds nothing
