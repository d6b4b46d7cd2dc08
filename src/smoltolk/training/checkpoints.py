"""Checkpoints of a run: written aside in the background, renamed when whole, resumed exactly.

The format is that of `torch.distributed.checkpoint`: what one number of ranks has written, another can read.
"""

import json
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
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
        tokens: tokens seen.
        flops: training FLOPs spent.
        skipped_steps: steps skipped for a loss or gradient that was not finite.
        seconds: time spent training, over all starts.
        backbone_text_loss: validation loss on text of the untouched text LM, None without such rows.
    """

    step: int
    recipe_fingerprint: str
    tokens: int = 0
    flops: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0
    backbone_text_loss: float | None = None


class Checkpointer:
    """Writes the checkpoints of a run while it goes on, one at a time.

    Args:
        folder: where `step-…` folders go.
        ranks: the processes that write together.
        keep_last: how many checkpoints stay.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep_last: int) -> None:
        self.folder, self.ranks, self.keep_last = folder, ranks, keep_last
        self._pending: tuple[Future[Any], RunState] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        # Writers agree on their plan in the background: not among the collectives of the training itself.
        self._group = dist.new_group(backend="gloo") if ranks.size > 1 else None

    def save(self, state: RunState, model: SmolTolkForCausalLM, optimizer: Optimizer) -> None:
        """Copies weights and optimizer, and writes the copy in the background; waits for the one before.

        Raises:
            OSError: the checkpoint before could not be written; earlier ones are intact.
        """
        self.wait()
        aside = self._aside(state.step)
        if self.ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        self.ranks.share(None)  # nobody writes before it is gone
        weights, moments = get_state_dict(model, optimizer)
        copy = BlockingAsyncStager().stage({"model": weights, "optimizer": moments})
        write = partial(dcp.save, copy, checkpoint_id=aside, no_dist=self._group is None, process_group=self._group)
        self._pending = self._thread.submit(write), replace(state)

    def finish_if_done(self) -> None:
        """Makes a checkpoint visible that has been written meanwhile; does not wait. For one rank alone.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is not None and self.ranks.size == 1 and self._pending[0].done():
            self.wait()

    def wait(self) -> None:
        """Waits until the checkpoint in work is whole and visible, and removes all but the last few.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is None:
            return
        (future, state), self._pending = self._pending, None
        error = ""
        try:
            future.result()
            if self.ranks.is_main:
                self._publish(state)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as failure:  # a full disk is any of these
            error = str(failure) or type(failure).__name__
        [failures] = self.ranks.sum(bool(error))
        if failures:
            raise self._failure(state.step, error or "another rank could not write")

    def _publish(self, state: RunState) -> None:
        aside, final = self._aside(state.step), self.folder / f"step-{state.step:08d}"
        (aside / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in list_checkpoints(self.folder)[: -self.keep_last]:
            shutil.rmtree(old)

    def _aside(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}.tmp"

    def _failure(self, step: int, error: object) -> OSError:
        if self.ranks.is_main:
            shutil.rmtree(self._aside(step), ignore_errors=True)
        return OSError(
            f"the checkpoint {self.folder / f'step-{step:08d}'} could not be written ({error}): earlier "
            "checkpoints are intact; make room and run the same command to go on"
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_state(checkpoint: Path) -> RunState:
    """Reads where the run stood."""
    fields: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return RunState(**fields)


def load_checkpoint(checkpoint: Path, model: SmolTolkForCausalLM, optimizer: Optimizer, *, with_moments: bool) -> None:
    """Loads weights, and the optimizer's moments if wanted, in place."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments} if with_moments else {"model": weights}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
    if with_moments:
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    else:
        set_model_state_dict(model, weights)
