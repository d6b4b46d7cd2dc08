"""Ablations: what their files may say, and the recipe of each variant."""

import re

import pytest
import yaml
from tests.conftest import EARLY_FUSION, tiny_recipe
from tests.experiments.conftest import tiny_ablation, write

from smoltolk import cli
from smoltolk.experiments.ablation import RATE, load_ablation, setting_name
from smoltolk.training.config import load_recipe


@pytest.fixture
def settings(tmp_path):
    """An ablation of all of the paper's variants; nothing of it exists."""
    found = tiny_ablation(tmp_path)
    del found["ablation"]["variants"], found["ablation"]["more"]
    return found


@pytest.fixture
def load(settings, tmp_path):
    def load(**changes):
        return load_ablation(write(settings | {"ablation": settings["ablation"] | changes}, tmp_path))

    return load


def recipe_of(ablation, name, seed=0, setting=None, steps=None):
    (variant,) = [v for v in ablation.variants if v.name == name]
    return ablation.recipe_of(variant, variant.sweep[0] if setting is None else setting, seed, "out", steps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sead": 1}, "ablation.sead: unknown key; did you mean seeds"),
        ({"seeds": []}, "ablation.seeds: [] is refused"),
        ({"seeds": [0, 0]}, "ablation.seeds: [0, 0]: 0 stands there twice"),
        ({"seeds": [-1]}, "ablation.seeds.0: -1 is refused"),
        ({"development": "a", "fresh": "a"}, "development and fresh are both a: what settings were chosen on is not"),
        ({"learning_rates": [1e-3, 2e-3]}, "give 3 rates or more"),
        ({"learning_rates": [1e-3, 2e-3, 2e-3]}, "0.002 stands there twice"),
        ({"learning_rates": [1e-3, 2e-3, 0]}, "ablation.learning_rates.2: 0 is refused"),
        ({"budgets": ["flops"]}, "add tokens: rates are chosen at equal tokens"),
        ({"budgets": ["tokens", "hours"]}, "ablation.budgets.1: 'hours' is refused"),
        ({"base": "early"}, "base is 'early': choose one of the variants, smoltolk, early-fusion"),
        ({"variants": ["smoltolk", "early-fussion"]}, "variant early-fussion is unknown; did you mean early-fusion"),
        ({"variants": []}, "ablation.variants: [] is refused"),
        ({"variants": ["smoltolk", "adapter-layers-1"]}, "variant adapter-layers-1 changes nothing in this recipe"),
        ({"more": {"a/b": {}}}, "'a/b' is to be the name of a folder"),
        ({"more": {"a": {"chnges": {}}}}, "ablation.more.a.chnges: unknown key; did you mean changes"),
        ({"more": {"a": {"sweep": {RATE: [1]}}}}, "stages.-1.learning_rate is what learning_rates are"),
        ({"more": {"a": {"sweep": {"seed": []}}}}, "ablation.more.a.sweep.seed: [] is refused"),
        ({"more": {"a": {"learning_rates": []}}}, "ablation.more.a.learning_rates: [] is refused"),
        ({"more": {"a": {"like": "b"}, "b": {"like": "a"}}}, "variant a is like itself, by way of a, b"),
        ({"more": {"a": {"like": "c"}}}, "variant c is unknown"),
        ({"more": {"early-fusion": {"like": "one-stage"}}}, "early-fusion is one of the paper's variants: leave out"),
        (
            {"more": {"a": {"changes": {"model.layer_mixin": "last"}}}},
            "a cannot be used:\n  model.layer_mixin: unk",
        ),
        ({"more": {"a": {"changes": {"stages.2.steps": 1}}}}, "variant a: stages.2.steps: '2' is none of 2"),
        ({"more": {"a": {"changes": {"stages.last.steps": 1}}}}, "'last' is none of 2: give a number from 0, -1"),
        ({"more": {"a": {"changes": {"name.x": 1}}}}, "name.x: there are no settings before 'x'"),
        ({"more": {"a": {"sweep": {"stages.*.adapter": [1]}}}}, "stages.0.adapter: unknown key"),
        (
            {"more": {"a": {"like": "last-layer", "sweep": {"model.selector_entropy_weight": [0, 0.1]}}}},
            "variant a: model.selector_entropy_weight is 0.1, but with layer_mixing 'last' there is no selector",
        ),
        (
            {"more": {"a": {"sweep": {"stages.-1.clip_norm": [1.0, 1.0000001]}}}},
            "variant a sweeps values that look",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_remedy(load, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(**changes)


def test_missing_keys_are_named(settings, tmp_path):
    del settings["ablation"]["fresh"]
    with pytest.raises(ValueError, match=r"ablation\.fresh: missing"):
        load_ablation(write(settings, tmp_path))


def test_faults_of_the_recipe_itself_are_named_as_ever(settings, tmp_path):
    with pytest.raises(ValueError, match=r"sead: unknown key; did you mean seed\?"):
        load_ablation(write(settings | {"sead": 1}, tmp_path))


def test_training_refuses_an_ablation_and_an_ablation_a_plain_recipe(settings, tmp_path, capsys):
    path = write(settings, tmp_path)
    assert cli.main(["train", str(path)]) == 1
    assert f"recipe {path} has a section ablation: run it with smoltolk ablate" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, tmp_path / "run")))
    assert cli.main(["ablate", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "has no section ablation: add one, or run it with smoltolk train" in capsys.readouterr().err


def test_an_ablation_extends_a_recipe(settings, tmp_path):
    ablation = settings.pop("ablation")
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(settings))
    path = write({"extends": "plain.yaml", "ablation": ablation}, tmp_path)
    found = load_ablation(path)
    plain = load_recipe(tmp_path / "plain.yaml").model.model_dump(exclude={"backbone"})
    assert recipe_of(found, "smoltolk").model.model_dump(exclude={"backbone"}) == plain


def test_by_default_all_of_the_papers_variants_run_that_differ_from_the_recipe(load):
    assert [variant.name for variant in load().variants] == [
        "smoltolk",
        "early-fusion",
        "no-input-adapter",
        "no-output-adapter",
        "last-layer",
        "static-weights",
        "no-residual",
        "one-stage",
        "adapter-layers-0",
        "adapter-layers-2",  # not 1: the recipe has one layer in both adapters
        "adapter-layers-4",
    ]


def test_named_variants_keep_their_order_and_own_ones_follow(load):
    found = load(variants=["one-stage", "smoltolk"], more={"own": {"changes": {"model.speech_residual": False}}})
    assert [variant.name for variant in found.variants] == ["one-stage", "smoltolk", "own"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("smoltolk", {}),
        ("early-fusion", {**EARLY_FUSION, "selector_entropy_weight": 0}),
        ("no-input-adapter", {"num_input_adapter_layers": 0}),
        ("no-output-adapter", {"num_output_adapter_layers": 0}),
        ("last-layer", {"layer_mixing": "last", "selector_entropy_weight": 0}),
        ("static-weights", {"layer_mixing": "static", "selector_entropy_weight": 0}),
        ("no-residual", {"speech_residual": False}),
        ("one-stage", {}),
        ("adapter-layers-0", {"num_input_adapter_layers": 0, "num_output_adapter_layers": 0}),
        ("adapter-layers-4", {"num_input_adapter_layers": 4, "num_output_adapter_layers": 4}),
    ],
)
def test_variants_are_these_architectures_and_nothing_else_changes(load, name, changes):
    ablation = load()
    plain, recipe = (recipe_of(ablation, some) for some in ("smoltolk", name))
    assert recipe.model.model_dump() == plain.model.model_dump() | changes
    assert recipe.data == plain.data
    if name != "one-stage":
        assert recipe.stages == plain.stages


