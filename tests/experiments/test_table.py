"""The table of an ablation against its result files."""

import json
import math

import pyarrow.parquet as pq
import pytest
from tests.experiments.conftest import tiny_ablation, write

from smoltolk import cli
from smoltolk.experiments.ablation import load_ablation
from smoltolk.experiments.schedule import Course
from smoltolk.experiments.table import difference, mean_and_error, write_tables


@pytest.fixture(scope="module")
def results(finished):
    ablation, output = finished
    path, _ = write_tables(ablation, output)
    assert path == output / "ablation.md"
    return json.loads((output / "ablation.json").read_text())


def row(results, variant, budget):
    (found,) = [r for r in results["rows"] if (r["variant"], r["budget"]) == (variant, budget)]
    return found


def share(run, pair, kind):
    """Accuracy of a run on fresh items, from the scores of every item."""
    items = pq.read_table(run.folder / "fresh" / "items.parquet").to_pylist()
    found = [item["credit"] for item in items if (item["pair"], item["kind"]) == (pair, kind)]
    assert len(found) == 3
    return sum(found) / 3


@pytest.mark.parametrize("budget", ["tokens", "flops"])
@pytest.mark.parametrize("variant", ["smoltolk", "early-fusion"])
def test_accuracies_are_means_over_seeds_of_fresh_scores(finished, results, variant, budget):
    ablation, output = finished
    course = Course(ablation, output)
    runs = course.budgeted(next(v for v in ablation.variants if v.name == variant), budget).runs
    found = row(results, variant, budget)
    assert found["seeds"] == [0, 1]
    assert found["num_items"] == {"story": 3, "topic": 3}
    for pair in ("T→T", "S→S", "T→S", "S→T"):
        for kind in ("story", "topic"):
            a, b = (share(run, pair, kind) for run in runs)
            cell = found["accuracy"][pair][kind]
            assert cell["mean"] == pytest.approx((a + b) / 2)
            assert cell["standard_error"] == pytest.approx(abs(a - b) / 2)
    for key in ("tokens", "flops", "seconds"):
        assert found[key]["mean"] == pytest.approx(sum(run.training()[key] for run in runs) / 2)
    for task in ("interleaved", "speech", "text"):
        losses = [json.loads((r.folder / "metrics.jsonl").read_text().splitlines()[-1]) for r in runs]
        mean = sum(line[f"validation_{task}_loss"] for line in losses) / 2
        assert found["validation_losses"][task]["mean"] == pytest.approx(mean)


@pytest.mark.parametrize("budget", ["tokens", "flops"])
def test_differences_are_paired_by_seed(finished, results, budget):
    ablation, output = finished
    course = Course(ablation, output)
    base, early = ablation.variants
    pairs = list(zip(course.budgeted(early, budget).runs, course.budgeted(base, "tokens").runs, strict=True))
    found = row(results, "early-fusion", budget)["differences"]
    for pair in ("T→T", "S→S", "T→S", "S→T"):
        a, b = (share(ours, pair, "story") - share(theirs, pair, "story") for ours, theirs in pairs)
        cell = found[pair]["story"]
        assert cell["mean"] == pytest.approx((a + b) / 2)
        assert cell["high"] - cell["mean"] == pytest.approx(
            12.7062 * abs(a - b) / 2, rel=1e-4
        )  # t of 1 degree of freedom
        assert cell["n"] == 2
    speech = sum(found[pair]["story"]["mean"] for pair in ("S→S", "T→S", "S→T")) / 3
    assert found["speech"]["story"]["mean"] == pytest.approx(speech)
    assert row(results, "smoltolk", budget)["differences"] == {}


def test_the_page_says_what_the_numbers_are(finished, results):
    _, output = finished
    page = (output / "ablation.md").read_text()
    assert "over 2 seeds (0, 1); items per pair and seed: 3 story, 3 topic" in page
    early = row(results, "early-fusion", "tokens")
    cell = early["accuracy"]["S→S"]["story"]
    assert f"{100 * cell['mean']:.1f} ± {100 * cell['standard_error']:.1f}" in page
    assert f"| early-fusion | tokens | {early['setting']['stages.-1.learning_rate']:g} ({early['edge']}) | 2 |" in page
    assert "| smoltolk | flops (= tokens) |" in page
    assert page.count("| chosen |") == 2
    assert "with the setting chosen at equal tokens" in page


def test_every_run_of_a_sweep_is_kept_with_its_score(finished, results):
    ablation, output = finished
    for variant in ablation.variants:
        sweep = results["variants"][variant.name]["sweep"]
        assert [run["setting"] for run in sweep] == variant.sweep
        assert [run["development_score"] for run in sweep] == Course(ablation, output).choice(variant).scores
        assert all(run["steps"] == [4, 5] and run["tokens"] == 1152 for run in sweep)


def test_a_table_can_be_written_of_what_is_done_so_far(finished, tiny_seeds, tmp_path, capsys):
    _, output = finished
    path = write(tiny_ablation(tiny_seeds, variants=["smoltolk", "one-stage", "early-fusion"]), tmp_path)
    agreed = (output / "agreed.json").read_bytes()
    assert cli.main(["ablate", str(path), "--output", str(output), "--table-only"]) == 0
    assert (output / "agreed.json").read_bytes() == agreed
    results = json.loads((output / "ablation.json").read_text())
    assert results["variants"]["one-stage"]["budgets"] == {"tokens": None, "flops": None}
    assert {r["variant"] for r in results["rows"]} == {"smoltolk", "early-fusion"}
    assert "one-stage" in capsys.readouterr().out
    write_tables(*finished)


def test_means_errors_and_intervals_of_known_numbers():
    found = mean_and_error([1.0, None, 2.0, 3.0])
    assert found == {"mean": 2.0, "standard_error": pytest.approx(1 / math.sqrt(3)), "n": 3}
    assert mean_and_error([4.0]) == {"mean": 4.0, "standard_error": None, "n": 1}
    assert mean_and_error([None]) is None
    found = difference([1.0, 2.0, 3.0])
    assert found["low"] == pytest.approx(2 - 4.302653 / math.sqrt(3))  # t of 2 degrees of freedom, 97.5 %
    assert difference([1.0]) == {"mean": 1.0, "low": None, "high": None, "n": 1}


def test_a_variant_that_diverged_everywhere_says_so(finished, tiny_seeds, tmp_path):
    settings = tiny_ablation(tiny_seeds, variants=["smoltolk"])
    del settings["ablation"]["more"]["early-fusion"]
    ablation = load_ablation(write(settings, tmp_path))
    output = tmp_path / "runs"
    for run in Course(ablation, output).sweep(ablation.base):
        run.folder.mkdir(parents=True)
        (run.folder / "diverged.json").write_text('{"message": "not finite"}')
    path, _ = write_tables(ablation, output)
    assert "| smoltolk | tokens | diverged at every setting | 0 |" in path.read_text()
