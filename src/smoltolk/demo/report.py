"""The demo's report: one HTML page with its pictures and sounds inside, and `results.json`."""

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import scipy.stats
import soundfile
from rich.table import Table

from smoltolk.demo.backbone import BackboneSettings
from smoltolk.demo.world import CLOZE_KINDS
from smoltolk.evaluation.results import bootstrap
from smoltolk.evaluation.tasks import PAIRS
from smoltolk.model.fingerprint import num_parameters
from smoltolk.pages import data_uri
from smoltolk.speech.audio import write_atomically
from smoltolk.training.watching import read_metrics

TITLES = {
    "smoltolk": "SmolTolk",
    "smoltolk-distilled": "SmolTolk + distillation",
    "early-fusion": "early fusion",
    "text-alone": "text alone",
}
COLOURS = {
    "smoltolk": "#1b6ca8",
    "smoltolk-distilled": "#2e8b57",
    "early-fusion": "#d1495b",
    "text-alone": "#7a7a7a",
}
COMPARISONS = (("smoltolk", "early-fusion"), ("smoltolk-distilled", "smoltolk"))


def collect(
    folder: Path, seed: int, steps: dict[str, dict[str, Any]], models: Sequence[str], backbone: BackboneSettings
) -> dict[str, Any]:
    """Everything the report says about one seed, read back from what its steps wrote."""
    result: dict[str, Any] = {"seed": seed, "folder": str(folder), "steps": steps, "models": {}}
    for name in (*models, "text-alone"):
        record = json.loads((folder / f"{name}-cloze" / "result.json").read_text(encoding="utf-8"))
        result["models"][name] = {"accuracy": record["accuracy"], "checkpoint": record["checkpoint"]}
    for name in models:
        training = json.loads((folder / name / "model" / "training.json").read_text(encoding="utf-8"))
        result["models"][name] |= {key: training[key] for key in ("tokens", "flops", "seconds")}
        evaluation_s = json.loads((folder / f"{name}-cloze" / "seconds.json").read_text(encoding="utf-8"))
        result["models"][name]["evaluation_s"] = evaluation_s
        result["models"][name]["curve"] = read_metrics(folder / name / "metrics.jsonl")
    losses = json.loads((folder / "backbone-losses.json").read_text(encoding="utf-8"))
    tokens = len(losses) * backbone.rows_per_step * backbone.row_tokens
    result["backbone"] = {
        "tokens": tokens,
        "flops": 6 * num_parameters(folder / "backbone") * tokens,  # its attention over 64 tokens left out
        "losses": losses,
    }
    result["differences"] = {f"{ours} - {theirs}": _differences(folder, ours, theirs) for ours, theirs in COMPARISONS}
    return result


