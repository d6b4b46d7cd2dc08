"""Checkpoints of a run: written aside in the background, renamed when whole, resumed exactly.

The format is that of `torch.distributed.checkpoint`: what one number of ranks has written, another can read.
"""

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict
from torch.optim import Optimizer

from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.training.distributed import Ranks

STATE_FILE = "state.json"

# One process alone is what is meant then.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass
class RunState:
    """Where a run stands. Data order needs no state: a batch is a function of seed and step.

    Args:
        step: steps done over all stages.
        recipe_fingerprint: fingerprint of the recipe that is run.
        recipe: what of the recipe decides, to say what was changed.
        tokens: tokens seen.
        flops: training FLOPs spent.
        skipped_steps: steps skipped for a loss or gradient that was not finite.
        seconds: time spent training, over all starts.
        backbone_text_loss: validation loss on text of the untouched text LM, None without such rows.
        validation_rows: how many rows that was measured on.
    """

    step: int
    recipe_fingerprint: str
    recipe: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    flops: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    backbone_text_loss: float | None = None
    validation_rows: int | None = None


class Checkpointer:
    """Writes the checkpoints of a run while it goes on, one at a time.

    Args:
        folder: where `step-…` folders go.
        ranks: the processes that write together.
        keep_last: how many checkpoints stay.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep_last: int) -> None:
        self.folder, self.ranks, self.keep_last = folder, ranks, keep_last
        self._pending: tuple[Future[None], int] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # Writers agree on their plan in the background: not among the collectives of the training itself.
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None

    def save(self, state: RunState, model: SmolTolkForCausalLM, optimizer: Optimizer) -> None:
        """Copies weights and optimizer, and writes the copy in the background; waits for the one before.

        A step that has a checkpoint already is not written again.

        Raises:
            OSError: the checkpoint before could not be written; earlier ones are intact.
        """
        self.wait()
        if self.ranks.share(self._final(state.step).exists()):
            return
        is_fresh = not optimizer.state  # every step of the stage so far was skipped
        weights, moments = get_state_dict(model, optimizer)
        if is_fresh:  # torch has made its state by a step, which must not count
            for moment in optimizer.state.values():
                moment["step"].zero_()
        copy = BlockingAsyncStager().stage({"model": weights, "optimizer": moments})
        self._pending = self._thread.submit(self._write, copy, replace(state)), state.step

    @property
    def has_failed(self) -> bool:
        """Whether the checkpoint in work, if any, has failed on this rank; `wait` on all ranks says why."""
        return self._pending is not None and self._pending[0].done() and self._pending[0].exception() is not None

    def wait(self) -> None:
        """Waits until the checkpoint in work, if any, is whole and visible.

        Raises:
            OSError: it could not be written; raised on all ranks, whichever failed.
        """
        if self._pending is None:
            return
        (future, step), self._pending = self._pending, None
        error = ""
        try:
            future.result()
        except dcp.api.CheckpointException as failure:
            error = "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in failure.failures.items())
        except (OSError, RuntimeError) as failure:  # a full disk is any of these
            error = str(failure) or type(failure).__name__
        [failures] = self.ranks.sum(bool(error))
        if failures:
            raise self._failure(step, error or "another rank could not write")

    def close(self) -> None:
        """Lets the checkpoint in work, if any, come to its end, so that nothing is written after an error.

        Of several ranks each would wait for the others, who may be gone: there the end of the process is the end.
        """
        if self._pending is not None and self.ranks.size == 1:
            wait_for([self._pending[0]])

    def remove_leftovers(self) -> None:
        """Removes what a run that was killed has left half-written, or half-removed; by the main rank, at the start."""
        if self.ranks.is_main:
            for leftover in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover)

    def _write(self, copy: dict[str, Any], state: RunState) -> None:
        """Writes a checkpoint and makes it visible, in the background.

        `dcp.save` returns when all ranks have written their files, or raises on all of them: the coordinator, which is
        the main rank, hears from each rank before it writes the metadata, and each waits for its word
        (`_DistWrapper.all_reduce` in torch 2.11 to 2.13). So nothing is left to agree on before it is made visible.
        """
        aside = self._aside(state.step)
        dcp.save(copy, checkpoint_id=aside, no_dist=self._group is None, process_group=self._group)
        if not self.ranks.is_main:
            return
        with (aside / STATE_FILE).open("w", encoding="utf-8") as file:
            json.dump(asdict(state), file)
            file.flush()
            os.fsync(file.fileno())  # as the other files are: whole also when the power goes after the renaming
        aside.rename(self._final(state.step))
        for old in list_checkpoints(self.folder)[: -self.keep_last]:
            doomed = self._aside(int(old.name.removeprefix("step-")))
            old.rename(doomed)  # else a kill would leave a part of it where whole ones are
            shutil.rmtree(doomed)

    def _final(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _aside(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.tmp"

    def _failure(self, step: int, error: object) -> OSError:
        if self.ranks.is_main:
            shutil.rmtree(self._aside(step), ignore_errors=True)
        return OSError(
            f"the checkpoint {self._final(step)} could not be written ({error}): earlier "
            "checkpoints are intact; make room and run the same command to go on"
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_state(checkpoint: Path) -> RunState:
    """Reads where the run stood.

    Raises:
        ValueError: the checkpoint was changed after it was written.
    """
    try:
        return RunState(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, error) from error


def load_checkpoint(checkpoint: Path, model: SmolTolkForCausalLM, optimizer: Optimizer, *, with_moments: bool) -> None:
    """Loads weights, and the optimizer's moments if wanted, in place.

    Raises:
        ValueError: the checkpoint was changed after it was written.
    """
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments} if with_moments else {"model": weights}
    try:
        dcp.load(state, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
    except dcp.api.CheckpointException as failure:
        causes = "; ".join(str(cause) for cause, _ in failure.failures.values())
        raise _damaged(checkpoint, causes) from failure
    if with_moments:
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    else:
        set_model_state_dict(model, weights)


def _damaged(checkpoint: Path, error: object) -> ValueError:
    return ValueError(
        f"the checkpoint {checkpoint} is not as it was written ({error}): remove it, and the run goes on from the one "
        "before"
    )
