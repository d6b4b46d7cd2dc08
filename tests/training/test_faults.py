"""Whatever happens to a run, nothing before its last checkpoint is lost, and it ends as if nothing had happened."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.conftest import tiny_recipe

from smoltolk import SmolTolkForCausalLM
from smoltolk.training import checkpoints, loader
from smoltolk.training.checkpoints import list_checkpoints, load_state
from smoltolk.training.config import make_recipe
from smoltolk.training.stopping import TrainingStopped
from smoltolk.training.trainer import Trainer
from smoltolk.training.watching import MEASURED, read_metrics

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def run(settings, **arguments):
    return Trainer(make_recipe(settings), progress=False, **arguments).run()


def curve(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


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


def train_until(settings, log, doomed):
    """Trains; writes down each change in the output folder before it is made, and dies before one of them."""
    output = settings["output"]

    def watch(event, arguments):
        if event not in FILE_EVENTS or (event == "open" and isinstance(arguments[1], str) and "r" in arguments[1]):
            return
        if isinstance(arguments[0], str | os.PathLike) and (path := os.fspath(arguments[0])).startswith(output):
            change = f"{event} {os.path.relpath(path, output)}"
            os.write(log_file, f"{change}\n".encode())
            if change == doomed:
                os.kill(os.getpid(), signal.SIGKILL)

    log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.addaudithook(watch)
    run(settings)


def assert_all_whole(folder):
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        assert checkpoint.name == f"step-{load_state(checkpoint).step:08d}"
        assert {".metadata", "__0_0.distcp", "state.json"} <= {path.name for path in checkpoint.iterdir()}


KILLS = [  # before which change of a file, and the last checkpoint then
    ("open checkpoints/.step-00000001.tmp/__0_0.distcp", 0),
    ("open checkpoints/.step-00000001.tmp/state.json", 0),
    ("os.rename checkpoints/.step-00000001.tmp", 0),
    ("os.rename checkpoints/.step-00000002.tmp", 1),
    ("os.rmdir checkpoints/.step-00000001.tmp", 2),  # the old one is half removed
    ("open .model.tmp/training.json", 2),
    ("os.rename .model.tmp", 2),
]


def test_a_run_killed_before_any_change_of_its_files_goes_on_from_a_whole_checkpoint(
    processes, tiny_world, tmp_path, whole_run
):
    settings, log = short_recipe(tiny_world, tmp_path / "run"), tmp_path / "changes.txt"
    for doomed, last in KILLS:
        process = processes.Process(target=train_until, args=(settings, log, doomed))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, doomed
        assert log.read_text().splitlines()[-1] == doomed
        assert_all_whole(tmp_path / "run")
        assert [int(path.name[5:]) for path in list_checkpoints(tmp_path / "run" / "checkpoints")][-1:] == [last][:last]
    run(settings)
    assert_same_run(tmp_path / "run", whole_run)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "checkpoints", "metrics.jsonl", "model"}
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def stopped_after(settings, step):
    """Runs until a step has been done and saved."""

    def interrupt(metrics):
        if metrics["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        run(settings, on_step=interrupt)


def test_a_line_of_metrics_that_was_cut_off_is_written_again(tiny_world, tmp_path, whole_run):
    settings = short_recipe(tiny_world, tmp_path)
    stopped_after(settings, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "stage": 2, "lo')
    run(settings)
    assert_same_run(tmp_path, whole_run)


def test_after_an_error_nothing_is_written_behind_the_next_runs_back(tiny_world, tmp_path, monkeypatch):
    writing, may_end = threading.Event(), threading.Event()
    write = checkpoints.dcp.save

    def slowly(*arguments, **settings):
        writing.set()
        may_end.wait(60)
        write(*arguments, **settings)

    def fail(metrics):
        if metrics["step"] == 3:  # the checkpoint of step 2 is being written
            assert writing.wait(60)
            threading.Timer(0.3, may_end.set).start()  # long after the error, were it not waited for
            raise ZeroDivisionError

    monkeypatch.setattr(checkpoints.dcp, "save", slowly)
    with pytest.raises(ZeroDivisionError):
        Trainer(make_recipe(tiny_recipe(tiny_world, tmp_path)), progress=False, on_step=fail).run()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_what_killed_writers_left_is_removed_at_the_start(tiny_world, tmp_path, whole_run):
    leftover = tmp_path / "checkpoints" / ".step-00000007.tmp"
    leftover.mkdir(parents=True)
    (leftover / "__0_0.distcp").write_bytes(bytes(10))
    (tmp_path / ".model.tmp").mkdir()
    run(short_recipe(tiny_world, tmp_path))
    assert_same_run(tmp_path, whole_run)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / ".model.tmp").exists()


@pytest.mark.parametrize("damage", ["__0_0.distcp", "state.json", ".metadata"])
def test_a_checkpoint_that_was_changed_is_refused_and_the_one_before_taken_when_it_is_removed(
    tiny_world, tmp_path, whole_run, damage
):
    settings = short_recipe(tiny_world, tmp_path)
    settings["checkpoint"]["keep_last"] = 2
    run(settings)
    last = list_checkpoints(tmp_path / "checkpoints")[-1]
    os.truncate(last / damage, 100 if damage == "__0_0.distcp" else 0)
    with pytest.raises(ValueError, match=r"step-00000002 is not as it was written .*: remove it, and the run goes on"):
        run(settings)
    shutil.rmtree(last)
    run(settings)
    assert_same_run(tmp_path, whole_run)


def test_metrics_that_cannot_be_written_stop_the_run_at_the_last_checkpoint(tiny_world, tmp_path, whole_run):
    settings, metrics = short_recipe(tiny_world, tmp_path), tmp_path / "metrics.jsonl"

    def fill_the_disk(line):
        if line["step"] == 1:
            metrics.rename(tmp_path / "aside")
            metrics.symlink_to("/dev/full")

    with pytest.raises(
        OSError, match=r"metrics.jsonl could not be written .*No space left.*checkpoints are intact; make"
    ):
        run(settings, on_step=fill_the_disk)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    (tmp_path / "aside").replace(metrics)
    run(settings)
    assert_same_run(tmp_path, whole_run)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")])
def test_a_model_that_cannot_be_written_leaves_the_one_before_and_is_written_at_the_next_start(
    tiny_world, tmp_path, whole_run, monkeypatch, error
):
    settings = short_recipe(tiny_world, tmp_path)

    def disk_full(model, folder, **settings):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
        raise error

    def have_a_model_before(metrics):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "before").touch()

    monkeypatch.setattr(SmolTolkForCausalLM, "save_pretrained", disk_full)
    with pytest.raises(OSError, match=r"model could not be written .*No space left.*checkpoints are intact; make room"):
        run(settings, on_step=have_a_model_before)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["before"]
    assert not (tmp_path / ".model.tmp").exists()
    monkeypatch.undo()
    run(settings)
    assert_same_run(tmp_path, whole_run)


def damaged(shard, fault):
    """Makes a shard vanish; returns what brings it back."""
    data = shard.read_bytes()
    if fault == "gone":
        shard.unlink()
    else:
        os.truncate(shard, 0)
    return lambda: shard.write_bytes(data)


@pytest.mark.parametrize(("fault", "message"), [("gone", "is missing"), ("cut", "has 0 bytes instead of")])
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_shard_that_vanishes_is_named_and_the_run_goes_on_when_it_is_back(
    tiny_world, tmp_path, whole_run, fault, message, loader_workers, monkeypatch
):
    monkeypatch.setattr(loader, "CHECK_EVERY_S", 0.0)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    shutil.copytree(tiny_world / "store", tmp_path / "store")
    settings = tiny_recipe(tiny_world, tmp_path / "run", loader_workers=loader_workers)
    settings["data"] |= {task: [{"store": str(tmp_path / "store")}] for task in ("interleaved", "speech", "text")}
    settings["stages"][1]["steps"] = 30
    shard = tmp_path / "store" / "shard-00000.parquet"
    bring_back = []

    def vanish(metrics):
        if metrics["step"] == 3:
            bring_back.append(damaged(shard, fault))

    with pytest.raises(ValueError, match=rf"store/shard-00000.parquet {message}.*prepare") as caught:
        run(settings, on_step=vanish)
    assert "Traceback" not in str(caught.value)
    done = curve(tmp_path / "run")[-1]["step"]
    assert load_state(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).step == done  # saved first
    assert done == 3 or loader_workers  # those were ahead
    with pytest.raises(ValueError, match=rf"store/shard-00000.parquet {message}.*prepare"):
        run(settings)
    bring_back[0]()
    stopped_after(settings, done + 2)
    settings = settings | {"output": str(tmp_path / "whole")}
    stopped_after(settings, done + 2)
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_a_process_that_drew_batches_and_died_is_told_and_the_run_is_saved(
    tiny_world, tmp_path, whole_run, monkeypatch
):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    settings = tiny_recipe(tiny_world, tmp_path, loader_workers=1)
    settings["stages"][1]["steps"] = 30

    def kill(metrics):
        if metrics["step"] == 3:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(
        ChildProcessError, match=r"a process that drew batches has died \(.*\): run the same command to go on"
    ):
        run(settings, on_step=kill)
    assert load_state(list_checkpoints(tmp_path / "checkpoints")[-1]).step == curve(tmp_path)[-1]["step"]


def test_rows_without_a_finite_loss_are_found(tiny_world, tmp_path, monkeypatch):
    settings = short_recipe(tiny_world, tmp_path, max_skipped_steps=0)
    trainer = Trainer(make_recipe(settings), progress=False)
    source = trainer._sources[0]
    batch = source.batch(0, 0, rows=4)
    is_bad = (batch.input_ids == (bad := batch.input_ids[1].max())).any(1).tolist()
    assert 0 < sum(is_bad) < 4
    names = {name for row, bad in zip(source.sample_ids(batch), is_bad, strict=True) if bad for name in row}
    forward = Trainer._forward

    def poisoned(trainer, batch, *arguments):
        output = forward(trainer, batch, *arguments)
        if (batch.input_ids == bad).any():
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(Trainer, "_forward", poisoned)
    with pytest.raises(FloatingPointError, match=f"rows whose loss .* utterances {', '.join(sorted(names))}: look"):
        run(settings)


def test_sigterm_may_come_twice_but_a_second_ctrl_c_stops_at_once(tiny_world, tmp_path):
    def signals(*numbers):
        def ask(metrics):
            if metrics["step"] == 1:
                for number in numbers:
                    signal.raise_signal(number)

        return ask

    settings = short_recipe(tiny_world, tmp_path / "twice")
    with pytest.raises(TrainingStopped, match="stopped after step 1 of 2, saved"):
        run(settings, on_step=signals(signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(settings | {"output": str(tmp_path / "at-once")}, on_step=signals(signal.SIGINT, signal.SIGINT))
    assert list_checkpoints(tmp_path / "at-once" / "checkpoints") == []