def _differences(folder: Path, our_name: str, their_name: str) -> dict[str, dict[str, dict[str, float]]]:
    """One model minus another on the same items: mean difference and its interval over couples."""
    ours, theirs = (
        pq.read_table(folder / f"{name}-cloze" / "items.parquet").to_pydict() for name in (our_name, their_name)
    )
    if ours["id"] != theirs["id"] or ours["pair"] != theirs["pair"]:
        raise ValueError(f"the models in {folder} were scored on different items: remove their results")
    difference = np.array(ours["credit"]) - np.array(theirs["credit"])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for pair in PAIRS:
        for kind in CLOZE_KINDS:
            chosen = [p == pair and k == kind for p, k in zip(ours["pair"], ours["kind"], strict=True)]
            values = difference[chosen]
            couples = [c for c, is_in in zip(ours["couple"], chosen, strict=True) if is_in]
            low, high = bootstrap(values, couples)
            found.setdefault(pair, {})[kind] = {"mean": float(values.mean()), "low": low, "high": high}
    return found


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy by model, pair and kind over all seeds.

    The standard error is the binomial one of the pooled items; `seed_deviation` is the standard deviation
    over seeds (stories, codebook, backbone, models), None for a single seed.
    """
    summary: dict[str, Any] = {}
    for name in results[0]["models"]:
        for pair, kinds in results[0]["models"][name]["accuracy"].items():
            for kind in kinds:
                found = [r["models"][name]["accuracy"][pair][kind] for r in results]
                accuracies = np.array([a["accuracy"] for a in found])
                n = sum(a["n"] for a in found)
                mean = float(accuracies.mean())
                summary.setdefault(name, {}).setdefault(pair, {})[kind] = {
                    "accuracy": mean,
                    "n": n,
                    "standard_error": float(np.sqrt(mean * (1 - mean) / n)),
                    "seed_deviation": float(accuracies.std(ddof=1)) if len(found) > 1 else None,
                    "by_seed": accuracies.tolist(),
                }
    return summary


def verdict(results: Sequence[dict[str, Any]], ours: str, theirs: str) -> list[str]:
    """What the difference between two models is, in words, whichever way it falls."""
    sentences = []
    for kind in CLOZE_KINDS:
        for pair in PAIRS:
            found = [r["differences"][f"{ours} - {theirs}"][pair][kind] for r in results]
            points = 100 * float(np.mean([d["mean"] for d in found]))
            if len(found) > 1:
                error = 100 * float(np.std([d["mean"] for d in found], ddof=1)) / len(found) ** 0.5
                reach = error * float(scipy.stats.t.ppf(0.975, len(found) - 1))  # few seeds are weak evidence
                is_clear = abs(points) > reach
                spread = f"95 % interval over {len(found)} seeds {points - reach:+.1f} … {points + reach:+.1f}"
                level = "the noise over seeds"
            else:
                low, high = 100 * found[0]["low"], 100 * found[0]["high"]
                is_clear = low > 0 or high < 0
                spread = f"95 % interval over couples {low:+.1f} … {high:+.1f}, one seed"
                level = "the noise of the items, though one seed says nothing about another training run"
            leader = TITLES[ours if points > 0 else theirs]
            claim = (
                f"{leader} leads by {abs(points):.1f} points, more than {level}" if is_clear else "no clear difference"
            )
            sentences.append(f"{kind} cloze, {pair}: {claim} ({points:+.1f} points; {spread}).")
    return sentences


def results_table(results: Sequence[dict[str, Any]]) -> Table:
    """The accuracies as a table for the terminal."""
    table = Table("model", "cloze", *PAIRS, title="accuracy %, ± standard error")
    for name, pairs in summarise(results).items():
        for kind in CLOZE_KINDS:
            cells = [_cell(pairs[pair][kind]) if pair in pairs else "–" for pair in PAIRS]
            table.add_row(TITLES[name], kind, *cells)
    return table


def _cell(accuracy: dict[str, Any]) -> str:
    text = f"{100 * accuracy['accuracy']:.1f} ± {100 * accuracy['standard_error']:.1f}"
    if accuracy["seed_deviation"] is not None:
        text += f" (seeds ± {100 * accuracy['seed_deviation']:.1f})"
    return text


def write_report(output: Path, results: Sequence[dict[str, Any]], settings: dict[str, Any]) -> Path:
    """Writes `results.json` and `report.html`; returns the path of the report.

    Raises:
        ImportError: the extra `demo` is not installed.
    """
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        raise ImportError("the report needs matplotlib and jinja2: pip install 'smoltolk[demo]'") from error
    matplotlib.use("Agg")
    summary = summarise(results)
    words = {f"{TITLES[ours]} against {TITLES[theirs]}": verdict(results, ours, theirs) for ours, theirs in COMPARISONS}
    record = {"settings": settings, "summary": summary, "verdict": words, "seeds": results}
    write_atomically(output / "results.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    first = results[0]
    page = {
        "models": TITLES,
        "pairs": PAIRS,
        "kinds": CLOZE_KINDS,
        "cells": {
            name: {kind: {pair: _cell(pairs[pair][kind]) for pair in pairs} for kind in CLOZE_KINDS}
            for name, pairs in summary.items()
        },
        "num_items": {kind: summary["smoltolk"]["S→S"][kind]["n"] for kind in CLOZE_KINDS},
        "verdict": words,
        "num_seeds": len(results),
        "accuracy_picture": _accuracy_picture(summary),
        "curves_picture": _curves_picture(results),
        "weights_picture": _weights_picture(first["steps"]["analysis"]),
        "num_positions": first["steps"]["analysis"]["num_positions"],
        "prompts": [
            _playable(prompt, Path(first["folder"]) / "sounds") for prompt in first["steps"]["prompts"]["prompts"]
        ],
        "speech": first["steps"]["speech"],
        "runs": [
            {
                "seed": r["seed"],
                "steps": [(s["title"], s["seconds"], s.get("lanes", {})) for s in r["steps"].values()],
                "backbone": r["backbone"],
                "models": {n: m for n, m in r["models"].items() if "tokens" in m},
            }
            for r in results
        ],
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    path = output / "report.html"
    write_atomically(path, environment.from_string(template).render(page).encode())
    return path


def _playable(prompt: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A prompt with its sounds as data URLs."""
    sounds = {name: _sound(folder / file) for name, file in prompt["sounds"].items()}
    return {**prompt, "sounds": sounds}


