"""Work side by side: each lane is a process of its own with one CPU thread."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Lane:
    """Something to run in a process of its own.

    Args:
        function: called as `function(*arguments, progress=…)`; a function of a module.
        arguments: its arguments.
        total: number of units of work that it reports through `progress(done)`.
    """

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    total: int


def progress_bar() -> Progress:
    """The demo's progress bar."""
    return Progress(TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())


def run_lanes(lanes: Mapping[str, Lane], logs: Path) -> dict[str, float]:
    """Runs lanes side by side to their ends; what they print goes to `logs/NAME.log`.

    Ctrl-C is passed on, so that a lane can save before it ends.

    Returns:
        Seconds of each lane.

    Raises:
        ChildProcessError: a lane failed; names its log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    processes: dict[str, Any] = {}
    counters: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    # A child ignores Ctrl-C until it can hear of it from its parent.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, lane in lanes.items():
        counters[name] = context.Value("l", 0)
        processes[name] = context.Process(
            target=_run_lane,
            args=(lane.function, lane.arguments, counters[name], logs / f"{name}.log"),
            daemon=False,
        )
        processes[name].start()
    signal.signal(signal.SIGINT, previous)
    try:
        with progress_bar() as bar:
            tasks = {name: bar.add_task(name, total=lane.total) for name, lane in lanes.items()}
            while len(seconds) < len(lanes):
                time.sleep(0.1)
                for name, process in processes.items():
                    bar.update(tasks[name], completed=counters[name].value)
                    if not process.is_alive() and name not in seconds:
                        seconds[name] = time.perf_counter() - started
                        bar.stop_task(tasks[name])
    except BaseException:
        for process in processes.values():
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
        for process in processes.values():
            process.join()
        raise
    for name, process in processes.items():
        if process.exitcode:
            raise ChildProcessError(f"{name} failed, see {logs / f'{name}.log'}")
    return seconds


def _run_lane(function: Callable[..., None], arguments: tuple[Any, ...], counter: Any, log: Path) -> None:
    os.setpgrp()  # Ctrl-C reaches the parent alone, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)  # NumPy's

    def progress(done: int) -> None:
        counter.value += done

    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        with contextlib.suppress(KeyboardInterrupt):
            function(*arguments, progress=progress)
            return
    sys.exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