def test_one_stage_gives_the_frozen_stages_tokens_to_the_last_and_keeps_the_share_of_its_decay(settings, tmp_path):
    settings["stages"][0] |= {"steps": 5, "rows_per_step": 8}
    (stage,) = recipe_of(load_ablation(write(settings, tmp_path)), "one-stage").stages
    assert stage.steps == 5 + 5 * 8 // 4  # the first stage had twice the rows
    assert stage.decay_steps == 6
    assert stage.train == "everything"


def test_a_recipe_of_one_stage_has_no_variant_one_stage(settings, tmp_path):
    del settings["stages"][0]
    assert "one-stage" not in [v.name for v in load_ablation(write(settings, tmp_path)).variants]
    settings["ablation"]["variants"] = ["smoltolk", "one-stage"]
    with pytest.raises(ValueError, match="no first stage that trains speech alone before another: leave it out"):
        load_ablation(write(settings, tmp_path))


def test_each_seed_has_its_own_paths_and_the_same_rows_for_all_variants(load, tmp_path):
    ablation = load()
    for name in ("smoltolk", "early-fusion"):
        recipe = recipe_of(ablation, name, seed=1)
        assert recipe.seed == 1
        assert recipe.model.backbone == str(tmp_path / "seed-1" / "backbone")
        assert recipe.data.speech[0].store == str(tmp_path / "seed-1" / "store")
    assert ablation.development(1) == tmp_path / "seed-1" / "development.parquet"
    assert ablation.fresh(0) == tmp_path / "seed-0" / "fresh.parquet"


