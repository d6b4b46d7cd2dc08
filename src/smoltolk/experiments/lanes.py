"""Work side by side: each lane is a process of its own with one CPU thread."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import Progress, TaskID, TaskProgressColumn, TimeElapsedColumn

from smoltolk.terminal import progress_bar

POLL_S = 0.1


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


@dataclass(frozen=True)
class Ended:
    """A lane that has ended.

    Args:
        name: its name.
        seconds: how long it took.
        has_failed: whether it did not come to its end.
        log: what it printed.
        bar_task: its bar.
    """

    name: str
    seconds: float
    has_failed: bool
    log: Path
    bar_task: TaskID


@dataclass(frozen=True)
class _Running:
    process: Any
    counter: Any
    is_listening: Any
    log: Path
    bar_task: TaskID
    started: float


def lane_bars() -> Progress:
    """A bar for each lane."""
    return progress_bar(TaskProgressColumn(), TimeElapsedColumn())


class Lanes:
    """Lanes that run side by side, each with a bar; more can be started while others run.

    It is a context: where an exception leaves it, such as Ctrl-C, the lanes that run hear of it as Ctrl-C, so that
    they can save before they end. A lane ends with the process that started it, however that ends.

    Args:
        bar: where the bars are shown.
    """

    def __init__(self, bar: Progress) -> None:
        self.bar = bar
        self._running: dict[str, _Running] = {}

    @property
    def running(self) -> frozenset[str]:
        """Names of the lanes that run."""
        return frozenset(self._running)

    def start(self, name: str, lane: Lane, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Starts a lane.

        Args:
            name: what to call it.
            lane: the work.
            log: file that what it prints is added to.
            environment: environment variables of its process alone.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        counter, is_listening = context.Value("l", 0), context.Value("b", False)
        process = context.Process(target=_run_lane, args=(os.getpid(), lane, counter, is_listening, log))
        # A child ignores Ctrl-C until it can hear of it from its parent.
        with _without_ctrl_c(), _environment(environment or {}):
            process.start()
        bar_task = self.bar.add_task(name, total=lane.total)
        self._running[name] = _Running(process, counter, is_listening, log, bar_task, time.perf_counter())

    def wait(self) -> Ended:
        """Waits for the next lane to end."""
        while True:
            for name, lane in self._running.items():
                is_alive = lane.process.is_alive()
                self.bar.update(lane.bar_task, completed=lane.counter.value)
                if not is_alive:
                    del self._running[name]
                    self.bar.stop_task(lane.bar_task)
                    seconds = time.perf_counter() - lane.started
                    return Ended(name, seconds, bool(lane.process.exitcode), lane.log, lane.bar_task)
            time.sleep(POLL_S)

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for lane in self._running.values():
            if not lane.is_listening.value:  # still on its way: nothing is begun that could be lost
                lane.process.kill()
            elif lane.process.is_alive():
                os.kill(lane.process.pid, signal.SIGINT)
        for lane in self._running.values():
            lane.process.join()


def run_lanes(lanes: Mapping[str, Lane], logs: Path) -> dict[str, float]:
    """Runs lanes side by side to their ends; what they print goes to `logs/NAME.log`.

    Ctrl-C is passed on, so that a lane can save before it ends.

    Returns:
        Seconds of each lane.

    Raises:
        ChildProcessError: a lane failed; names its log.
    """
    with lane_bars() as bar, Lanes(bar) as group:
        for name, lane in lanes.items():
            group.start(name, lane, logs / f"{name}.log")
        ended = [group.wait() for _ in lanes]
    for lane_end in ended:
        if lane_end.has_failed:
            raise ChildProcessError(f"{lane_end.name} failed, see {lane_end.log}")
    return {lane_end.name: lane_end.seconds for lane_end in ended}


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may say who hears signals
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for a while: a child inherits them before it imports anything."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run_lane(parent: int, lane: Lane, counter: Any, is_listening: Any, log: Path) -> None:
    os.setpgrp()  # Ctrl-C reaches the parent alone, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    is_listening.value = True
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
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
            lane.function(*lane.arguments, progress=progress)
            return
    sys.exit(1)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