def _sound(path: Path) -> str:
    audio, rate = soundfile.read(path, dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format="MP3")  # every browser plays it, and it is small
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _accuracy_picture(summary: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), CLOZE_KINDS, strict=True):
        for i, (name, pairs) in enumerate(summary.items()):
            shown = [(x, pairs[pair][kind]) for x, pair in enumerate(PAIRS) if pair in pairs]
            axes.bar(
                [x + 0.21 * (i - 1.5) for x, _ in shown],
                [100 * a["accuracy"] for _, a in shown],
                width=0.19,
                yerr=[100 * (a["seed_deviation"] or a["standard_error"]) for _, a in shown],
                color=COLOURS[name],
                label=TITLES[name],
                capsize=3,
            )
        axes.axhline(50, color="black", linewidth=1, linestyle=":")
        axes.set_xticks(range(len(PAIRS)), PAIRS)
        axes.set_title(f"{kind} cloze")
        axes.set_ylim(0, 105)
    figure.axes[0].set_ylabel("accuracy %")
    figure.axes[0].legend(loc="lower left", fontsize=8)
    return data_uri(figure)


def _curves_picture(results: Sequence[dict[str, Any]]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    shown = (
        ("speech_loss", "training loss, speech"),
        ("text_loss", "training loss, text"),
        (None, "validation, speech rows"),
    )
    for axes, (key, title) in zip(figure.subplots(1, 3), shown, strict=True):
        for name, colour in COLOURS.items():
            for i, curve in enumerate(r["models"][name]["curve"] for r in results if "curve" in r["models"][name]):
                lines = [line for line in curve if line.get(key or "validation_speech_loss") is not None]
                tokens = np.array([line["tokens"] for line in lines]) / 1e6
                losses = np.array([line[key or "validation_speech_loss"] for line in lines])
                if key and len(losses) > 50:  # a running mean; single steps are noisy
                    width = len(losses) // 50
                    losses = np.convolve(losses, np.ones(width) / width, mode="valid")
                    tokens = tokens[width - 1 :]
                axes.plot(tokens, losses, color=colour, linewidth=1, label=TITLES[name] if i == 0 else None)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("million tokens")
    figure.axes[0].legend(fontsize=8)
    figure.axes[0].set_ylabel("nats per label")
    return data_uri(figure)


def _weights_picture(analysis: dict[str, Any]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    panels = (
        (left, analysis["after_switch"], "units read since the switch to speech"),
        (right, analysis["by_unit"], "unit that is predicted (last: end of speech)"),
    )
    for axes, values, label in panels:
        weights = np.array(values)
        image = axes.imshow(np.ma.masked_less(weights, 0).T, aspect="auto", origin="lower", vmin=0, cmap="viridis")
        axes.set_yticks(range(weights.shape[1]), range(1, weights.shape[1] + 1))
        axes.set_xlabel(label)
        axes.set_ylabel("backbone level")
        figure.colorbar(image, ax=axes)
    return data_uri(figure)
