"""Whatever happens to a run, nothing before its last checkpoint is lost, and it ends as if nothing had happened."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import tiny_recipe

from smoltolk.training.checkpoints import list_checkpoints, load_state
from smoltolk.training.config import make_recipe
from smoltolk.training.trainer import Trainer, read_metrics

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def run(settings, **arguments):
    return Trainer(make_recipe(settings), progress=False, **arguments).run()


def curve(folder):
    return [line | {"seconds": 0} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same_run(a, b):
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert curve(a) == curve(b)


def short_recipe(tiny_world, output, **changes):
    """Two steps with a checkpoint each, of which one stays."""
    settings = tiny_recipe(tiny_world, output, checkpoint={"every_steps": 1, "keep_last": 1}, **changes)
    settings["validation"]["rows"] = 0
    for stage in settings["stages"]:
        stage |= {"steps": 1, "decay_steps": 0}
    return settings


@pytest.fixture(scope="module")
def whole_run(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(short_recipe(tiny_world, folder))
    return folder


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["smoltolk.training.trainer", "tests.conftest"])
    return context


def train_until(settings, log, doomed):
    """Trains; writes down changes of files in the output folder before they are made, and dies before one of them."""
    output = settings["output"]

    def watch(event, arguments):
        if event not in FILE_EVENTS or (event == "open" and isinstance(arguments[1], str) and "r" in arguments[1]):
            return
        if isinstance(arguments[0], (str, os.PathLike)) and (path := os.fspath(arguments[0])).startswith(output):
            change = f"{event} {os.path.relpath(path, output)}"
            if change == doomed:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(log, f"{change}\n".encode())

    sys.addaudithook(watch)
    run(settings)


def changes_of_files(processes, settings, folder, doomed=None):
    log = folder / "changes.txt"
    process = processes.Process(target=train_until, args=(settings, str(log), doomed))
    process.start()
    process.join()
    return process.exitcode


def test_x(processes, tiny_world, tmp_path, whole_run):
    import time

    t = time.time()
    settings = short_recipe(tiny_world, tmp_path)
    process = processes.Process(target=train_until, args=(settings, 2, None))
    process.start()
    process.join()
    print(time.time() - t, process.exitcode, file=sys.stderr)
    t = time.time()
    settings = short_recipe(tiny_world, tmp_path / "b")
    process = processes.Process(target=train_until, args=(settings, 2, None))
    process.start()
    process.join()
    print(time.time() - t, process.exitcode, file=sys.stderr)
