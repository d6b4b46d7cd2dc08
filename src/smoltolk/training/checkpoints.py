"""Checkpoints of a run: written aside, renamed when whole, resumed exactly."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM

STATE_FILE, MODEL_FILE, OPTIMIZER_FILE = "state.json", "model.safetensors", "optimizer.pt"


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
    """

    step: int
    recipe_fingerprint: str
    tokens: int = 0
    flops: int = 0
    skipped_steps: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    state: RunState,
    model: SmolTolkForCausalLM,
    optimizer: torch.optim.Optimizer,
    keep_last: int,
) -> Path:
    """Writes `folder/step-…` and removes all but the last few; a half-written one is never visible."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state.step:08d}"
    aside = folder / f".{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        save_model(model, str(aside / MODEL_FILE))
        torch.save(optimizer.state_dict(), aside / OPTIMIZER_FILE)
        (aside / STATE_FILE).write_text(json.dumps(asdict(state)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(
            f"the checkpoint {final} could not be written ({error}): earlier checkpoints are intact; "
            "make room and run the same command to go on"
        ) from error
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_state(checkpoint: Path) -> RunState:
    """Reads where the run stood."""
    fields: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return RunState(**fields)


def load_checkpoint(checkpoint: Path, model: SmolTolkForCausalLM, optimizer: torch.optim.Optimizer | None) -> None:
    """Loads weights, and the optimizer's state if one is given, in place."""
    load_model(model, str(checkpoint / MODEL_FILE))
    if optimizer is not None:
        optimizer.load_state_dict(torch.load(checkpoint / OPTIMIZER_FILE, weights_only=True))
