"""Several ranks train what one trains."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import tiny_recipe
from torch.distributed.checkpoint import FileSystemWriter

from smoltolk import SmolTolkForCausalLM
from smoltolk.data.dataset import BatchSource
from smoltolk.data.store import Store
from smoltolk.training.checkpoints import list_checkpoints, load_state
from smoltolk.training.config import make_recipe
from smoltolk.training.distributed import join_ranks
from smoltolk.training.trainer import Trainer
from smoltolk.training.watching import read_metrics


def torchrun(settings, folder, ranks):
    """Starts a run of some ranks on this machine."""
    folder.mkdir(exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "smoltolk", "train", str(recipe), "--no-progress"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Waits for a run; its errors are shown when it failed."""
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def losses(folder):
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def settings_for(tiny_world, folder):
    settings = tiny_recipe(tiny_world, folder)
    for stage in settings["stages"]:
        stage["rows_per_micro_batch"] = 1
    return settings


@pytest.fixture(scope="module")
def runs(tiny_world, tmp_path_factory):
    """The same recipe run by one rank and by two."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        finish(torchrun(settings_for(tiny_world, folders[ranks]), folders[ranks], ranks))
    return folders


def test_two_ranks_have_the_losses_of_one(runs):
    one, two = (read_metrics(runs[ranks] / "metrics.jsonl") for ranks in (1, 2))
    assert len(one) == len(two) == 9
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("loss", "text_loss", "speech_loss", "validation_interleaved_loss", "grad_norm"):
            if theirs.get(name) is None:
                assert ours.get(name) is None
            else:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), (ours["step"], name)
        for name in ("tokens", "flops", "text_labels", "speech_labels", "skipped_steps"):
            assert ours[name] == theirs[name]


def test_shares_of_text_and_speech_differed_between_the_ranks(runs, tiny_world, tmp_path):
    """Else the test before would say little."""
    trainer = Trainer(make_recipe(settings_for(tiny_world, tmp_path)), progress=False)
    source: BatchSource = trainer._sources[1]
    shares = []
    for step in range(4, 9):
        batch = source.batch(0, step, rows=4)
        halves = [batch.select(rows) for rows in (slice(0, 2), slice(2, 4))]
        shares.append([trainer.model.count_labels(half.input_ids, half.labels) for half in halves])
    assert any(first != second for first, second in shares)
    assert any(speech == 0 for halves in shares for _, speech in halves)  # a rank without speech


def test_the_model_of_two_ranks_is_that_of_one(runs):
    one, two = (load_file(runs[ranks] / "model" / "model.safetensors") for ranks in (1, 2))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, atol=1e-4, rtol=0)
    model = SmolTolkForCausalLM.from_pretrained(runs[2] / "model")
    assert model.config.architectures == ["SmolTolkForCausalLM"]


@pytest.mark.parametrize(("begun_by", "ended_by"), [(2, 2), (2, 1), (1, 2)])
def test_a_stopped_run_goes_on_with_another_number_of_ranks(runs, tiny_world, tmp_path, begun_by, ended_by):
    settings = settings_for(tiny_world, tmp_path)
    process = torchrun(settings, tmp_path, begun_by)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(read_metrics(metrics)) >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    process.communicate(timeout=300)
    done = len(read_metrics(metrics))
    assert load_state(list_checkpoints(tmp_path / "checkpoints")[-1]).step == done < 9
    finish(torchrun(settings, tmp_path, ended_by))
    if begun_by == ended_by:
        assert losses(tmp_path) == losses(runs[2])  # to the last bit
    else:
        assert losses(tmp_path) == pytest.approx(losses(runs[1]), abs=1e-5)


def test_rows_that_cannot_be_shared_evenly_are_refused(tiny_world, tmp_path, monkeypatch):
    from smoltolk.training import trainer as module
    from smoltolk.training.distributed import Ranks

    monkeypatch.setattr(module, "join_ranks", lambda device: Ranks(0, 3, torch.device(device)))
    with pytest.raises(ValueError, match=r"rows_per_step 4 is not a multiple of 3 \(3 ranks of"):
        Trainer(make_recipe(settings_for(tiny_world, tmp_path) | {"device": "cpu"}), progress=False)


@pytest.mark.parametrize(
    ("device", "ranks", "message"),
    [
        ("gpu", 1, "device is 'gpu', which torch does not know: give auto, cuda or cpu"),
        ("cuda:1", 1, "device is 'cuda:1', here number 1 from 0, but torch finds 1 GPUs"),
        ("cuda", 2, "device is 'cuda', here number 1 from 0, but torch finds 1 GPUs: start as many ranks"),
        ("cuda:0", 2, "device is 'cuda:0', but 2 ranks cannot share a GPU: give cuda"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, ranks, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": ranks, "RANK": 1, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=re.escape(message)):
        join_ranks(device)


# ---- faults of one rank


def one_of_two(settings, fault, rank, port, outcome):
    """A rank, as torchrun starts it, with a fault; writes down how it ended."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        Trainer(make_recipe(settings), progress=False, on_step=fault(rank, settings)).run()
        outcome.write_text("done")
    except (Exception, KeyboardInterrupt) as error:
        outcome.write_text(f"{type(error).__name__}: {error}")


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def outcomes(processes, settings, folder, fault):
    """How both ranks ended."""
    port = free_port()
    files = [folder / f"outcome-{rank}.txt" for rank in (0, 1)]
    started = [processes.Process(target=one_of_two, args=(settings, fault, r, port, files[r])) for r in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    return [file.read_text() if file.exists() else "" for file in files]


def four_steps(tiny_world, folder):
    """A checkpoint at the second and at the last."""
    settings = settings_for(tiny_world, folder)
    settings["validation"]["rows"] = 0
    for stage in settings["stages"]:
        stage |= {"steps": 2, "decay_steps": 0}
    return settings


@pytest.fixture(scope="module")
def whole_run(processes, tiny_world, tmp_path_factory):
    """Both ranks to the end; also a checkpoint must be there as soon as it is written, not at the next one."""
    folder = tmp_path_factory.mktemp("whole")
    assert outcomes(processes, four_steps(tiny_world, folder), folder, waits_for_the_checkpoint) == ["done", "done"]
    return folder


def at_step(step, action):
    def on_step(metrics):
        if metrics["step"] == step:
            action()

    return on_step


def no_fault(rank, settings):
    return None


def waits_for_the_checkpoint(rank, settings):
    published = Path(settings["output"]) / "checkpoints" / "step-00000002"

    def wait():
        deadline = time.monotonic() + 20
        while not published.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert published.exists()

    return at_step(3, wait)  # the next save is at step 4


def one_rank_hears_sigterm(rank, settings):
    return at_step(3, lambda: signal.raise_signal(signal.SIGTERM)) if rank == 1 else None


def one_rank_is_killed(rank, settings):
    return at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 1 else None


def the_disk_of_one_rank_is_full(rank, settings):
    write_data = FileSystemWriter.write_data

    def disk_full(writer, plan, planner):
        if rank == 1 and "00000004" in str(writer.path):
            raise OSError(28, "No space left on device")
        return write_data(writer, plan, planner)

    FileSystemWriter.write_data = disk_full


def the_main_rank_cannot_publish(rank, settings):
    rename = Path.rename

    def refuse(path, target):
        if path.name == ".step-00000004.tmp":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    Path.rename = refuse


def metrics_cannot_be_written(rank, settings):
    metrics = Path(settings["output"]) / "metrics.jsonl"

    def fill_the_disk():
        metrics.rename(metrics.with_suffix(".aside"))
        metrics.symlink_to("/dev/full")

    return at_step(2, fill_the_disk) if rank == 0 else None


def one_rank_misses_a_shard(rank, settings):
    def vanish(store):
        raise ValueError("shard-00000.parquet is missing")

    return at_step(3, lambda: setattr(Store, "check_files", vanish)) if rank == 1 else None


def some_rows_are_not_finite(rank, settings):
    forward = Trainer._forward

    def poisoned(trainer, batch, num_labels=None, *more):
        output = forward(trainer, batch, num_labels, *more)
        if num_labels is not None and rank == 1:
            output.loss = output.loss * float("nan")
        return output

    Trainer._forward = poisoned
    settings["max_skipped_steps"] = 2


FULL = "OSError: .*step-00000004 could not be written .*No space left on device.*make room"
FAULTS = [  # the fault; how both ranks end; the last checkpoint then
    (one_rank_hears_sigterm, ["TrainingStopped: stopped after step 3 of 4, saved"] * 2, 3),
    (one_rank_is_killed, [".*Error: ", "^$"], 2),
    (the_disk_of_one_rank_is_full, [FULL, FULL], 2),
    (the_main_rank_cannot_publish, [FULL, "OSError: .*step-00000004 .*another rank could not write"], 2),
    (
        metrics_cannot_be_written,
        ["OSError: .*metrics.jsonl could not be written .*No space", "OSError: rank 0 has stopped: .*metrics.jsonl"],
        2,
    ),
    (one_rank_misses_a_shard, ["OSError: rank 1 has stopped: shard-00000", "ValueError: shard-00000.parquet is"], 3),
]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "ends", "last"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_of_one_rank_stops_both_and_the_next_start_goes_on(
    processes, whole_run, tiny_world, tmp_path, fault, ends, last
):
    settings = four_steps(tiny_world, tmp_path)
    for end, found in zip(ends, outcomes(processes, settings, tmp_path, fault), strict=True):
        assert re.match(end, found)
    saved = list_checkpoints(tmp_path / "checkpoints")
    assert load_state(saved[-1]).step == last
    if (aside := tmp_path / "metrics.aside").exists():
        aside.replace(tmp_path / "metrics.jsonl")
    assert outcomes(processes, settings, tmp_path, no_fault) == ["done", "done"]
    assert losses(tmp_path) == losses(whole_run)  # to the last bit
    one, two = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, whole_run))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == []


