"""Whether the memory of a long run grows: a tiny recipe with frequent validations and checkpoints, for a given time.

python -m benchmarks.soak --help
"""

import argparse
import os
import platform
import signal
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.workload import print_table, spread
from tests.conftest import make_tiny_world, tiny_recipe

from smoltolk.training.config import make_recipe
from smoltolk.training.stopping import TrainingStopped
from smoltolk.training.trainer import Trainer

QUARTERS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints, and between validations")
    parser.add_argument("--loader-workers", type=int, default=1)
    parser.add_argument("--sample-s", type=float, default=5.0, help="seconds between looks at the memory")
    parser.add_argument("--folder", type=Path, help="where the run is made for its time")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        samples, steps = train(Path(folder), options)
    print_report(samples, steps, options)


def train(folder: Path, options: argparse.Namespace) -> tuple[np.ndarray, int]:
    """Trains for the given time.

    Returns:
        Seconds, MiB of the trainer, MiB of its loader processes (samples, 3); the number of steps.
    """
    settings = tiny_recipe(
        make_tiny_world(folder),
        folder / "run",
        loader_workers=options.loader_workers,
        validation={"rows": 4, "every_steps": options.every},
        checkpoint={"every_steps": options.every},
    )
    settings["stages"][1] |= {"steps": 10**8, "decay_steps": 0, "learning_rate": 1e-4}
    started, samples, steps = time.perf_counter(), [], 0

    def watch(metrics: dict[str, Any]) -> None:
        nonlocal steps
        steps = metrics["step"]
        seconds = time.perf_counter() - started
        if not samples or seconds - samples[-1][0] >= options.sample_s:
            workers = sum(own_memory_mib(worker.pid) for worker in active_children())
            samples.append((seconds, own_memory_mib(os.getpid()), workers))
        if seconds >= 60 * options.minutes and len(samples) >= QUARTERS:
            signal.raise_signal(signal.SIGINT)

    with suppress(TrainingStopped):
        Trainer(make_recipe(settings), progress=False, on_step=watch).run()
    return np.array(samples), steps


def own_memory_mib(process: int | None) -> float:
    """Memory of a process that is no file's, swapped out or not: the system takes files' pages back as it likes."""
    status = Path(f"/proc/{process}/status").read_text().split()
    return sum(int(status[status.index(name) + 1]) for name in ("RssAnon:", "VmSwap:")) / 1024


def print_report(samples: np.ndarray, steps: int, options: argparse.Namespace) -> None:
    print(
        f"{samples[-1, 0] / 60:.1f} minutes, {steps:,} steps, {steps // options.every:,} checkpoints and validations, "
        f"{options.loader_workers} loader process(es); Python {platform.python_version()}, torch {torch.__version__}; "
        "own memory, MiB: least – median – greatest\n"
    )
    rows = []
    for name, column in (("trainer", 1), ("loader processes", 2)):
        quarters = [spread(part[:, column], 1) for part in np.array_split(samples, QUARTERS)]
        settled = samples[len(samples) // QUARTERS :]
        slope_per_s = np.polyfit(settled[:, 0], settled[:, column], 1)[0] if len(settled) > 1 else 0.0
        rows.append([name, *quarters, f"{3600 * slope_per_s:+.2f}"])
    print_table(["process", *(f"quarter {i + 1}" for i in range(QUARTERS)), "slope of quarters 2–4, MiB/h"], rows)


if __name__ == "__main__":
    main()
