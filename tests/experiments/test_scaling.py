"""Fits of loss and accuracy against compute: known laws come back, and unlike runs are refused."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file
from scipy import stats
from tests.conftest import EARLY_FUSION, NUM_UNITS, tiny_lm_config, tiny_recipe
from tests.evaluation.test_comparison import save

from smoltolk import SmolTolkConfig, cli
from smoltolk.experiments import scaling_laws
from smoltolk.experiments.scaling import compare_scaling, read_scaling_run
from smoltolk.experiments.scaling_laws import Law, fit_law, fit_line
from smoltolk.model.fingerprint import checkpoint_fingerprint

SIZES = np.repeat([1000.0, 3000.0, 9000.0], 3)
TOKENS = np.tile([2e5, 6e5, 2e6], 3)
FLOPS = 50 * SIZES**0.9 * TOKENS


def true_loss(sizes, tokens):
    return 1.2 + 0.3 * (sizes / 3000) ** -0.5 + 0.5 * (tokens / 6e5) ** -0.3


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(scaling_laws, "NUM_DRAWS", 20)


@pytest.fixture(scope="module")
def law():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling_laws, "NUM_DRAWS", 20)
        return fit_law(SIZES, TOKENS, FLOPS, true_loss(SIZES, TOKENS)).law


def test_a_known_law_comes_back(law):
    assert (law.floor, law.alpha, law.beta) == pytest.approx((1.2, 0.5, 0.3), rel=1e-3)
    assert law(np.array([500.0]), np.array([1e7])) == pytest.approx(true_loss(500.0, 1e7), rel=1e-4)
    assert law.gamma == pytest.approx(0.9)
    exponent = 0.5 + 0.9 * 0.3
    assert law.loss_exponent == pytest.approx(0.5 * 0.3 / exponent, rel=1e-3)
    assert law.size_exponent == pytest.approx(0.3 / exponent, rel=1e-3)
    assert law.tokens_exponent == pytest.approx(0.5 / exponent, rel=1e-3)


@pytest.mark.parametrize("compute", [1e9, 3e10, 1e11, 1e13])
def test_the_best_size_is_the_one_with_the_least_loss_among_those_measured(law, compute):
    sizes = np.geomspace(1000, 9000, 20001)
    losses = true_loss(sizes, compute / (50 * sizes**0.9))
    assert law.best_size(np.array(compute)) == pytest.approx(sizes[losses.argmin()], rel=2e-2)
    assert law.at(np.array(compute)) == pytest.approx(losses.min(), rel=1e-4)
    assert 50 * law.best_size(np.array(compute)) ** 0.9 * law.best_tokens(np.array(compute)) == pytest.approx(compute)


def test_the_compute_for_a_loss_is_that_of_the_loss(law):
    assert law.compute_for(float(law.at(np.array(1e10)))) == pytest.approx(1e10, rel=1e-6)
    assert law.compute_for(1.0) == math.inf  # below the floor
    assert law.compute_for(1e30) == 0


def test_where_the_size_costs_nothing_the_smallest_is_best_and_has_no_exponent():
    rest = {"size": 1.0, "tokens": 1.0, "flops": 6.0, "gamma": 1.0, "sizes": (2.0, 8.0)}
    flat = Law(1.0, 0.0, 0.5, 0.5, 0.3, **rest)
    assert flat.best_size(np.array([1.0, 1e9])).tolist() == [2, 2]
    assert flat.loss_exponent is None
    assert Law(1.0, 0.5, 0.5, 0.0, 0.3, **rest).best_size(np.array(1e3)) == 8


def test_intervals_hold_the_truth_and_shrink_with_the_noise(monkeypatch):
    monkeypatch.setattr(scaling_laws, "NUM_DRAWS", 60)
    noise = np.random.default_rng(0).standard_normal(9)
    widths = []
    for size in (0.004, 0.0004):
        fit = fit_law(SIZES, TOKENS, FLOPS, true_loss(SIZES, TOKENS) * (1 + size * noise))
        found = fit.interval(lambda law: float(law.at(np.array(1e11))))
        assert found.low < true_loss_at(1e11) < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 5


def test_errors_are_drawn_as_wide_as_the_parameters_and_students_tails_ask(monkeypatch):
    monkeypatch.setattr(scaling_laws, "NUM_DRAWS", 5)
    drawn, fit = [], scaling_laws._Fitter.fit

    def noting(fitter, losses, start=None):
        drawn.append(losses)
        return fit(fitter, losses, start)

    monkeypatch.setattr(scaling_laws._Fitter, "fit", noting)
    losses = true_loss(SIZES, TOKENS) * (1 + 0.01 * np.random.default_rng(0).standard_normal(9))
    found = fit_law(SIZES, TOKENS, FLOPS, losses)
    wide = (found.errors - found.errors.mean()) * math.sqrt(9 / 4) * 2.7764 / 1.96  # Student's of 4, the normal's
    for resampled in drawn[1:]:
        errors = resampled / found.law(SIZES, TOKENS) - 1
        assert np.abs(errors[:, None] - wide).min(1).max() < 1e-5


def true_loss_at(compute):
    sizes = np.geomspace(1000, 9000, 2001)
    return true_loss(sizes, compute / (50 * sizes**0.9)).min()


def test_too_few_runs_and_numbers_that_are_none_are_refused():
    losses = true_loss(SIZES, TOKENS)
    with pytest.raises(ValueError, match="6 runs: a law of size and tokens needs 7 or more"):
        fit_law(SIZES[:6], TOKENS[:6], FLOPS[:6], losses[:6])
    with pytest.raises(ValueError, match="2 sizes"):
        fit_law(np.minimum(SIZES, 3000), TOKENS, FLOPS, losses)
    with pytest.raises(ValueError, match="a run has loss nan"):
        fit_law(SIZES, TOKENS, FLOPS, np.append(losses[:-1], np.nan))
    with pytest.raises(ValueError, match="FLOPs for a token grow as size"):
        fit_law(SIZES, TOKENS, 50 * SIZES**-0.5 * TOKENS, losses)
    with pytest.raises(ValueError, match="1 different FLOPs"):
        fit_line([1e9] * 3, [0.5, 0.6, 0.7])


def test_the_line_of_accuracies_is_that_of_least_squares():
    accuracies = [0.5, 0.58, 0.61, 0.74]
    line = fit_line([1e9, 1e10, 1e11, 1e12], accuracies)
    expected = stats.linregress([9, 10, 11, 12], accuracies)
    assert line.slope == pytest.approx(expected.slope)
    assert line.at(np.array([1e9]))[0] == pytest.approx(expected.intercept + 9 * expected.slope)
    half = stats.t.ppf(0.975, 2) * expected.stderr
    assert line.slope_interval.high == pytest.approx(expected.slope + half)
    assert line.interval(1e15).high - line.interval(1e15).value > line.reach(np.array(line.unit))


# ---- runs on disk


def make_run(folder, size=1000, tokens=2e5, *, changes=None, config=None, loss=None, accuracy=0.5, **recipe):
    """A finished run as training leaves it, with a result of ten items."""
    settings = tiny_recipe(Path("world"), folder)
    (folder / "model").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings | recipe))
    steps = sum(stage["steps"] for stage in settings["stages"])
    loss = true_loss(size, tokens) if loss is None else loss
    line = {"step": steps, "tokens": int(tokens), "flops": int(50 * size**0.9 * tokens), "seconds": 1.0}
    line |= {"validation_speech_loss": loss, "validation_text_loss": None} | (changes or {})
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    architecture = {"lm_config": tiny_lm_config(), "num_units": NUM_UNITS} | (config or {})
    SmolTolkConfig(**architecture).save_pretrained(folder / "model")
    save_file({"weights": np.full(int(size), loss, np.float32)}, folder / "model" / "model.safetensors")
    right = np.arange(10) < round(10 * accuracy)
    save(folder / "cloze", right, checkpoint=checkpoint_fingerprint(folder / "model"))
    return str(folder)


def make_grid(folder, factor=1.0, config=None):
    """Runs of three sizes and three budgets; a factor on the tokens' worth makes them worse."""
    return [
        make_run(folder / f"{i}", size, tokens, loss=true_loss(size, tokens / factor), config=config, accuracy=0.1 * i)
        for i, (size, tokens) in enumerate(zip(SIZES, TOKENS, strict=True))
    ]


