"""Whether a training run survives kills: killed at random moments, started again, it must end as if it never was.

A tiny recipe is run once without kills. Then the same is run in processes that get SIGKILL: some while they start, some
while they train, some as soon as a checkpoint is seen being written, some as soon as the model is. After each kill
every visible checkpoint must be whole; after each start no step before the last of them may have been done again. At
the end curve and weights must be those of the run without kills, to the last bit.

python -m benchmarks.kill_training --help
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.workload import print_table
from safetensors.torch import load_file
from tests.conftest import make_tiny_world, tiny_recipe

from smoltolk.training.checkpoints import list_checkpoints, load_state
from smoltolk.training.trainer import METRICS_FILE, MODEL_FOLDER, read_metrics
from smoltolk.training.watching import MEASURED

POLL_S = 0.0005
MOMENTS = ("starting", "training", "training", "checkpoint", "checkpoint")  # aims of the kills, at random


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--export-kills", type=int, default=5, help="of them, while the model is written")
    parser.add_argument("--ranks", type=int, default=1, help="under torchrun if more than 1; one of them is killed")
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are made for their time")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = make_tiny_world(Path(name))
        whole, killed = Run(folder, "whole", options), Run(folder, "killed", options)
        whole.start().finish()
        killed.start()
        chance = random.Random(options.seed)
        for _ in range(options.kills - options.export_kills):
            killed.kill(chance.choice(MOMENTS), chance)
        for _ in range(options.export_kills):
            killed.kill("export", chance)
        killed.finish()
        print(f"{options.steps} steps, a checkpoint every {options.every}, {options.ranks} rank(s)\n")
        print_table(["killed while", "times"], [[what, str(count)] for what, count in sorted(killed.kills.items())])
        print(f"kills with a half-written checkpoint or model left behind: {killed.half_written}")
        print(f"steps done again: {killed.steps_again}; most after one kill: {killed.most_again}")
        killed.compare(whole)
        print("curve and weights are those of the run without kills, to the last bit")


class Run:
    """A run that is started again and again.

    Args:
        world: folder with the backbone and the store.
        name: of its output in that folder.
        options: the benchmark's.
    """

    def __init__(self, world: Path, name: str, options: argparse.Namespace) -> None:
        self.output, self.ranks, self.steps = world / name, options.ranks, options.steps
        self.kills: Counter[str] = Counter()
        self.half_written = self.steps_again = self.most_again = 0
        self._lines: list[dict[str, Any]] = []
        self._saved = 0
        settings = tiny_recipe(world, self.output, loader_workers=options.loader_workers)
        settings["checkpoint"] = {"every_steps": options.every}
        settings["validation"]["every_steps"] = 50
        first, second = settings["stages"]
        first["steps"], second["steps"] = options.steps // 3, options.steps - options.steps // 3
        for stage in (first, second):
            stage["rows_per_micro_batch"] = 2 // options.ranks or 1
        recipe = world / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        self._command = [sys.executable, *(launch if self.ranks > 1 else []), "-m", "smoltolk", "train", str(recipe)]

    def start(self) -> "Run":
        with (self.output.with_suffix(".log")).open("a") as log:
            self._process = subprocess.Popen([*self._command, "--no-progress"], stdout=log, stderr=log)  # noqa: S603
        self._started = time.perf_counter()
        return self

    def finish(self) -> None:
        code = self._process.wait()
        if code:
            raise RuntimeError(f"the run ended with {code}:\n{self.output.with_suffix('.log').read_text()[-3000:]}")
        self._check_lines()

    def kill(self, aim: str, chance: random.Random) -> None:
        """Kills the process, or one rank, at a moment of the kind aimed at, and starts it again."""
        if aim == "starting":
            time.sleep(chance.uniform(0, 5))
        elif aim == "training":
            self._wait_for_a_step()
            time.sleep(chance.uniform(0, 2))
        elif aim == "checkpoint":
            self._wait_for_a_step()
            time.sleep(chance.uniform(0, 0.5))
            self._wait_for("checkpoints/.step-*.tmp")
            time.sleep(chance.uniform(0, 0.02))
        else:
            self._wait_for(f".{MODEL_FOLDER}.tmp")
            time.sleep(chance.uniform(0, 0.005))
        if (
            aim == "export" and self._process.poll() == 0
        ):  # the moment was missed: a finished run writes the model again
            self.start().kill(aim, chance)
            return
        if self._process.poll() is not None:
            raise RuntimeError(f"the run ended before a kill: more --steps are needed ({len(self._read_lines())} done)")
        has_stepped = self._has_stepped()
        self._kill(chance)
        self._check_checkpoints()
        if list(self.output.glob(f".{MODEL_FOLDER}.tmp")):
            what, is_half = "writing the model", True
        elif list(self.output.glob("checkpoints/.step-*.tmp")):
            what, is_half = "writing or removing a checkpoint" if has_stepped else "starting", has_stepped
        else:
            what, is_half = "training" if has_stepped else "starting", False
        self.kills[what] += 1
        self.half_written += is_half
        self._check_lines()
        self.start()

    def compare(self, other: "Run") -> None:
        """Raises unless both runs are the same to the last bit."""
        for ours, theirs in zip(self._read_lines(), other._read_lines(), strict=True):
            if unmeasured(ours) != unmeasured(theirs):
                raise AssertionError(f"curves differ:\n{ours}\n{theirs}")
        models = [load_file(run.output / MODEL_FOLDER / "model.safetensors") for run in (self, other)]
        if models[0].keys() != models[1].keys():
            raise AssertionError("models have other weights")
        for name, weight in models[0].items():
            if not torch.equal(weight, models[1][name]):
                raise AssertionError(f"{name} differs")

    def _kill(self, chance: random.Random) -> None:
        """SIGKILL to the process, or to one rank: torchrun ends the others then."""
        victims = [self._process.pid]
        if self.ranks > 1:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            victims = [int(child) for child in children] or victims
        os.kill(chance.choice(victims), signal.SIGKILL)
        self._process.wait()

    def _check_checkpoints(self) -> None:
        """All visible checkpoints must be whole."""
        for checkpoint in list_checkpoints(self.output / "checkpoints"):
            state = load_state(checkpoint)
            if checkpoint.name != f"step-{state.step:08d}" or not (checkpoint / ".metadata").exists():
                raise AssertionError(f"{checkpoint} is not whole")

    def _check_lines(self) -> None:
        """No step up to the last checkpoint may have been done again: its line would have another time."""
        lines = self._read_lines()
        if lines[: self._saved] != self._lines[: self._saved]:
            raise AssertionError(f"steps up to {self._saved} were saved, but have been done again")
        if lines != self._lines:
            again = sum(old != new for old, new in zip(self._lines, lines, strict=False))
            again += max(0, len(self._lines) - len(lines))
            self.steps_again, self.most_again = self.steps_again + again, max(self.most_again, again)
        checkpoints = list_checkpoints(self.output / "checkpoints")
        self._lines, self._saved = lines, load_state(checkpoints[-1]).step if checkpoints else 0

    def _read_lines(self) -> list[dict[str, Any]]:
        path = self.output / METRICS_FILE
        return read_metrics(path) if path.exists() else []

    def _has_stepped(self) -> bool:
        """Whether this start has done a step: the file of metrics goes on beyond what is kept at a start."""
        lines = self._read_lines()
        return lines[: self._saved] != lines and lines != self._lines

    def _wait_for_a_step(self) -> None:
        while self._process.poll() is None and not self._has_stepped():
            time.sleep(0.01)

    def _wait_for(self, pattern: str) -> None:
        while self._process.poll() is None and not any(self.output.glob(pattern)):
            time.sleep(POLL_S)


def unmeasured(line: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics without those that differ from run to run."""
    return {name: value for name, value in line.items() if name not in MEASURED}


if __name__ == "__main__":
    main()
