"""What a recipe will need is said before it starts."""

from pathlib import Path

import pytest
import torch
from tests.conftest import EARLY_FUSION, mixed_ids, tiny_lm_config, tiny_model, tiny_recipe
from tests.training.backbones import CONFIGS
from transformers import GPT2Config

from smoltolk import cli
from smoltolk.training.config import LoraSettings, load_recipe, make_recipe
from smoltolk.training.lora import add_lora, lora_size
from smoltolk.training.plan import GIB, kept_bytes, make_plan, memory_by_use
from smoltolk.training.watching import read_metrics


def bytes_kept_by(model, ids, is_bf16):
    """Bytes of all tensors but parameters that a forward pass keeps for its backward."""
    found, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
    ):
        model(ids, labels=ids)
    return sum(size for place, (size, _) in found.items() if place not in parameters)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_layer_keeps_as_many_bytes_as_counted(is_bf16):
    kept = []
    for layers in (2, 4):
        model = tiny_model(lm_config=tiny_lm_config(num_hidden_layers=layers), layer_mixing="last").train()
        kept.append(bytes_kept_by(model, mixed_ids(ids=model.ids), is_bf16))
    per_layer = (kept[1] - kept[0]) / 2
    assert kept_bytes(model.config, 2, 40, is_bf16) == pytest.approx(per_layer, rel=0.1)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_a_layer_with_lora_keeps_as_many_bytes_as_counted(is_bf16):
    lora, kept = LoraSettings(rank=4), []
    for layers in (2, 4):
        model = tiny_model(lm_config=tiny_lm_config(num_hidden_layers=layers), **EARLY_FUSION).train()
        add_lora(model, lora)
        kept.append(bytes_kept_by(model, mixed_ids(ids=model.ids), is_bf16))
    assert kept_bytes(model.config, 2, 40, is_bf16, lora) == pytest.approx((kept[1] - kept[0]) / 2, rel=0.1)


def test_the_plan_knows_lora(tiny_world, tmp_path):
    from smoltolk.training.trainer import Trainer

    settings = tiny_recipe(tiny_world, tmp_path)
    everything = make_plan(make_recipe(settings))
    settings["stages"][1] |= {"train": "lora", "lora": {"rank": 4}}
    recipe = make_recipe(settings)
    plan = make_plan(recipe)
    trainer = Trainer(recipe, progress=False)
    trainer.run()
    assert sum(plan.parts.values()) == sum(p.numel() for p in trainer.model.parameters())
    assert plan.parts["lora"] == lora_size(trainer.model)
    first, second = plan.stages
    assert second.trained == first.trained + plan.parts["lora"]
    assert second.trained + second.frozen == sum(plan.parts.values())
    assert second.memory_bytes < everything.stages[1].memory_bytes
    assert first.flops == everything.stages[0].flops
    assert second.flops < everything.stages[1].flops
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert sum(stage.flops for stage in plan.stages) == pytest.approx(last["flops"], rel=0.15)


def test_the_plan_knows_the_teacher(tiny_world, tmp_path):
    from smoltolk.training.trainer import Trainer

    settings = tiny_recipe(tiny_world, tmp_path)
    plain = make_plan(make_recipe(settings))
    for stage in settings["stages"]:
        stage["distillation"] = {"hidden_states": 3, "word": 1}
    recipe = make_recipe(settings)
    plan = make_plan(recipe)
    trainer = Trainer(recipe, progress=False)
    trainer.run()
    weights = sum(p.numel() for _, p in trainer.model.text_parameters())
    levels = 3 * 32 * 2 * 32  # layers, width, rows and tokens of a micro-batch
    for ours, theirs in zip(plan.stages, plain.stages, strict=True):
        assert ours.memory_bytes - theirs.memory_bytes == 4 * (weights + levels)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert sum(stage.flops for stage in plan.stages) == pytest.approx(last["flops"], rel=0.15)


def test_the_plan_is_what_the_run_then_does(tiny_world, tmp_path):
    from smoltolk.training.trainer import Trainer

    recipe = make_recipe(tiny_recipe(tiny_world, tmp_path))
    plan = make_plan(recipe)
    trainer = Trainer(recipe, progress=False)
    trainer.run()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert sum(plan.parts.values()) == sum(p.numel() for p in trainer.model.parameters())
    assert sum(stage.tokens for stage in plan.stages) == last["tokens"]
    assert sum(stage.flops for stage in plan.stages) == pytest.approx(last["flops"], rel=0.15)
    assert (plan.num_units, plan.is_assumed) == (trainer.model.config.num_units, False)
    first, second = plan.stages
    assert first.trained + first.frozen == second.trained
    assert second.frozen == 0
    assert second.hours == pytest.approx(second.flops / (0.3 * 989.5e12) / 3600)


