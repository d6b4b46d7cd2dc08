"""Recipes: what is refused, and how it is said."""

import re
from pathlib import Path

import pytest
import yaml
from tests.conftest import tiny_recipe

from smoltolk import SmolTolkConfig
from smoltolk.data.policies import CoinPolicy, PoissonPolicy, SentencePolicy, SpanPolicy
from smoltolk.training.config import ModelSettings, load_recipe, make_recipe
from smoltolk.training.optim import trapezoid


@pytest.fixture
def settings(tmp_path):
    return tiny_recipe(tmp_path, tmp_path / "run")


def put(settings, key, value):
    *path, last = key.split(".")
    for part in path:
        settings = settings[int(part) if part.isdigit() else part]
    settings[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sead", 1, "sead: unknown key; did you mean seed?"),
        ("model.layer_mixin", "last", "model.layer_mixin: unknown key; did you mean layer_mixing"),
        ("stages.0.learning_rat", 1, "stages.0.learning_rat: unknown key; did you mean learning_rate"),
        ("stages.1.mixture.speach", 1, "stages.1.mixture.speach: unknown key; did you mean speech"),
        ("data.interleaved.0.stor", "x", "data.interleaved.0.stor: unknown key; did you mean store"),
        ("model.layer_mixing", "first", "model.layer_mixing: 'first' is refused"),
        ("stages.0.steps", 0, "stages.0.steps: 0 is refused"),
        ("stages.0.learning_rate", -1, "stages.0.learning_rate: -1 is refused"),
        ("stages.0.rows_per_micro_batch", 3, "rows_per_step 4 is not a multiple of rows_per_micro_batch 3"),
        (
            "stages.1.decay_steps",
            9,
            "stages: stage 2: warmup_steps 1 and decay_steps 9 do not fit into its 5 steps: lower",
        ),
        ("stages.1.mixture.synthesis", 1, "stage 2: mixture has synthesis, but data.synthesis names no store: give it"),
        ("model.depth", 3, "model.depth: unknown key; known are backbone, num_input_adapter_layers"),
        ("model", None, "model: None is refused: it is a section, give its keys"),
        ("stages", [], "stages: [] is refused"),
        ("precision", "fp8", "precision: 'fp8' is refused"),
        ("stages.0.mixture.transcribe", 1, "stages.0.mixture.transcribe: unknown key; did you mean transcription"),
        ("data.policy", {"kind": "coin", "share": 0.5}, "data.policy.share: unknown key; known are kind, speech_share"),
        ("data.policy", {"kind": "toss"}, "data.policy: {'kind': 'toss'} is refused"),
        ("data.policy", {"share": 0.5}, "data.policy.kind: missing"),
        ("data.policy", {"kind": "coin", "speech_share": 2}, "speech_share is 2.0: give a share from 0 to 1"),
        ("data.policy", {"kind": "poisson", "mean_words": 0}, "mean_words is 0.0: give a mean length"),
        ("data.policy", {"kind": "alternate", "text_words": [3, 1]}, "text_words is (3, 1): give 1 <= fewest"),
        ("data.text_words", [3, 1], "text_words is (3, 1): give 1 <= fewest"),
        ("stages.1.betas", [0.9, 1.5], "stages.1.betas.1: 1.5 is refused"),
        ("stages.1.learning_rate", float("inf"), "stages.1.learning_rate: inf is refused"),
        ("stages.0.mixture", {}, "stages.0.mixture: interleaved, speech, text, transcription, synthesis are all 0"),
        ("stages.0.mixture", {"speech": float("inf")}, "stages.0.mixture.speech: inf is refused"),
        ("stages.0.warmup_steps", 9, "  stages: stage 1: warmup_steps 9 and decay_steps 0 do not fit into its 4 steps"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_the_remedy(settings, key, value, message):
    put(settings, key, value)
    if key == "data.policy":
        del settings["data"]["text_words"], settings["data"]["speech_words"]
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(settings)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"kind": "alternate", "text_words": [2, 3]}, SpanPolicy(text_words=(2, 3))),
        ({"kind": "poisson", "share": 0.4, "spans": "text"}, PoissonPolicy(share=0.4, spans="text")),
        ({"kind": "coin"}, CoinPolicy()),
        ({"kind": "sentence", "speech_share": 0.25}, SentencePolicy(0.25)),
    ],
)
def test_a_recipe_chooses_its_policy(settings, policy, expected):
    assert make_recipe(settings).data.policy.make() == SpanPolicy((2, 4), (2, 4))  # as recipes without policy say it
    del settings["data"]["text_words"], settings["data"]["speech_words"]
    assert make_recipe(settings).data.policy.make() == SpanPolicy()
    assert make_recipe(settings | {"data": settings["data"] | {"policy": policy}}).data.policy.make() == expected


def test_words_beside_a_policy_are_refused(settings):
    settings["data"]["policy"] = {"kind": "coin"}
    with pytest.raises(ValueError, match=r"data: .*speech_words and text_words stand beside policy: put them into"):
        make_recipe(settings)


def test_what_changes_no_batch_changes_no_fingerprint(settings):
    recipe = make_recipe(settings)
    assert make_recipe(settings | {"loader_workers": 3}).fingerprint == recipe.fingerprint
    assert make_recipe(settings | {"max_skipped_steps": 99}).fingerprint == recipe.fingerprint
    assert recipe.fingerprint != make_recipe(settings | {"seed": 5}).fingerprint


def test_a_missing_key_is_named(settings):
    del settings["model"]["backbone"]
    with pytest.raises(ValueError, match=r"model\.backbone: missing"):
        make_recipe(settings)


def test_a_recipe_is_read_from_yaml(settings, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert load_recipe(path) == make_recipe(settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n- b", "holds no settings"), ("a: [", "is not YAML"), (None, "cannot be read")],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_the_models_settings_are_those_of_the_configuration():
    config = SmolTolkConfig()
    for name, field in ModelSettings.model_fields.items():
        # The others are resolved from the backbone, or change its own configuration.
        if name not in ("backbone", "initializer_range", "rope_theta", "max_position_embeddings"):
            assert getattr(config, name) == field.default, name


def test_the_learning_rate_rises_stays_and_falls(settings):
    put(settings, "stages.0.steps", 10)
    put(settings, "stages.0.warmup_steps", 4)
    put(settings, "stages.0.decay_steps", 2)
    stage = make_recipe(settings).stages[0]
    assert [trapezoid(step, stage) for step in range(10)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5]


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path):
    recipe = load_recipe(path)
    assert f"smoltolk train {path}" in path.read_text()
    assert recipe.num_steps > 0


def test_a_recipe_extends_another(settings, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "twin.yaml").write_text("extends: ../base.yaml\nname: twin\nmodel: {speech_residual: false}\n")
    base, twin = load_recipe(tmp_path / "base.yaml"), load_recipe(tmp_path / "more" / "twin.yaml")
    assert twin.name == "twin"
    assert twin.model == base.model.model_copy(update={"speech_residual": False})
    assert twin.stages == base.stages


def test_recipes_in_a_circle_and_a_wrong_extends_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ValueError, match=r"a.yaml extends itself, by way of 2 files"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "c.yaml").write_text("extends: [a.yaml]")
    with pytest.raises(ValueError, match=r"extends is \['a.yaml'\]: give the path of one recipe"):
        load_recipe(tmp_path / "c.yaml")