def test_rates_are_tried_with_all_else_that_is_swept(load):
    own = {
        "like": "early-fusion",
        "changes": {"model": {"tie_speech_embeddings": False}, "stages.*.clip_norm": 0.5, "stages.-1.warmup_steps": 2},
        "sweep": {"stages.*.weight_decay": [0.0, 0.1]},
        "learning_rates": [3e-3, 1e-3],
    }
    ablation = load(more={"own": own, "early-fusion": {"learning_rates": [0.5]}, "same": {"like": "own"}})
    variants = {variant.name: variant for variant in ablation.variants}
    assert [s[RATE] for s in variants["smoltolk"].sweep] == [1e-3, 3e-3, 1e-2]
    assert [s[RATE] for s in variants["early-fusion"].sweep] == [0.5]
    sweep = [(s[RATE], s["stages.*.weight_decay"]) for s in variants["own"].sweep]
    assert sweep == [(1e-3, 0.0), (1e-3, 0.1), (3e-3, 0.0), (3e-3, 0.1)]
    assert variants["same"].sweep == variants["own"].sweep
    recipe = recipe_of(ablation, "own", setting=variants["own"].sweep[2])
    assert (recipe.model.layer_mixing, recipe.model.tie_speech_embeddings) == ("last", False)
    assert [stage.learning_rate for stage in recipe.stages] == [1e-2, 3e-3]
    assert [stage.weight_decay for stage in recipe.stages] == [0.0, 0.0]
    assert [stage.clip_norm for stage in recipe.stages] == [0.5, 0.5]
    assert [stage.warmup_steps for stage in recipe.stages] == [1, 2]
    assert setting_name(variants["own"].sweep[3]) == "rate=0.003,stages.all.weight_decay=0.1"


def test_other_steps_change_the_last_stage_and_its_decay_in_proportion(load):
    stages = recipe_of(load(), "smoltolk", steps=15).stages
    assert [(stage.steps, stage.decay_steps) for stage in stages] == [(4, 0), (15, 6)]
    assert recipe_of(load(), "smoltolk", steps=1).stages[-1].decay_steps == 0  # after one step of warm-up


def test_yaml_aliases_are_not_one_setting(settings, tmp_path):
    settings["ablation"]["more"] = {"own": {"changes": {"data.speech.0.weight": 0.5}}}
    store = settings["data"]["speech"]
    assert settings["data"]["interleaved"] is store
    recipe = recipe_of(load_ablation(write(settings, tmp_path)), "own")
    assert (recipe.data.speech[0].weight, recipe.data.interleaved[0].weight) == (0.5, 1.0)