def test_hours_follow_the_recipes_peak_and_units_those_of_any_store(tiny_world, tmp_path):
    settings = tiny_recipe(tiny_world, tmp_path)
    hours = make_plan(make_recipe(settings)).stages[1].hours
    quick = make_recipe(settings | {"peak_tflops": 1979})
    assert make_plan(quick).stages[1].hours == pytest.approx(hours / 2)
    assert make_plan(quick, peak_tflops=98.95).stages[1].hours == pytest.approx(10 * hours)
    settings["data"] = {"transcription": settings["data"]["speech"]}
    settings["stages"] = [settings["stages"][1] | {"mixture": {"transcription": 1}}]
    assert not make_plan(make_recipe(settings)).is_assumed


def test_memory_falls_with_more_gpus_and_with_checkpointing(tiny_world, tmp_path):
    recipe = make_recipe(tiny_recipe(tiny_world, tmp_path))
    model, stage = tiny_model(), recipe.stages[1]
    alone, two = (memory_by_use(model, recipe, stage, gpus) for gpus in (1, 2))
    parameters = sum(p.numel() for p in model.parameters())
    assert alone["weights"] == 4 * parameters
    assert alone["moments"] == 8 * parameters
    assert two["weights"] == 2 * parameters
    checkpointed = recipe.model_copy(update={"gradient_checkpointing": True})
    assert memory_by_use(model, checkpointed, stage, 1)["activations"] < alone["activations"] / 2


def test_what_cannot_fit_or_be_shared_is_refused(tiny_world, tmp_path):
    recipe = make_recipe(tiny_recipe(tiny_world, tmp_path))
    with pytest.raises(ValueError, match=r"stage 1 needs about 1\.\d GiB on each of 1 GPUs, more than memory_gib 1:"):
        make_plan(recipe, memory_gib=1)
    with pytest.raises(ValueError, match="rows_per_step 4 is not a multiple of 3 GPUs x rows_per_micro_batch 2"):
        make_plan(recipe, gpus=3)
    with pytest.raises(ValueError, match="mfu is 0: give more than 0"):
        make_plan(recipe, mfu=0)
    with pytest.raises(ValueError, match="mfu is 40: give a share of the peak, 1 at most"):
        make_plan(recipe, mfu=40)
    with pytest.raises(ValueError, match="memory_gib is nan: give more than 0"):
        make_plan(recipe, memory_gib=float("nan"))
    assert make_plan(recipe).stages[0].memory_bytes < 2 * GIB


def test_a_backbone_of_another_family_is_refused_by_its_type(tiny_world, tmp_path):
    recipe = make_recipe(tiny_recipe(tiny_world, tmp_path))
    with pytest.raises(ValueError, match="the backbone is of type 'gpt2': SmolTolk builds on"):
        make_plan(recipe, lm_config=GPT2Config(vocab_size=90))


def test_the_command_prints_the_plan_without_weights(tiny_world, tmp_path, capsys):
    import yaml

    settings = tiny_recipe(tiny_world, tmp_path)
    settings["model"]["backbone"] = "nobody/nothing"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["plan", str(tmp_path / "recipe.yaml")]) == 1
    assert "backbone nobody/nothing cannot be read" in capsys.readouterr().err
    backbone = str(tiny_world / "backbone")
    assert cli.main(["plan", str(tmp_path / "recipe.yaml"), "--gpus", "2", "--lm-config", backbone]) == 0
    shown = capsys.readouterr().out
    assert "input_adapter" in shown
    assert "2 GPUs" in shown


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=str)
def test_a_shipped_recipe_fits_and_says_what_it_needs(path):
    recipe, is_tiny = load_recipe(path), "tiny" in path.name
    stages = make_plan(recipe, gpus=1 if is_tiny else 8, lm_config=CONFIGS[recipe.model.backbone]()).stages
    tokens, flops = (sum(getattr(stage, name) for stage in stages) for name in ("tokens", "flops"))
    header = path.read_text().split("name:")[0]
    assert f"  {'' if is_tiny else 'torchrun --nproc-per-node 8 -m '}smoltolk train {path}\n" in header
    assert "Hardware: " in header
    assert f"Tokens: {tokens:.3g}. FLOPs: {flops:.3g}." in header
    memory_gib = max(stage.memory_bytes for stage in stages) / GIB
    assert (f": {memory_gib:.1f} GiB, a minute" if is_tiny else f"{memory_gib:.0f} GiB on each GPU") in header
    hours = sum(stage.hours for stage in stages)
    assert is_tiny or f" {hours:.1f} hours at 30 % MFU of 989.5 TFLOP/s" in header
    twin = path.with_name(path.name.replace("smoltolk", "early-fusion").replace("tiny.", "tiny-early-fusion."))
    assert twin.is_file()
    if twin != path:
        assert load_recipe(twin).stages == recipe.stages
        assert load_recipe(twin).data == recipe.data