def gradients_are_counted(rank, settings):
    calls = []

    def counted(exchange):
        return lambda *arguments, **options: calls.append(1) or exchange(*arguments, **options)

    for name in [name for name in dir(torch.distributed) if name.startswith("reduce_scatter")]:  # torch renamed it
        setattr(torch.distributed, name, counted(getattr(torch.distributed, name)))
    file = Path(settings["output"]) / f"exchanges-{rank}.txt"
    return lambda metrics: file.write_text(str(len(calls)))


@pytest.mark.slow
def test_micro_batches_exchange_no_more_gradients(processes, tiny_world, tmp_path):
    counts = []
    for rows in (1, 2):
        (folder := tmp_path / str(rows)).mkdir()
        settings = four_steps(tiny_world, folder)
        for stage in settings["stages"]:
            stage["rows_per_micro_batch"] = rows
        assert outcomes(processes, settings, folder, gradients_are_counted) == ["done", "done"]
        counts.append([int((folder / f"exchanges-{rank}.txt").read_text()) for rank in (0, 1)])
    assert counts[0] == counts[1]
    assert min(counts[0]) > 0


def test_a_checkpoint_of_two_ranks_is_there_as_soon_as_it_is_written(whole_run):
    assert [line["step"] for line in read_metrics(whole_run / "metrics.jsonl")] == [1, 2, 3, 4]  # it waited at step 3


def test_both_ranks_skip_a_step_of_which_one_has_rows_that_are_not_finite(processes, tiny_world, tmp_path):
    settings = four_steps(tiny_world, tmp_path) | {"max_skipped_steps": 2}
    ends = outcomes(processes, settings, tmp_path, some_rows_are_not_finite)
    assert ends[0] == ends[1]
    assert re.match("FloatingPointError: 3 steps .* at step 3 the batch, whose gradient .* utterances u", ends[0])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 2]
