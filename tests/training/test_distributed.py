"""Several ranks train what one trains."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import tiny_recipe

from smoltolk import SmolTolkForCausalLM
from smoltolk.data.dataset import BatchSource
from smoltolk.training.config import make_recipe
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
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
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
