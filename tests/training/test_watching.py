"""What is shown and written of a run while it goes on."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import tiny_model, tiny_recipe

from smoltolk import cli
from smoltolk.training.config import make_recipe
from smoltolk.training.trainer import Trainer
from smoltolk.training.watching import (
    RemainingTime,
    known_peak_flops,
    peak_flops,
    read_metrics,
    scalars,
    shown,
    speed,
    watch,
    write_json_lines,
    write_tensorboard,
    write_wandb,
)


class KilledError(Exception):
    """Ends a run between two checkpoints, as a kill does."""


def killed_and_resumed(settings, kill_at):
    def kill(metrics):
        if metrics["step"] == kill_at:
            raise KilledError

    with pytest.raises(KilledError):
        Trainer(make_recipe(settings), progress=False, on_step=kill).run()
    Trainer(make_recipe(settings), progress=False).run()


def events(folder):
    """Scalars of a TensorBoard folder by name: lists of (step, value)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_mfu_is_the_operations_done_over_those_that_could_be():
    # 8 devices of 1 TFLOP/s could do 16 T in two seconds; 4 T are a quarter.
    assert speed(tokens=3000, flops=4 * 10**12, seconds=2.0, peak=8e12) == {
        "tokens_per_s": 1500.0,
        "flops_per_s": 2e12,
        "mfu": 0.25,
    }
    assert speed(tokens=3000, flops=4 * 10**12, seconds=2.0, peak=None) == {"tokens_per_s": 1500.0, "flops_per_s": 2e12}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA L40", None),
        ("NVIDIA H20", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H200 MIG 1g.18gb", None),
        ("Tesla T4", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_or_it_is_not_said(name, tflops):
    assert known_peak_flops(name) == (None if tflops is None else tflops * 1e12)


def test_a_recipe_can_name_the_peak_and_a_cpu_has_none(tmp_path, monkeypatch):
    recipe = make_recipe(tiny_recipe(tmp_path, tmp_path))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert peak_flops(recipe, cpu) is None
    assert peak_flops(recipe.model_copy(update={"peak_tflops": 0.5}), cpu) == 5e11
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(recipe, gpu) is None  # float32: the peak that is known is that of bfloat16
    assert peak_flops(recipe.model_copy(update={"precision": "bf16"}), gpu) == 989.5e12


def test_metrics_hold_the_speed_and_with_a_peak_the_mfu(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path / "run", peak_tflops=0.1)
    Trainer(make_recipe(settings), progress=False).run()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    for before, line in zip([{"tokens": 0, "flops": 0}, *lines], lines, strict=False):
        assert line["tokens_per_s"] == pytest.approx(4 * 32 / line["seconds"])
        assert line["flops_per_s"] == pytest.approx((line["flops"] - before["flops"]) / line["seconds"])
        assert line["mfu"] == pytest.approx(line["flops_per_s"] / 1e11)


def test_remaining_time_counts_steps_of_other_stages_by_their_work():
    remaining = RemainingTime(work=[10, 30], steps=[4, 3], window=100)
    assert remaining.after(1, 100.0) is None  # the first step may have compiled
    assert remaining.after(2, 102.0) == pytest.approx(2 * 2 + 3 * 6)
    assert remaining.after(4, 106.0) == pytest.approx(3 * 6)
    assert remaining.after(5, 112.0) == pytest.approx(2 * 6)
    assert remaining.after(7, 124.0) == 0


def test_remaining_time_spans_a_round_of_validation_and_forgets_what_is_older():
    remaining = RemainingTime(work=[1], steps=[1000], window=4)
    clock = 0.0
    for step in range(1, 101):
        clock += 50 if step < 50 else 1  # slow at first
        if step % 4 == 0:
            clock += 8  # a validation: every four steps take 12 s
        left = remaining.after(step, clock)
    assert left == pytest.approx(900 * 3)


def test_remaining_time_goes_on_after_a_resume_and_when_steps_are_done_again():
    remaining = RemainingTime(work=[1], steps=[10], window=5)
    assert remaining.after(6, 7.0) is None  # resumed after step 5
    assert remaining.after(7, 9.0) == pytest.approx(3 * 2)
    assert remaining.after(6, 11.0) is None
    assert remaining.after(7, 14.0) == pytest.approx(3 * 3)


def test_the_bar_says_stage_losses_speed_and_time():
    metrics = {"stage": 2, "text_loss": 2.34567, "speech_loss": 3.5, "tokens_per_s": 12345.6}
    assert shown(metrics, None) == "stage 2  text 2.346  speech 3.500  12,346 tokens/s"
    more = metrics | {"text_loss": None, "mfu": 0.4126}
    assert shown(more, 3725.4) == "stage 2  speech 3.500  12,346 tokens/s  41.3 % MFU  1:02:05 left"


def test_the_bar_is_shown_with_what_is_left(tiny_world, tmp_path, capsys):
    Trainer(make_recipe(tiny_recipe(tiny_world, tmp_path, peak_tflops=0.1))).run()
    last = " ".join(capsys.readouterr().err.split())  # a narrow terminal wraps it
    assert all(part in last for part in ("9/9", "stage 2", "tokens/s", "% MFU", "0:00:00 left"))


def test_steps_that_are_done_again_and_a_cut_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    write_json_lines(path, 2)({"step": 3, "loss": 1.0})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_scalars_are_what_was_measured():
    metrics = {"step": 3, "loss": 2.0, "text_loss": None, "layer_weights": [0.25, None, 0.75]}
    assert scalars(metrics) == {"loss": 2.0, "layer_weights/01": 0.25, "layer_weights/03": 0.75}


def test_tensorboard_has_every_step_once_after_a_kill(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path, watch=["tensorboard"])
    killed_and_resumed(settings, kill_at=7)
    read, lines = events(tmp_path / "tensorboard"), read_metrics(tmp_path / "metrics.jsonl")
    assert [step for step, _ in read["loss"]] == list(range(1, 10))
    for name in ("loss", "grad_norm", "tokens_per_s", "validation_text_loss"):
        assert [value for _, value in read[name]] == pytest.approx([line[name] for line in lines if name in line])
    assert [step for step, _ in read["layer_weights/01"]] == [3, 4, 6, 9]
    assert "mfu" not in read


def test_tensorboard_that_comes_later_gets_the_earlier_steps_too(tiny_world, tmp_path):
    recipe = make_recipe(tiny_recipe(tiny_world, tmp_path))
    config = tiny_model().config
    line = {"stage": 1, "text_loss": None, "speech_loss": 1.0, "tokens_per_s": 1.0}
    with watch(recipe, config, 0, has_bar=False) as report:
        for step in (1, 2, 3):
            report({"step": step, "loss": float(step), **line})
    later = recipe.model_copy(update={"watch": ["tensorboard"]})
    with watch(later, config, 2, has_bar=False) as report:
        report({"step": 3, "loss": 3.0, **line})
    assert events(tmp_path / "tensorboard")["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert later.fingerprint == recipe.fingerprint


def test_wandb_writes_a_run_offline_and_goes_on_with_it(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = tiny_recipe(tiny_world, tmp_path, watch=["wandb"])
    killed_and_resumed(settings, kill_at=7)
    run_id = (tmp_path / "wandb-run.txt").read_text()
    written = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert written == [f"run-{run_id}.wandb"] * 2
    assert all(path.stat().st_size > 1000 for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


class StandInRun:
    """A run of W&B as far as it is used: knows the last step, as a resumed run does."""

    def __init__(self):
        self.step, self.logged, self.exit_codes = 0, [], []

    def log(self, values, step):
        self.step = step + 1
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


def test_wandb_logs_every_step_once_into_one_run(tiny_world, tmp_path, monkeypatch):
    runs, calls = {}, []

    def init(**arguments):
        calls.append(arguments)
        return runs.setdefault(arguments["id"], StandInRun())

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    settings = tiny_recipe(tiny_world, tmp_path / "a", watch=["wandb"])
    killed_and_resumed(settings, kill_at=7)
    [run] = runs.values()
    assert [step for step, _ in run.logged] == list(range(1, 10))
    losses = [line["loss"] for line in read_metrics(tmp_path / "a" / "metrics.jsonl")]
    assert [values["loss"] for _, values in run.logged] == losses
    assert run.exit_codes == [1, 0]
    assert [call["project"] for call in calls] == ["smoltolk", "smoltolk"]
    assert calls[0]["config"]["seed"] == 0
    assert calls[0]["resume"] == "allow"

    monkeypatch.setenv("WANDB_PROJECT", "mine")
    other = make_recipe(settings | {"output": str(tmp_path / "b")})
    (tmp_path / "b").mkdir()
    with write_wandb(tmp_path / "b", other):
        assert len(runs) == 2  # another folder, another run
    assert calls[-1]["project"] == "mine"


def test_what_is_not_installed_is_named_before_the_first_step(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'smoltolk\[wandb\]'"):
        Trainer(make_recipe(tiny_recipe(tiny_world, tmp_path, watch=["wandb"])), progress=False).run()
    with pytest.raises(ImportError, match=r"pip install 'smoltolk\[tensorboard\]'"), write_tensorboard(tmp_path, 0):
        pass
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_unknown_watcher_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"watch\.0: 'mlflow' is refused"):
        make_recipe(tiny_recipe(tmp_path, tmp_path, watch=["mlflow"]))


def test_the_report_takes_a_watched_run(tiny_world, tmp_path, capsys):
    Trainer(make_recipe(tiny_recipe(tiny_world, tmp_path / "run", peak_tflops=0.1)), progress=False).run()
    assert cli.main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    assert "MFU" in (tmp_path / "page.html").read_text()
    assert json.loads((tmp_path / "run" / "model" / "training.json").read_text())["flops"] > 0