@pytest.fixture
def nine_and_nine(tmp_path):
    ours = make_grid(tmp_path / "ours")
    return [*ours, *make_grid(tmp_path / "theirs", factor=4, config=EARLY_FUSION)]


def test_kinds_of_models_are_put_side_by_side(nine_and_nine, tmp_path, few_draws, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["scaling", *nine_and_nine, "--output", str(page)]) == 0
    assert "needs for that of SmolTolk" in capsys.readouterr().out
    found = json.loads(page.with_suffix(".json").read_text())
    assert [len(runs) for runs in found["groups"].values()] == [9, 9]
    assert list(found["groups"]) == ["SmolTolk", "early fusion"]
    assert list(found["losses"]) == ["speech"]  # no run has a loss of text
    assert found["losses"]["speech"]["SmolTolk"]["intervals"]["alpha"]["value"] == pytest.approx(0.5, rel=1e-2)
    contest = found["contests"]["speech"]["early fusion"]
    assert contest["flops"] == max(run["flops"] for run in found["groups"]["SmolTolk"])
    assert contest["their_tokens"] > max(TOKENS)  # the best size is smaller than the largest: the page says so
    assert contest["theirs"]["value"] > contest["ours"]["value"]
    # tokens worth a quarter: four times the tokens, and a little less than that with the better size
    assert 2 < contest["ratio"]["value"] <= 4.001
    (line,) = found["accuracies"]
    assert (line["result"], line["group"], line["name"]) == ("cloze", "S→S", "story")
    assert set(line["lines"]) == {"SmolTolk", "early fusion"}
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 2
    assert "http" not in html


