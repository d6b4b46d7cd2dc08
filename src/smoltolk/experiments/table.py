"""The table of an ablation: means over seeds, differences to the base variant, what each run cost."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scipy.stats
from rich.table import Table

from smoltolk.experiments.ablation import RATE, Ablation, Variant
from smoltolk.experiments.curve import CURVE_PAIRS, reached
from smoltolk.experiments.runs import Run
from smoltolk.experiments.schedule import DEVELOPMENT, FRESH, Course, speech_accuracy
from smoltolk.speech.audio import write_atomically

JSON_FILE, MARKDOWN_FILE = "ablation.json", "ablation.md"
TABLE_PAIRS = ("T→T", "S→S", "T→S", "S→T")
SPEECH_MEAN = "speech"  # the mean over the pairs that contain speech


def write_tables(ablation: Ablation, output: Path) -> tuple[Path, list[Table]]:
    """Writes `ablation.json` and `ablation.md` from what is done so far.

    Returns:
        Path of the latter, and its tables for the terminal.
    """
    results = collect(ablation, output)
    write_atomically(output / JSON_FILE, json.dumps(results, indent=2, ensure_ascii=False).encode())
    sections = [_accuracies(results), _differences(results), _costs(results), _sweeps(results)]
    if results["ablation"]["curve"]:
        sections.insert(2, _reached(results))
    page = [f"# Ablation of {Path(ablation.source).name}\n", *(f"{note}\n" for note in _notes(results))]
    for title, columns, rows in sections:
        page += [f"## {title}\n", _markdown(columns, rows)]
    path = output / MARKDOWN_FILE
    write_atomically(path, "\n".join(page).encode())
    return path, [_terminal(*section) for section in sections]


# ---- numbers


def collect(ablation: Ablation, output: Path) -> dict[str, Any]:
    """All that an ablation found so far."""
    course, settings = Course(ablation, output), ablation.settings
    variants = {variant.name: _variant(course, variant) for variant in ablation.variants}
    rows = []
    for name, variant in variants.items():
        for budget in settings.budgets:
            found = variant["budgets"][budget]
            if found is None:
                continue
            base = variants[settings.base]["budgets"]["tokens"]  # which has the base's FLOPs, too
            is_base = name == settings.base
            rows.append(
                {
                    "variant": name,
                    "budget": budget,
                    "setting": variant["chosen"],
                    "edge": variant["edge"],
                    "problem": found["problem"],
                    "are_those_of_tokens": found["are_those_of_tokens"],
                    **_summary(found["runs"]),
                    "differences": {} if is_base or base is None else _paired(found["runs"], base["runs"]),
                }
            )
    return {
        "source": ablation.source,
        "ablation": settings.model_dump(mode="json"),
        "recipe": ablation.recipe,
        "rows": rows,
        "variants": variants,
    }


def _variant(course: Course, variant: Variant) -> dict[str, Any]:
    choice = course.choice(variant)
    budgets: dict[str, Any] = {}
    for budget in course.ablation.settings.budgets:
        budgeted = course.budgeted(variant, budget)
        budgets[budget] = budgeted and {
            "are_those_of_tokens": budgeted.are_those_of_tokens,
            "problem": budgeted.problem,
            "runs": [_run(run) for run in budgeted.runs],
        }
    return {
        "chosen": None if choice is None or choice.chosen is None else dict(choice.chosen.setting),
        "edge": choice and choice.edge,
        "sweep": [_run(run) for run in course.sweep(variant)],
        "budgets": budgets,
    }


def _run(run: Run) -> dict[str, Any]:
    """All about a run."""
    training = run.training() if run.is_trained else {}
    development = run.accuracy(DEVELOPMENT)
    return {
        "folder": str(run.folder),
        "seed": run.seed,
        "setting": dict(run.setting),
        "steps": [stage.steps for stage in run.recipe.stages],
        "has_diverged": run.has_diverged,
        **{key: training.get(key) for key in ("tokens", "flops", "seconds", "skipped_steps", "validation_losses")},
        "development": development,
        "development_score": development and speech_accuracy(development),
        "fresh": run.accuracy(FRESH),
        "curve": run.curve(),
    }


def _accuracy_of(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracies of a run on fresh items, by pair and kind; the mean over the pairs that contain speech by kind."""
    found = run["fresh"]
    if found is None:
        return {}
    shares = {pair: {kind: a["accuracy"] for kind, a in found[pair].items()} for pair in TABLE_PAIRS if pair in found}
    speech = [kinds for pair, kinds in shares.items() if "S" in pair]
    if speech:
        shares[SPEECH_MEAN] = {kind: sum(kinds[kind] for kinds in speech) / len(speech) for kind in speech[0]}
    return shares


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    trained = [run for run in runs if run["tokens"] is not None]
    scored = [run for run in runs if run["fresh"] is not None]
    shares = [_accuracy_of(run) for run in scored]
    losses = [run["validation_losses"][-1] for run in trained if run["validation_losses"]]
    return {
        "seeds": [run["seed"] for run in scored],
        "diverged_seeds": [run["seed"] for run in runs if run["has_diverged"]],
        "num_items": {
            kind: a["n"] for kinds in (scored[0]["fresh"] if scored else {}).values() for kind, a in kinds.items()
        },
        "accuracy": {
            pair: {kind: mean_and_error([share[pair][kind] for share in shares]) for kind in kinds}
            for pair, kinds in (shares[0] if shares else {}).items()
        },
        "steps": trained[0]["steps"] if trained else None,
        **{key: mean_and_error([run[key] for run in trained]) for key in ("tokens", "flops", "seconds")},
        "validation_losses": {
            task: mean_and_error([found[task] for found in losses]) for task in (losses[0] if losses else {})
        },
    }


