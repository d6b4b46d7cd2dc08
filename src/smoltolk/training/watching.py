"""Watching a run: metrics as JSON lines always, TensorBoard and W&B if wanted, speed, MFU, and a bar."""

import json
import os
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from smoltolk.model.configuration_smoltolk import SmolTolkConfig
from smoltolk.speech.audio import write_atomically
from smoltolk.terminal import error_console
from smoltolk.training.config import Recipe
from smoltolk.training.optim import expected_flops

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
WANDB_RUN_FILE = "wandb-run.txt"
MEASURED = frozenset({"seconds", "tokens_per_s", "flops_per_s", "mfu"})  # these differ from run to run

# Dense bfloat16 matrix products with float32 sums, in TFLOP/s, as NVIDIA's data sheets have them (half of what they
# give with sparsity): A100, H100, H200, HGX B200, L4 and L40S data sheets; RTX 4090: Ada architecture white paper.
_PEAK_TFLOPS = (
    (r"\bB200\b", 2250.0),
    (r"\bH[12]00 NVL\b", 835.5),
    (r"\bH100 PCIe\b", 756.5),
    (r"\bH100 80GB HBM3$|\bH200$", 989.5),
    (r"\bA100\b", 312.0),
    (r"\bL40S$", 362.0),
    (r"\bL4$", 121.0),
    (r"\bRTX 4090$", 165.2),
)

Report = Callable[[dict[str, Any]], None]


def peak_flops(recipe: Recipe, device: torch.device) -> float | None:
    """FLOP/s that one device could do at best: the recipe's `peak_tflops`, or what is known of the GPU in bfloat16.

    Returns:
        None where nothing is known: on a CPU, an unknown GPU or a part of one (MIG), or in float32.
    """
    if recipe.peak_tflops is not None:
        return 1e12 * recipe.peak_tflops
    if device.type != "cuda" or recipe.precision != "bf16":
        return None
    return known_peak_flops(torch.cuda.get_device_name(device))


def known_peak_flops(name: str) -> float | None:
    """Peak of a GPU in bfloat16 without sparsity, by the name that CUDA gives it; None for one that is not known."""
    if "MIG" in name:
        return None
    return next((1e12 * tflops for pattern, tflops in _PEAK_TFLOPS if re.search(pattern, name)), None)


def speed(*, tokens: int, flops: int, seconds: float, peak: float | None) -> dict[str, float]:
    """Tokens and training FLOPs per second, and their share of the peak (MFU) where that is known.

    Args:
        tokens: tokens of a step, of all ranks.
        flops: training FLOPs of the step, of all ranks.
        seconds: how long it took.
        peak: FLOP/s of all devices together at best.
    """
    measured = {"tokens_per_s": tokens / seconds, "flops_per_s": flops / seconds}
    return measured if peak is None else measured | {"mfu": flops / seconds / peak}


class RemainingTime:
    """How long the rest of a run will take, at the speed of its recent steps.

    The clock runs through validation and checkpoints, so the steps looked at span a whole round of them. Steps of
    another stage count by what they compute. After a resume the first step, which may compile, sets the beginning.

    Args:
        work: what a step of each stage computes, in FLOPs.
        steps: steps of each stage.
        window: number of recent steps looked at.
    """

    def __init__(self, work: list[int], steps: list[int], window: int) -> None:
        self._stages = list(zip(work, steps, strict=True))
        self._seen: deque[tuple[int, float]] = deque(maxlen=window + 1)  # (step, clock)

    def after(self, step: int, clock_s: float) -> float | None:
        """Seconds from now to the end of the run, now that a step is done; None as long as nothing is known."""
        if self._seen and step <= self._seen[-1][0]:
            self._seen.clear()
        self._seen.append((step, clock_s))
        first, began_s = self._seen[0]
        done = self._work_until(step)
        if step == first:
            return None
        left = sum(work * steps for work, steps in self._stages) - done
        return left * (clock_s - began_s) / (done - self._work_until(first))

    def _work_until(self, step: int) -> int:
        done = 0
        for work, steps in self._stages:
            done += work * min(step, steps)
            step -= min(step, steps)
        return done


@contextmanager
def watch(
    recipe: Recipe, config: SmolTolkConfig, step: int, *, lora_size: int = 0, has_bar: bool = False
) -> Iterator[Report]:
    """Gives what takes the metrics of every step from the next one on, and shows and writes them.

    What was written about later steps, which are done again, is dropped.

    Args:
        recipe: the run.
        config: of its model.
        step: steps done before.
        lora_size: number of weights of its LoRA matrices.
        has_bar: whether to show a progress bar.

    Raises:
        ImportError: TensorBoard or W&B shall be written and is not installed.
    """
    output = Path(recipe.output)
    remaining = RemainingTime(
        [
            expected_flops(config, stage, lora_size if recipe.uses_lora(index) else 0)
            for index, stage in enumerate(recipe.stages)
        ],
        [stage.steps for stage in recipe.stages],
        window=recipe.validation.every_steps,
    )
    with ExitStack() as stack:
        reports = [write_json_lines(output / METRICS_FILE, step)]
        if "tensorboard" in recipe.watch:
            reports.append(stack.enter_context(write_tensorboard(output, step)))
        if "wandb" in recipe.watch:
            reports.append(stack.enter_context(write_wandb(output, recipe)))
        if has_bar:
            reports.append(stack.enter_context(show_bar(recipe, step, remaining)))

        def report(metrics: dict[str, Any]) -> None:
            for each in reports:
                each(metrics)

        yield report