def test_kinds_are_held_against_each_other_by_draws_of_their_own(nine_and_nine, few_draws):
    scaling = compare_scaling([f"a={run}" for run in nine_and_nine[:9]] + [f"b={run}" for run in nine_and_nine[9:]])
    same = scaling.groups[1].law("speech", seed=0)
    own = scaling.laws["speech"]["b"]
    assert own.law == same.law
    assert [law.alpha for law in own.draws] != [law.alpha for law in same.draws]


def test_kinds_without_like_compute_are_not_held_against_each_other(tmp_path, few_draws):
    ours = make_grid(tmp_path / "ours")
    theirs = [
        make_run(tmp_path / "theirs" / f"{i}", 10 * size, 100 * tokens, config=EARLY_FUSION)
        for i, (size, tokens) in enumerate(zip(SIZES, TOKENS, strict=True))
    ]
    scaling = compare_scaling([*ours, *theirs])
    assert scaling.rivals == []
    assert scaling.to_json()["contests"] == {"speech": {}}
    assert scaling.notes == [
        "SmolTolk and early fusion share no range of compute: they are not held against each other"
    ]


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    run = make_run(tmp_path / "rate=0.003")
    assert [group.name for group in compare_scaling([run]).groups] == ["SmolTolk"]
    assert [group.name for group in compare_scaling([f"mine={run}"]).groups] == ["mine"]
    with pytest.raises(ValueError, match=r"rate=0\.004 holds no finished run"):
        compare_scaling([str(tmp_path / "rate=0.004")])


def test_what_differs_as_between_seeds_is_noted(tmp_path):
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", config={"speech_tokenizer": {"fingerprint": "other"}})
    path = tmp_path / "other" / "cloze" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"items_fingerprint": "other"}))
    assert compare_scaling([one, other]).notes[:-1] == [
        f"speech tokenizer differs between runs, such as {one} and {other}",
        f"cloze: items_fingerprint differs between runs, such as {one} and {other}",
    ]


def test_results_of_generation_have_no_accuracy_and_are_passed_over(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "run" / "spoken").mkdir()
    (tmp_path / "run" / "spoken" / "result.json").write_text(
        json.dumps({"protocol": "generation-1", "checkpoint": "c"})
    )
    assert compare_scaling([run]).numbers == [("cloze", "S→S", "story")]
    (tmp_path / "run" / "spoken" / "result.json").write_text("[]")
    with pytest.raises(ValueError, match="is no result of `smoltolk evaluate`"):
        compare_scaling([run])