def _paired(runs: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Differences to the base's run of the same seed."""
    shares = {run["seed"]: _accuracy_of(run) for run in runs if run["fresh"] is not None}
    of_base = {run["seed"]: _accuracy_of(run) for run in base if run["fresh"] is not None}
    seeds = [seed for seed in shares if seed in of_base]
    if not seeds:
        return {}
    return {
        pair: {
            kind: difference([shares[seed][pair][kind] - of_base[seed][pair][kind] for seed in seeds]) for kind in kinds
        }
        for pair, kinds in shares[seeds[0]].items()
    }


def mean_and_error(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean of values over seeds and its standard error, None for which there is with one value; None without values."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    mean, n = sum(found) / len(found), len(found)
    error = math.sqrt(sum((v - mean) ** 2 for v in found) / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "standard_error": error, "n": n}


def difference(values: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences with its 95 % interval by Student's t; no interval with one difference."""
    found = mean_and_error(values)
    assert found is not None
    low = high = None
    if found["standard_error"] is not None:
        reach = float(scipy.stats.t.ppf(0.975, found["n"] - 1)) * found["standard_error"]
        low, high = found["mean"] - reach, found["mean"] + reach
    return {"mean": found["mean"], "low": low, "high": high, "n": found["n"]}


# ---- tables

Section = tuple[str, list[str], list[list[str]]]  # title, columns, rows; a cell has a line for each kind of items


def _kinds(results: dict[str, Any]) -> list[str]:
    kinds: dict[str, None] = {}
    for row in results["rows"]:
        for by_kind in row["accuracy"].values():
            kinds |= dict.fromkeys(by_kind)
    return list(kinds)


def _names(row: dict[str, Any]) -> list[str]:
    return [row["variant"], row["budget"] + (" (= tokens)" if row["are_those_of_tokens"] else "")]


def _setting(row: dict[str, Any]) -> str:
    if row["setting"] is None:
        return row["problem"] or "–"
    more = "".join(f", {key} {value}" for key, value in row["setting"].items() if key != RATE)
    return f"{row['setting'][RATE]:g}" + (f" ({row['edge']})" if row["edge"] else "") + more


def _accuracies(results: dict[str, Any]) -> Section:
    kinds = _kinds(results)
    columns = ["variant", "budget", "rate", "seeds", "items", *TABLE_PAIRS, SPEECH_MEAN]
    rows = []
    for row in results["rows"]:
        cells = [_by_kind(row["accuracy"], pair, kinds, _percent) for pair in (*TABLE_PAIRS, SPEECH_MEAN)]
        diverged = f", diverged: {', '.join(map(str, row['diverged_seeds']))}" if row["diverged_seeds"] else ""
        rows.append([*_names(row), _setting(row), f"{len(row['seeds'])}{diverged}", "\n".join(kinds), *cells])
    return "Accuracy on fresh items, %", columns, rows


def _differences(results: dict[str, Any]) -> Section:
    kinds, base = _kinds(results), results["ablation"]["base"]
    pairs = (*TABLE_PAIRS, SPEECH_MEAN)
    columns = ["variant", "budget", "seeds", "items", *pairs]
    rows = []
    for row in results["rows"]:
        if row["differences"]:
            cells = [_by_kind(row["differences"], pair, kinds, _interval) for pair in pairs]
            n = max(d["n"] for by_kind in row["differences"].values() for d in by_kind.values())
            rows.append([*_names(row), str(n), "\n".join(kinds), *cells])
    return f"Difference to {base}, points", columns, rows


def _by_kind(found: dict[str, Any], pair: str, kinds: list[str], shown: Callable[[Any], str]) -> str:
    return "\n".join(shown(found.get(pair, {}).get(kind)) for kind in kinds)


def _reached(results: dict[str, Any]) -> Section:
    """Tokens and seconds until each share of right answers was first reached."""
    shares = results["ablation"]["curve"]["reach"]
    columns = ["variant", "rate", "pair", *(f"{100 * share:g} %" for share in shares)]
    rows = []
    for row in results["rows"]:
        found = results["variants"][row["variant"]]["budgets"]["tokens"]
        curves = [run["curve"] for run in (found or {"runs": []})["runs"] if run["curve"]]
        if row["budget"] != "tokens" or not curves:
            continue
        cells = ["\n".join(_first(curves, pair, share) for pair in CURVE_PAIRS) for share in shares]
        rows.append([row["variant"], _setting(row), "\n".join(CURVE_PAIRS), *cells])
    return "Tokens and seconds to reach a share of right answers", columns, rows


def _first(curves: Sequence[Any], pair: str, share: float) -> str:
    """Means over the seeds that reach it, and how many of them do."""
    found = [there for curve in curves if (there := reached(curve, pair, share)) is not None]
    if not found:
        return f"never ({len(curves)})"
    tokens, seconds = (mean_and_error([there[key] for there in found]) for key in ("tokens", "seconds"))
    return f"{_number(tokens, '.3g')}, {_number(seconds, '.0f')} s ({len(found)} of {len(curves)})"


def _costs(results: dict[str, Any]) -> Section:
    tasks = list(dict.fromkeys(task for row in results["rows"] for task in row["validation_losses"]))
    columns = ["variant", "budget", "steps", "tokens", "FLOPs", "seconds", *(f"loss {task}" for task in tasks)]
    rows = []
    for row in results["rows"]:
        steps = " + ".join(map(str, row["steps"])) if row["steps"] else "–"
        costs = [_number(row[key], form) for key, form in (("tokens", ".4g"), ("flops", ".4g"), ("seconds", ".0f"))]
        losses = [_number(row["validation_losses"].get(task), ".4f") for task in tasks]
        rows.append([*_names(row), steps, *costs, *losses])
    return "Cost and validation losses", columns, rows


def _sweeps(results: dict[str, Any]) -> Section:
    columns = ["variant", "setting", "accuracy %, speech pairs", "validation loss", ""]
    rows = []
    for name, variant in results["variants"].items():
        for run in variant["sweep"]:
            setting = {"setting": run["setting"], "edge": None, "problem": None}
            score = "diverged" if run["has_diverged"] else "–"
            if run["development_score"] is not None:
                score = f"{100 * run['development_score']:.2f}"
            losses = run["validation_losses"][-1].values() if run["validation_losses"] else []
            loss = f"{sum(losses) / len(losses):.4f}" if losses and None not in losses else "–"
            chosen = "chosen" if run["setting"] == variant["chosen"] else ""
            rows.append([name, _setting(setting), score, loss, chosen])
    return "Sweeps, on development items", columns, rows


def _notes(results: dict[str, Any]) -> list[str]:
    settings = results["ablation"]
    seeds, base = settings["seeds"], settings["base"]
    counts: dict[str, int] = next((row["num_items"] for row in results["rows"] if row["num_items"]), {})
    n = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none scored yet"
    return [
        f"Mean ± standard error over {len(seeds)} seeds ({', '.join(map(str, seeds))}); items per pair and seed: {n}. "
        f"Differences are paired by seed, with a Student-t 95 % interval over so few seeds; `{SPEECH_MEAN}` is the "
        "mean over the pairs that contain speech.",
        f"Each variant runs with the setting that was best for it on the development items of seed {seeds[0]}, by mean "
        "accuracy over the pairs that contain speech; the items of the table had no part in it. A rate at an edge of "
        "the sweep may not be the best there is.",
        f"Budget tokens: the recipe's tokens. Budget flops: the last stage is as long as makes the training FLOPs "
        f"those of {base} at the recipe's tokens, counted on seed {seeds[0]}, with the setting chosen at equal tokens; "
        "`= tokens` where they lie within 2 % already.",
    ]


def _percent(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    error = found["standard_error"]
    return f"{100 * found['mean']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _interval(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    mean = f"{100 * found['mean']:+.1f}"
    return mean if found["low"] is None else f"{mean} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def _number(found: dict[str, Any] | None, form: str) -> str:
    return "–" if found is None else f"{found['mean']:{form}}"


def _markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |".replace("\n", "<br>") + "\n" for line in lines)


def _terminal(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    return table
