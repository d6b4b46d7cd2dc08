"""Training: exact resume, stages, faults."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import EARLY_FUSION, tiny_recipe
from transformers import AutoModelForCausalLM

from smoltolk import SmolTolkForCausalLM
from smoltolk.speech.mel import MelTokenizer
from smoltolk.training import checkpoints
from smoltolk.training.checkpoints import list_checkpoints, load_state
from smoltolk.training.config import make_recipe
from smoltolk.training.stopping import TrainingStopped
from smoltolk.training.trainer import Trainer
from smoltolk.training.watching import MEASURED, read_metrics


def run(settings, **arguments):
    return Trainer(make_recipe(settings), progress=False, **arguments).run()


def weights(folder):
    return load_file(folder / "model.safetensors")


def curve(folder):
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def assert_same_run(a, b):
    ours, theirs = weights(a / "model"), weights(b / "model")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert curve(a) == curve(b)


@pytest.fixture(scope="module")
def whole_run(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(tiny_recipe(tiny_world, folder))
    return folder


def test_stage_1_trains_the_speech_parts_and_stage_2_everything(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path)
    recipe = make_recipe(settings | {"stages": settings["stages"][:1]})
    before = {name: p.detach().clone() for name, p in Trainer(recipe, progress=False).model.named_parameters()}
    after = dict(SmolTolkForCausalLM.from_pretrained(Trainer(recipe, progress=False).run()).named_parameters())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not name.startswith("lm.")}

    both = settings | {"output": str(tmp_path / "both")}
    after = dict(SmolTolkForCausalLM.from_pretrained(run(both)).named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_metrics_have_both_losses_and_validation_has_every_task(whole_run):
    lines = curve(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert all(line["text_loss"] > 0 and line["speech_loss"] > 0 for line in lines[:4])
    validated = [line for line in lines if "validation_speech_loss" in line]
    assert [line["step"] for line in validated] == [3, 4, 6, 9]
    assert all(line[f"validation_{t}_loss"] > 0 for line in validated for t in ("interleaved", "speech", "text"))
    assert lines[-1]["tokens"] == 9 * 4 * 32
    assert lines[-1]["flops"] > 0
    assert lines[0]["learning_rate"] == pytest.approx(1e-2)
    assert [line["learning_rate"] for line in lines[4:]] == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 5e-4])


def test_metrics_watch_the_parts_the_selector_and_what_the_text_lm_forgets(whole_run, tiny_world):
    lines = curve(whole_run)
    for line in lines:
        norms = [line[f"{part}_grad_norm"] for part in ("speech", "text") if f"{part}_grad_norm" in line]
        assert len(norms) == (1 if line["stage"] == 1 else 2)
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-5)
    watched = [line for line in lines if "selector_entropy" in line]
    assert [line["step"] for line in watched] == [3, 4, 6, 9]
    for line in watched:
        assert sum(line["layer_weights"]) == pytest.approx(1, abs=1e-4)
        assert 0 < line["selector_entropy"] <= math.log(len(line["layer_weights"])) + 1e-6
    frozen, trained = watched[1], watched[-1]
    assert frozen["text_forgetting"] == pytest.approx(0, abs=1e-6)  # stage 1 does not touch the text LM
    assert trained["text_forgetting"] != pytest.approx(0, abs=1e-3)
    trainer = Trainer(make_recipe(tiny_recipe(tiny_world, whole_run)), progress=False)
    batch = trainer._validation["text"]
    backbone = AutoModelForCausalLM.from_pretrained(tiny_world / "backbone").eval()
    with torch.no_grad():
        own = backbone(batch.input_ids, labels=batch.labels).loss.item()
    assert trained["validation_text_loss"] - trained["text_forgetting"] == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("stop_at", [3, 4, 6])
def test_a_stopped_run_goes_on_to_the_very_same_end(tiny_world, tmp_path, whole_run, stop_at):
    settings = tiny_recipe(tiny_world, tmp_path)

    def interrupt(metrics):
        if metrics["step"] == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingStopped, match=f"stopped after step {stop_at} of 9, .* run the same command"):
        run(settings, on_step=interrupt)
    assert load_state(list_checkpoints(tmp_path / "checkpoints")[-1]).step == stop_at
    run(settings)
    assert_same_run(tmp_path, whole_run)


def test_a_killed_run_goes_on_to_the_very_same_end(tiny_world, tmp_path, whole_run):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(tiny_world, tmp_path)))
    command = [sys.executable, "-m", "smoltolk", "train", str(recipe), "--no-progress"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(read_metrics(metrics)) >= 3):
        time.sleep(0.005)
    process.kill()
    process.wait()
    run(tiny_recipe(tiny_world, tmp_path))
    assert_same_run(tmp_path, whole_run)


def test_micro_batches_change_nothing_but_rounding(tiny_world, tmp_path, whole_run):
    settings = tiny_recipe(tiny_world, tmp_path)
    for stage in settings["stages"]:
        stage["rows_per_micro_batch"] = 4
    run(settings)
    for ours, theirs in zip(curve(tmp_path), curve(whole_run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("setting", ["compile", "gradient_checkpointing"])
def test_compiling_and_checkpointing_change_nothing_but_rounding(tiny_world, tmp_path, whole_run, setting, monkeypatch):
    compile_layers = SmolTolkForCausalLM.compile_layers
    compiled = []

    def with_a_quick_backend(model):
        compiled.append(True)
        compile_layers(model, backend="aot_eager")

    monkeypatch.setattr(SmolTolkForCausalLM, "compile_layers", with_a_quick_backend)
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else it would go on uncompiled
        run(tiny_recipe(tiny_world, tmp_path, **{setting: True}))
    assert compiled == [True] * (setting == "compile")
    for ours, theirs in zip(curve(tmp_path), curve(whole_run), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


def test_a_model_that_shall_switch_learns_the_switch_too(tiny_world, tmp_path, whole_run):
    settings = tiny_recipe(tiny_world, tmp_path)
    settings["model"] |= {"predict_switch": True, "rope_theta": 5e4, "max_position_embeddings": 300}
    model = SmolTolkForCausalLM.from_pretrained(run(settings))
    assert model.config.predict_switch
    assert model.config.max_position_embeddings == 300
    more = [
        ours["text_labels"] + ours["speech_labels"] - theirs["text_labels"] - theirs["speech_labels"]
        for ours, theirs in zip(curve(tmp_path), curve(whole_run), strict=True)
    ]
    assert all(count > 0 for count in more[:4])  # stage 1 is interleaved; stage 2 may draw no switch
    assert min(more) >= 0
    for line in curve(tmp_path):
        labels = line["text_labels"] + line["speech_labels"]
        total = sum((line[f"{m}_loss"] or 0) * line[f"{m}_labels"] for m in ("text", "speech"))
        assert line["loss"] == pytest.approx(total / labels, rel=1e-5)


ALL_TASKS = {"interleaved": 1, "speech": 1, "text": 1, "transcription": 1, "synthesis": 1}


@pytest.mark.parametrize("predict_switch", [False, True])
@pytest.mark.parametrize("kind", ["alternate", "poisson", "coin", "sentence"])
def test_every_policy_trains_beside_transcription_and_synthesis(tiny_world, tmp_path, kind, predict_switch):
    settings = tiny_recipe(tiny_world, tmp_path)
    store = [{"store": str(tiny_world / "store")}]
    settings["data"] = dict.fromkeys(ALL_TASKS, store) | {"policy": {"kind": kind}}
    settings["model"]["predict_switch"] = predict_switch
    stage = settings["stages"][1] | {"steps": 3, "rows_per_step": 10, "row_tokens": 80, "mixture": ALL_TASKS}
    run(settings | {"stages": [stage]})
    last = curve(tmp_path)[-1]
    assert all(last[f"validation_{task}_loss"] > 0 for task in ALL_TASKS)
    assert 0 < last["text_loss"] < 10
    assert 0 < last["speech_loss"] < 10


def test_batches_drawn_ahead_by_processes_train_the_very_same_model(tiny_world, tmp_path, whole_run):
    settings = tiny_recipe(tiny_world, tmp_path, loader_workers=2)
    others = set(multiprocessing.active_children())  # of tests before this one

    def interrupt(metrics):
        if metrics["step"] == 3:
            workers = set(multiprocessing.active_children()) - others
            assert len(workers) == 2
            for process in (*(worker.pid for worker in workers), os.getpid()):  # as Ctrl-C in a terminal
                os.kill(process, signal.SIGINT)

    with pytest.raises(TrainingStopped, match="stopped after step 3 of 9"):
        run(settings, on_step=interrupt)
    run(settings)
    assert_same_run(tmp_path, whole_run)
    assert set(multiprocessing.active_children()) <= others


def test_early_fusion_sees_the_same_rows(tiny_world, tmp_path, whole_run):
    settings = tiny_recipe(tiny_world, tmp_path)
    settings["model"] = {"backbone": settings["model"]["backbone"], **EARLY_FUSION}
    run(settings)
    counts = ("step", "tokens", "text_labels", "speech_labels")
    assert [[line[k] for k in counts] for line in curve(tmp_path)] == [
        [line[k] for k in counts] for line in curve(whole_run)
    ]
    assert curve(tmp_path)[-1]["flops"] < curve(whole_run)[-1]["flops"]


def test_a_full_disk_leaves_the_last_checkpoint_intact(tiny_world, tmp_path, whole_run, monkeypatch):
    settings = tiny_recipe(tiny_world, tmp_path)
    save = checkpoints.dcp.save

    def disk_full(state, checkpoint_id, **settings):
        if "00000006" in str(checkpoint_id):
            checkpoint_id.mkdir()
            (checkpoint_id / "half").write_bytes(bytes(100))
            raise OSError(28, "No space left on device")
        save(state, checkpoint_id=checkpoint_id, **settings)

    monkeypatch.setattr(checkpoints.dcp, "save", disk_full)
    with pytest.raises(OSError, match=r"step-00000006 could not be written .*No space left.*make room"):
        run(settings)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    monkeypatch.undo()
    run(settings)
    assert_same_run(tmp_path, whole_run)


def test_steps_that_are_not_finite_are_skipped_counted_and_stop_the_run(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path, max_skipped_steps=2)
    trainer = Trainer(make_recipe(settings), progress=False)
    with torch.no_grad():
        trainer.model.unit_embeddings.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match=r"3 steps .* max_skipped_steps 2.* utterances u\d"):
        trainer.run()
    lines = curve(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [1, 2]
    assert all(line["loss"] is None for line in lines)


def test_a_run_that_skipped_too_many_steps_goes_on_with_more_patience(tiny_world, tmp_path, monkeypatch):
    forward, settings = Trainer._forward, tiny_recipe(tiny_world, tmp_path, max_skipped_steps=0)

    def poisoned(trainer, batch, *arguments):
        output = forward(trainer, batch, *arguments)
        if arguments and trainer.model.training and any("u1" in row for row in trainer._sources[-1].sample_ids(batch)):
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(Trainer, "_forward", poisoned)
    with pytest.raises(FloatingPointError, match="raise max_skipped_steps to go on"):
        run(settings)
    run(settings | {"max_skipped_steps": 9})
    last = curve(tmp_path)[-1]
    assert last["step"] == 9
    assert last["skipped_steps"] > 1


def test_checkpoints_change_nothing_though_the_first_steps_were_skipped(tiny_world, tmp_path, monkeypatch):
    step = Trainer._step

    def poisoned(trainer, state, batch, optimizer, *arguments):
        hook = None
        if state.step < 2:
            head = trainer.model.unit_embeddings.weight
            hook = head.register_hook(lambda gradient: gradient * float("nan"))
        metrics = step(trainer, state, batch, optimizer, *arguments)
        if hook is not None:
            hook.remove()
        return metrics

    monkeypatch.setattr(Trainer, "_step", poisoned)
    for every_steps in (1, 3):
        run(tiny_recipe(tiny_world, tmp_path / f"{every_steps}", checkpoint={"every_steps": every_steps}))
    assert [line["skipped_steps"] for line in curve(tmp_path / "1")[:3]] == [1, 2, 2]
    assert_same_run(tmp_path / "1", tmp_path / "3")


def test_forgetting_is_not_measured_against_another_validation_set(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path)

    def interrupt(metrics):
        if metrics["step"] == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        run(settings, on_step=interrupt)
    run(settings | {"validation": settings["validation"] | {"rows": 2}})
    assert [line["step"] for line in curve(tmp_path) if "text_forgetting" in line] == [3, 4]
    assert [line["step"] for line in curve(tmp_path) if "validation_text_loss" in line] == [3, 4, 6, 9]


def test_another_recipe_does_not_go_on_with_a_run(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path)
    run(settings)
    settings["stages"][1]["learning_rate"] = 0.5
    changed = r"\(seed was 0, is 1; stages\.1\.learning_rate was [\d.]+, is 0\.5\)"
    with pytest.raises(ValueError, match=f"holds a run of another recipe {changed}"):
        run(settings | {"seed": 1, "name": "may change"})


def test_a_model_that_no_checkpoint_belongs_to_is_not_written_over(tiny_world, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds a model, but no checkpoint to go on from, so it would be written over"):
        run(tiny_recipe(tiny_world, tmp_path))
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_attention_kernel_that_is_not_there_is_named(tiny_world, tmp_path):
    with pytest.raises(ValueError, match=r"attn_implementation is 'fast', which cannot be used: .*; sdpa can"):
        run(tiny_recipe(tiny_world, tmp_path, attn_implementation="fast"))


def test_a_row_longer_than_the_backbones_positions_is_refused(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path)
    settings["stages"][0]["row_tokens"] = 257
    with pytest.raises(ValueError, match="row_tokens is 257, but the backbone has 256 positions"):
        run(settings)


def test_a_store_of_another_text_tokenizer_is_refused(tiny_world, tmp_path):
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    for file in (tiny_world / "backbone").iterdir():
        (backbone / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((backbone / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (backbone / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = tiny_recipe(tiny_world, tmp_path / "run")
    settings["model"]["backbone"] = str(backbone)
    with pytest.raises(ValueError, match="was made with the text tokenizer"):
        run(settings)


def test_a_missing_or_foreign_speech_tokenizer_is_refused_before_training(tiny_world, tmp_path):
    with pytest.raises(ValueError, match="holds no speech tokenizer"):
        run(tiny_recipe(tiny_world, tmp_path, speech_tokenizer=str(tmp_path / "none")))
    noise = np.random.default_rng(0).normal(size=32000).astype(np.float32)
    MelTokenizer.fit([noise], num_units=4).save(tmp_path / "other")
    with pytest.raises(ValueError, match="but the stores hold units of speech-0"):
        run(tiny_recipe(tiny_world, tmp_path, speech_tokenizer=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="is not a whole vocoder"):
        run(tiny_recipe(tiny_world, tmp_path, vocoder=str(tmp_path / "none")))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_finished_run_is_not_run_again(tiny_world, tmp_path, whole_run):
    before = (whole_run / "metrics.jsonl").stat().st_mtime_ns, weights(whole_run / "model")
    run(tiny_recipe(tiny_world, whole_run))
    assert curve(whole_run)[-1]["step"] == 9
    assert all(torch.equal(weights(whole_run / "model")[name], w) for name, w in before[1].items())