def test_a_name_in_brackets_is_printed_and_the_page_is_not_written_over_its_numbers(
    nine_and_nine, tmp_path, few_draws, capsys
):
    runs = [f"[x] [inf, inf]={run}" for run in nine_and_nine[:9]]
    assert cli.main(["scaling", *runs, "--output", str(tmp_path / "scaling.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "give a page a name such as scaling.html" in printed.err
    assert not (tmp_path / "scaling.json").exists()
    assert cli.main(["scaling", *runs, "--output", str(tmp_path / "scaling.html")]) == 0
    assert "[x] [inf, inf]" in capsys.readouterr().out


def test_a_name_says_what_belongs_together(nine_and_nine, few_draws):
    named = [f"a={run}" for run in nine_and_nine[:9]] + [f"b={run}" for run in nine_and_nine[9:]]
    assert [group.name for group in compare_scaling(named).groups] == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "recipe", "kind"),
    [
        ({}, {}, "SmolTolk"),
        (EARLY_FUSION, {}, "early fusion"),
        ({"layer_mixing": "last"}, {}, "late fusion"),
        ({}, {"one_stage": True}, "SmolTolk, everything"),
        ({}, {"distilled": True}, "SmolTolk, distilled"),
    ],
)
def test_the_kind_of_a_run_is_its_architecture_and_what_was_peculiar_in_its_training(tmp_path, config, recipe, kind):
    stages = tiny_recipe(tmp_path, "x")["stages"]
    if recipe.get("one_stage"):
        stages = stages[1:]
    if recipe.get("distilled"):
        stages[0]["distillation"] = {"hidden_states": 1.0}
    steps = sum(stage["steps"] for stage in stages)
    run = make_run(tmp_path / "run", config=config, stages=stages, changes={"step": steps})
    assert read_scaling_run(tmp_path / "run")[1].startswith(kind)
    assert run


def test_unlike_runs_are_refused(tmp_path):
    one = make_run(tmp_path / "one")
    other = make_run(tmp_path / "other", config={"lm_config": tiny_lm_config(vocab_size=60)})
    with pytest.raises(ValueError, match="not alike: text vocabulary is 50 in one and 60 in the other"):
        compare_scaling([one, other])
    switching = make_run(tmp_path / "switching", config={"predict_switch": True})
    with pytest.raises(ValueError, match="predict_switch is False in one and True in the other"):
        compare_scaling([one, switching])
    knobs = json.loads((tmp_path / "one" / "cloze" / "result.json").read_text())["knobs"]
    third = make_run(tmp_path / "third")
    path = tmp_path / "third" / "cloze" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"knobs": knobs | {"length_norm": "sum"}}))
    with pytest.raises(ValueError, match="length_norm is 'mean' in one and 'sum' in the other"):
        compare_scaling([one, third])
    with pytest.raises(ValueError, match="given twice"):
        compare_scaling([one, f"again={one}"])


def test_runs_that_are_not_finished_and_results_of_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        read_scaling_run(tmp_path)
    make_run(tmp_path / "half", changes={"step": 1})
    with pytest.raises(ValueError, match=r"has done 1 of \d+ steps: train it to its end first"):
        read_scaling_run(tmp_path / "half")
    make_run(tmp_path / "old")
    save_file({"weights": np.zeros(5, np.float32)}, tmp_path / "old" / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="is a result of another model than"):
        read_scaling_run(tmp_path / "old")


def test_what_not_all_runs_have_is_left_out_and_said(nine_and_nine, tmp_path):
    (tmp_path / "ours" / "0" / "cloze").rename(tmp_path / "away")
    scaling = compare_scaling(nine_and_nine)
    assert scaling.numbers == []
    assert scaling.notes == [
        f"left out: accuracy cloze · S→S · story, which 1 of the runs lack, such as {tmp_path / 'ours' / '0'}"
    ]


def test_too_few_runs_for_laws_still_have_their_accuracies(tmp_path, nine_and_nine, capsys):
    page = tmp_path / "page.html"
    assert cli.main(["scaling", *nine_and_nine[:12], "--output", str(page)]) == 0
    shortage = "early fusion has 3 runs: a law of size and tokens needs 7 or more; add runs"
    assert f"note: no laws of losses: {shortage}" in capsys.readouterr().out
    found = json.loads(page.with_suffix(".json").read_text())
    assert found["losses"] == found["contests"] == {}
    assert len(found["accuracies"]) == 1
    assert page.read_text().count("data:image/png;base64,") == 1
    for run in nine_and_nine[:12]:
        shutil.rmtree(f"{run}/cloze")
    with pytest.raises(ValueError, match=shortage):
        compare_scaling(nine_and_nine[:12])
