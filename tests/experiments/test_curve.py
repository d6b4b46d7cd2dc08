"""Accuracy while runs go on, and when a share of right answers is reached."""

import json

import pytest
from tests.conftest import tiny_recipe
from tests.experiments.conftest import tiny_items

from smoltolk.evaluation.tasks import evaluate_cloze, load_cloze
from smoltolk.experiments.ablation import CurveSettings
from smoltolk.experiments.curve import CURVE_PAIRS, reached, spread
from smoltolk.experiments.runs import train
from smoltolk.experiments.table import _first
from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.training.config import make_recipe
from smoltolk.training.watching import read_metrics


def line(tokens, share):
    return {"tokens": tokens, "seconds": tokens / 10, "accuracy": {"S→T": share}}


def test_couples_are_spread_over_the_file_and_stay_together():
    items = tiny_items(count=12)
    assert [item.couple for item in spread(items, 3)] == ["c0", "c0", "c2", "c2", "c4", "c4"]
    assert spread(items, 6) == spread(items, 100) == items


def test_a_share_is_reached_at_the_first_point_that_has_it():
    curve = [line(100, 0.5), line(200, 0.7), line(300, 0.6), line(400, 0.8)]
    assert reached(curve, "S→T", 0.65) == {"tokens": 200, "seconds": 20}
    assert reached(curve, "S→T", 0.8) == {"tokens": 400, "seconds": 40}
    assert reached(curve, "S→T", 0.9) is None
    others = [line(100, 0.5), line(200, 0.6)]
    assert _first([curve, others], "S→T", 0.6) == "200, 20 s (2 of 2)"
    assert _first([curve, others], "S→T", 0.7) == "200, 20 s (1 of 2)"
    assert _first([curve, others], "S→T", 0.9) == "never (2)"


def test_a_run_is_followed_and_its_last_point_is_the_models_own_score(tiny_seeds, tmp_path):
    place = tiny_seeds / "seed-0"
    recipe = make_recipe(tiny_recipe(place, tmp_path / "run"))
    settings, items = CurveSettings(every_steps=4, couples=2), place / "fresh.parquet"
    train(recipe, None, None, settings, items, lambda _: None)
    lines = [json.loads(text) for text in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 9]
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[1]["tokens"] == metrics[7]["tokens"]
    assert lines[1]["seconds"] == pytest.approx(sum(line["seconds"] for line in metrics[:8]))
    pipeline = SmolTolkPipeline.from_pretrained(tmp_path / "run" / "model")
    chosen = spread(load_cloze(items), 2)
    assert len(chosen) == 4
    result = evaluate_cloze(pipeline.model, chosen, pipeline.text_ids, pairs=CURVE_PAIRS)
    assert lines[-1]["accuracy"] == {pair: result.accuracy(pair=pair).accuracy for pair in CURVE_PAIRS}