def write_json_lines(path: Path, step: int) -> Report:
    """Appends a line per step to a metrics file; lines of steps after the given one, and one cut off, are dropped."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def report(metrics: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    return report


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line that was cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def scalars(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a step's metrics by name; those of a list are numbered from 1, what was not measured is left out.

    `{"loss": 2.0, "text_loss": None, "layer_weights": [0.5, 0.5]}` gives `loss`, `layer_weights/01` and
    `layer_weights/02`.
    """
    named: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            named |= {f"{name}/{number:02d}": one for number, one in enumerate(value, start=1)}
        elif name != "step":
            named[name] = value
    return {name: value for name, value in named.items() if value is not None}


@contextmanager
def write_tensorboard(output: Path, step: int) -> Iterator[Report]:
    """Writes TensorBoard events (extra `tensorboard`) into a folder of the run, without any step twice.

    A run that was begun without them gets those of its earlier steps too.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "watch: [tensorboard] needs TensorBoard, which is not installed: pip install 'smoltolk[tensorboard]'"
        ) from error
    folder = output / TENSORBOARD_FOLDER
    earlier = [] if folder.exists() else _earlier_metrics(output)
    with SummaryWriter(folder, purge_step=step + 1) as writer:

        def report(metrics: dict[str, Any]) -> None:
            for name, value in scalars(metrics).items():
                writer.add_scalar(name, value, metrics["step"])
            writer.flush()  # a checkpoint must not be ahead of them, or a kill would leave a gap

        for line in earlier:
            report(line)
        yield report


@contextmanager
def write_wandb(output: Path, recipe: Recipe) -> Iterator[Report]:
    """Logs to Weights & Biases (extra `wandb`), under the project of WANDB_PROJECT, else "smoltolk".

    The output folder keeps the id of its run, so that a resume goes on with it. Steps that W&B has already, which are
    done again after a kill, are not logged a second time.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            "watch: [wandb] needs Weights & Biases, which is not installed: pip install 'smoltolk[wandb]'"
        ) from error
    file = output / WANDB_RUN_FILE
    is_begun = file.exists()
    if not is_begun:
        write_atomically(file, secrets.token_hex(8).encode())
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "smoltolk"),
        id=file.read_text(encoding="utf-8"),
        resume="allow",
        name=recipe.name,
        dir=output,
        config=recipe.model_dump(mode="json"),
        settings=wandb.Settings(console="off"),  # it would record the bar
    )

    def report(metrics: dict[str, Any]) -> None:
        if metrics["step"] >= run.step:
            run.log(scalars(metrics), step=metrics["step"])

    exit_code = 1  # failed, or stopped
    try:
        for line in [] if is_begun else _earlier_metrics(output):
            report(line)
        yield report
        exit_code = 0
    finally:
        run.finish(exit_code=exit_code)


def _earlier_metrics(output: Path) -> list[dict[str, Any]]:
    path = output / METRICS_FILE
    return read_metrics(path) if path.exists() else []


@contextmanager
def show_bar(recipe: Recipe, step: int, remaining: RemainingTime) -> Iterator[Report]:
    """Shows a progress bar from a step on."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(table_column=Column(min_width=2 * len(str(recipe.num_steps)) + 1)),
        TextColumn("{task.fields[shown]}", table_column=Column(no_wrap=False)),  # nothing is cut off
    )
    with Progress(*columns, console=error_console()) as bar:
        task = bar.add_task(recipe.name, total=recipe.num_steps, completed=step, shown="")

        def report(metrics: dict[str, Any]) -> None:
            left_s = remaining.after(metrics["step"], time.monotonic())
            bar.update(task, completed=metrics["step"], shown=shown(metrics, left_s))

        yield report


def shown(metrics: dict[str, Any], left_s: float | None) -> str:
    """What the bar says of a step: stage, losses, speed, MFU where it is known, and the time that is left."""
    parts = [f"stage {metrics['stage']}"]
    for name in ("text", "speech"):
        if metrics[f"{name}_loss"] is not None:
            parts.append(f"{name} {metrics[f'{name}_loss']:.3f}")
    parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"{100 * metrics['mfu']:.1f} % MFU")
    if left_s is not None:
        parts.append(f"{timedelta(seconds=round(left_s))} left")
    return "  ".join(parts)
