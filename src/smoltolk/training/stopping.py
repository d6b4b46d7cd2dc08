"""Ctrl-C and SIGTERM: a run that is asked to stop saves first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingStopped(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved; running it again goes on."""


class StopRequests:
    """Whether somebody asked to stop."""

    is_requested = False
    _is_interrupted = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Hears a signal."""
        if signum == signal.SIGINT:  # one Ctrl-C after another; SIGTERM may come from SLURM and from torchrun
            if self._is_interrupted:
                raise KeyboardInterrupt  # at once, from the last checkpoint
            self._is_interrupted = True
        self.is_requested = True


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Turns Ctrl-C and SIGTERM into a request that is heard at the end of a step."""
    stop = StopRequests()
    try:
        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, where signals cannot be caught
        previous = {}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
