"""The course of an ablation: what is chosen, what is run, what is found again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.experiments.conftest import tiny_ablation, write

from smoltolk import cli
from smoltolk.experiments import runs, schedule
from smoltolk.experiments.ablation import RATE, load_ablation
from smoltolk.experiments.schedule import (
    SAME_FLOPS,
    Course,
    equal_flops_steps,
    run_ablation,
    speech_accuracy,
    validation_loss,
)


def variant_of(ablation, name):
    return next(variant for variant in ablation.variants if variant.name == name)


def stamps(folder):
    """When the lasting files of all runs were written."""
    kept = [*folder.rglob("training.json"), *folder.rglob("result.json"), *folder.rglob("metrics.jsonl")]
    return {path: path.stat().st_mtime_ns for path in kept}


def credit(folder, pair):
    """Mean over kinds of the mean credit of items, from the scores of every item."""
    rows = [row for row in pq.read_table(folder / "items.parquet").to_pylist() if row["pair"] == pair]
    kinds = {kind: [row["credit"] for row in rows if row["kind"] == kind] for kind in ("story", "topic")}
    return sum(sum(found) / len(found) for found in kinds.values()) / 2


def test_settings_are_chosen_on_development_items_of_the_first_seed(finished):
    ablation, output = finished
    for variant in ablation.variants:
        choice = Course(ablation, output).choice(variant)
        scores = []
        for run in choice.runs:
            assert run.seed == 0
            record = json.loads((run.folder / "development" / "result.json").read_text())
            assert record["items"] == str(ablation.development(0))
            scores.append(sum(credit(run.folder / "development", pair) for pair in ("S→S", "T→S", "S→T")) / 3)
        assert choice.scores == pytest.approx(scores)
        best = [run for run, score in zip(choice.runs, choice.scores, strict=True) if score == max(choice.scores)]
        assert choice.chosen == min(best, key=lambda run: validation_loss(run.training()))


def test_fresh_items_are_scored_for_chosen_runs_alone_and_after_all_training(finished):
    ablation, output = finished
    course = Course(ablation, output)
    scored = {path.parent.parent for path in output.rglob("fresh/result.json")}
    assert scored == {
        run.folder for v in ablation.variants for b in ("tokens", "flops") for run in course.budgeted(v, b).runs
    }
    for folder in scored:
        seed = int(folder.name.removeprefix("seed-"))
        assert json.loads((folder / "fresh" / "result.json").read_text())["items"] == str(ablation.fresh(seed))
    trained = [path.stat().st_mtime_ns for path in output.rglob("training.json")]
    assert max(trained) < min(path.stat().st_mtime_ns for path in output.rglob("fresh/result.json"))


def test_all_seeds_run_with_the_chosen_setting_and_the_recipes_steps(finished):
    ablation, output = finished
    for variant in ablation.variants:
        course = Course(ablation, output)
        chosen = course.choice(variant).chosen
        found = course.budgeted(variant, "tokens").runs
        assert [run.seed for run in found] == [0, 1]
        assert found[0].folder == chosen.folder  # the run of the sweep itself is kept
        for run in found:
            assert run.setting == chosen.setting
            assert [stage.steps for stage in run.recipe.stages] == [4, 5]
            assert run.training()["tokens"] == 9 * 4 * 32
    folders = sorted(path.parent.parent for path in output.rglob("training.json"))
    assert len(folders) == 2 * 2 + 2 + 2  # sweeps, other seeds, early fusion at equal FLOPs
    assert not list(output.rglob("checkpoints"))


def test_equal_flops_are_equal(finished):
    ablation, output = finished
    course = Course(ablation, output)
    base, early = (variant_of(ablation, name) for name in ("smoltolk", "early-fusion"))
    assert course.budgeted(base, "flops").are_those_of_tokens
    budgeted = course.budgeted(early, "flops")
    assert not budgeted.are_those_of_tokens
    at_equal_tokens, target = (course.choice(v).chosen.training()["flops"] for v in (early, base))
    for run, of_base in zip(budgeted.runs, course.budgeted(base, "tokens").runs, strict=True):
        first, last = run.recipe.stages
        step_flops = run.stage_flops()[1] / last.steps
        assert first.steps == 4
        assert last.steps > 5
        assert last.decay_steps == round(2 * last.steps / 5)
        assert abs(run.training()["flops"] - of_base.training()["flops"]) < step_flops
    assert at_equal_tokens < (1 - SAME_FLOPS) * target
    assert sum(course.choice(early).chosen.stage_flops()) == at_equal_tokens
    assert {run.setting[RATE] for run in budgeted.runs} == {course.choice(early).chosen.rate}


def test_steps_for_equal_flops():
    assert equal_flops_steps(1000, [100, 300], 30) == 90
    assert equal_flops_steps(90, [100, 300], 30) < 1


def test_an_ablation_that_is_done_is_not_done_again(finished, monkeypatch):
    ablation, output = finished
    before = stamps(output)
    monkeypatch.setattr(schedule, "Lanes", None)  # nothing can be started
    with pytest.raises(TypeError):
        run_ablation(ablation, output)
    monkeypatch.undo()
    assert list(Course(ablation, output).tasks()) == []
    run_ablation(ablation, output)
    assert stamps(output) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "early-fusion"}, "base was 'smoltolk' and is 'early-fusion'"),
        ({"seeds": [1, 0]}, "first_seed was 0 and is 1"),
        ({"seeds": [0]}, "seeds no longer hold 1"),
        ({"more": {"smoltolk": {"learning_rates": [1e-3, 5e-3]}}}, "smoltolk no longer tries rate=0.01"),
        (
            {"more": {"smoltolk": {"changes": {"stages.0.clip_norm": 2}, "learning_rates": [1e-3, 1e-2]}}},
            "has another rec",
        ),
    ],
)
def test_another_ablation_in_the_same_folder_is_refused(finished, tiny_seeds, tmp_path, change, message):
    _, output = finished
    other = load_ablation(write(tiny_ablation(tiny_seeds, **change), tmp_path))
    with pytest.raises(ValueError, match=f"holds another ablation: .*{message}"):
        run_ablation(other, output)


def test_variants_and_rates_may_be_added_and_the_device_changed(finished, tiny_seeds, tmp_path):
    _, output = finished
    settings = tiny_ablation(tiny_seeds, variants=["one-stage", "early-fusion", "smoltolk"])
    settings["ablation"]["more"]["smoltolk"]["learning_rates"].append(3e-3)
    other = load_ablation(write(settings | {"num_threads": 2, "name": "other"}, tmp_path))
    schedule.agree(other, output, is_running=False)
    left = [name for name, _, _ in Course(other, output).tasks()]
    assert left == [
        *(f"one-stage/tokens/rate={rate}/seed-0" for rate in ("0.001", "0.003", "0.01")),
        "smoltolk/tokens/rate=0.003/seed-0",
    ]


def test_other_items_are_refused(finished, tiny_seeds, tmp_path):
    _, output = finished
    settings = tiny_ablation(tiny_seeds, development=str(tiny_seeds / "seed-1" / "development.parquet"))
    with pytest.raises(ValueError, match="the items development of seed 0 have changed"):
        schedule.agree(load_ablation(write(settings, tmp_path)), output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fresh": "none.parquet"}, "items none.parquet (fresh of seed 0) is not a file"),
        ({"development": "{seeds}/seed-1/fresh.parquet"}, "seed-1/fresh.parquet are those that settings are chosen on"),
    ],
)
def test_items_are_checked_before_anything_is_run(tiny_seeds, tmp_path, change, message):
    change = {key: value.replace("{seeds}", str(tiny_seeds)) for key, value in change.items()}
    ablation = load_ablation(write(tiny_ablation(tiny_seeds, **change), tmp_path))
    with pytest.raises(ValueError, match=re.escape(message)):
        run_ablation(ablation, tmp_path / "out")


def test_stores_of_all_seeds_are_checked_before_anything_is_run(tiny_seeds, tmp_path):
    settings = tiny_ablation(tiny_seeds, fresh=str(tiny_seeds / "seed-0" / "fresh.parquet"), seeds=[0, 7])
    with pytest.raises(ValueError, match="seed-7"):
        run_ablation(load_ablation(write(settings, tmp_path)), tmp_path / "out")


def test_no_jobs_are_refused(finished):
    with pytest.raises(ValueError, match="jobs is 0: give 1 or more"):
        run_ablation(*finished, jobs=0)


def test_a_table_of_nothing_is_refused(tiny_seeds, tmp_path, capsys):
    path = write(tiny_ablation(tiny_seeds), tmp_path)
    assert cli.main(["ablate", str(path), "--output", str(tmp_path / "none"), "--table-only"]) == 1
    assert "none holds no ablation: run one, or give its folder" in capsys.readouterr().err


def accuracy(*shares):
    return {
        pair: {"story": {"accuracy": s}, "topic": {"accuracy": s}}
        for pair, s in zip(("S→S", "T→T"), shares, strict=True)
    }


def test_text_alone_has_no_say_in_the_choice():
    assert speech_accuracy(accuracy(0.7, 0.1)) == 0.7


@pytest.fixture
def sweep(tiny_seeds, tmp_path, monkeypatch):
    """A sweep of three runs whose findings are made up: accuracy, validation loss, or None for a diverged one."""
    settings = tiny_ablation(tiny_seeds, variants=["smoltolk"], more={})
    ablation = load_ablation(write(settings, tmp_path))
    found = {}

    def make(*findings):
        sweep = Course(ablation, tmp_path).sweep(ablation.base)
        for run, finding in zip(sweep, findings, strict=True):
            found[run.folder] = finding
        monkeypatch.setattr(runs.Run, "has_diverged", property(lambda run: found[run.folder] is None))
        monkeypatch.setattr(runs.Run, "accuracy", lambda run, scores: accuracy(found[run.folder][0], 0.5))
        monkeypatch.setattr(runs.Run, "training", lambda run: {"validation_losses": [{"speech": found[run.folder][1]}]})
        return schedule.choose(sweep)

    return make


def test_the_best_accuracy_is_chosen_and_ties_go_to_the_lower_validation_loss(sweep):
    assert sweep((0.6, 1.0), (0.8, 3.0), (0.7, 2.0)).chosen.rate == 3e-3
    assert sweep((0.8, 2.0), (0.6, 1.0), (0.8, 1.5)).chosen.rate == 1e-2
    assert sweep((0.8, None), (0.6, 1.0), (0.8, 1.5)).chosen.rate == 1e-2
    assert sweep(None, (0.6, 1.0), None).chosen.rate == 3e-3
    assert sweep(None, None, None).chosen is None


def test_a_rate_at_the_edge_of_the_sweep_is_marked(sweep):
    assert sweep((0.6, 1.0), (0.8, 1.0), (0.7, 1.0)).edge is None
    assert sweep((0.9, 1.0), (0.8, 1.0), (0.7, 1.0)).edge == "lowest rate tried"
    assert sweep((0.6, 1.0), (0.8, 1.0), (0.9, 1.0)).edge == "highest rate tried"


def test_a_diverged_run_is_a_finding(tiny_seeds, tmp_path, here_and_now):
    settings = tiny_ablation(tiny_seeds, variants=["smoltolk"], more={"smoltolk": {"learning_rates": [1e-3, 1e30]}})
    settings |= {"max_skipped_steps": 0, "validation": {"rows": 0}}
    settings["ablation"] |= {"seeds": [0], "budgets": ["tokens"]}
    ablation = load_ablation(write(settings, tmp_path))
    run_ablation(ablation, tmp_path / "runs")
    choice = Course(ablation, tmp_path / "runs").choice(ablation.base)
    assert choice.scores[1] is None
    assert choice.chosen.rate == 1e-3
    assert "not finite" in (choice.runs[1].folder / "diverged.json").read_text()


def command(path, output, *options):
    return [sys.executable, "-m", "smoltolk", "ablate", str(path), "--output", str(output), *options]


def wait_for(process, condition, timeout_s=900):
    end = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end and not condition():
        time.sleep(0.05)
    assert condition()


@pytest.mark.slow
def test_a_killed_ablation_goes_on_with_two_jobs_and_redoes_nothing(finished, tiny_seeds, tmp_path):
    path, output = write(tiny_ablation(tiny_seeds, budgets=["tokens"]), tmp_path), tmp_path / "runs"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(path, output, "--jobs", "2"), env=environment)
    wait_for(process, lambda: len(list(output.rglob("development/result.json"))) >= 2)
    process.kill()
    process.wait()
    time.sleep(1.5)  # its runs end with it
    before = stamps(output)
    done = {p: s for p, s in before.items() if p.name != "metrics.jsonl" or (p.parent / "model").exists()}
    subprocess.run(command(path, output, "--jobs", "2"), check=True, env=environment, timeout=600)
    after = stamps(output)
    assert {found: after[found] for found in done} == done
    _, whole = finished
    results = list(output.rglob("result.json"))
    assert len(results) == 2 * 2 + 2 * 2  # sweeps on development items, two seeds of each variant on fresh ones
    for found in results:  # the same to the last bit as without a kill
        theirs = json.loads((whole / found.relative_to(output)).read_text())
        assert json.loads(found.read_text())["accuracy"] == theirs["accuracy"]


@pytest.mark.slow
def test_sigterm_lets_runs_save_and_says_how_to_go_on(tiny_seeds, tmp_path):
    settings = tiny_ablation(tiny_seeds)
    settings["stages"][1]["steps"] = 2000
    path, output = write(settings, tmp_path), tmp_path / "runs"
    process = subprocess.Popen(command(path, output), stderr=subprocess.PIPE, text=True)
    metrics = output / "smoltolk" / "tokens" / "rate=0.001" / "seed-0" / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 20)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped, and runs have saved; run the same command to go on" in error
    (last,) = sorted((metrics.parent / "checkpoints").glob("step-*"))[-1:]
    assert int(last.name.removeprefix("step-")) == len(metrics.read_text().splitlines())


@pytest.mark.slow
def test_a_failing_run_names_its_log_and_others_go_on(tiny_seeds, tmp_path):
    settings = tiny_ablation(tiny_seeds, budgets=["tokens"], seeds=[0])
    settings["ablation"]["more"]["early-fusion"]["changes"] = {"model.backbone": "none"}
    path, output = write(settings, tmp_path), tmp_path / "runs"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    arguments = command(path, output, "--jobs", "2")
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 1
    assert "2 runs failed; run the same command to try them again" in result.stderr
    log = output / "early-fusion" / "tokens" / "rate=0.003" / "seed-0" / "log.txt"
    assert f"early-fusion/tokens/rate=0.003/seed-0: see {log}" in result.stderr
    assert "backbone none cannot be read" in Path(log).read_text()
    assert len(list(output.rglob("fresh/result.json"))) == 1
