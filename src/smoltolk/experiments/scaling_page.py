"""Runs against compute, in one HTML page with the numbers underneath."""

import json
import math
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from smoltolk.experiments.scaling import QUANTITIES, Group, Number, Scaling
from smoltolk.experiments.scaling_laws import Interval
from smoltolk.pages import PageTable, Section, colours, data_uri, new_figure, path_of_numbers, save_page
from smoltolk.speech.audio import write_atomically

MARKERS = "osD^vP*X"
POINTS = 60  # of a curve
EXPLAINED = (
    "Losses are nats per label. N: parameters of the model. D: tokens of training. C: FLOPs of training. Brackets and "
    "bands: 95 %. Lines of losses take at each C the best of the measured sizes; markers are runs, one shape for each "
    "size. Nothing is said of other sizes. The best size may have more tokens than any run had, and one kind may need "
    "more compute for the other's loss than it was trained with: the law alone says so then. An alpha or beta of 0.01 "
    "or 3 is an end of the search: the runs do not tell it."
)


def write_page(scaling: Scaling, output: Path) -> Path:
    """Draws what was found into one page that needs nothing else, and writes everything beside it as JSON.

    Args:
        scaling: what was found.
        output: the HTML file; the JSON file has its name.

    Raises:
        ValueError: the page would have the name of the JSON file.
        ImportError: matplotlib or Jinja is not installed.
        OSError: a file cannot be written.
    """
    numbers = path_of_numbers(output)
    sections = [Section(text=EXPLAINED)]
    if scaling.laws:
        sections.append(Section("Validation loss against compute", _losses_picture(scaling)))
    if scaling.numbers:
        sections.append(Section("Accuracy against compute", _accuracies_picture(scaling)))
    sections.append(Section("Numbers", tables=[*tables(scaling), _runs(scaling)]))
    sections += [Section(text=note) for note in scaling.notes]
    record = json.dumps(scaling.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(numbers, record.encode())
    return save_page(output, "Scaling", sections)


# ---- tables


def tables(scaling: Scaling) -> list[PageTable]:
    """The numbers: laws, kinds at the same compute, lines of accuracies."""
    found = [_laws(scaling), _contests(scaling), _lines(scaling)]
    return [table for table in found if table.rows]


def _laws(scaling: Scaling) -> PageTable:
    columns = ["loss", "model", "runs", "floor", "alpha (size)", "beta (tokens)"]
    columns += ["loss ∝ C^−", "best size ∝ C^", "best tokens ∝ C^", "largest error %"]
    rows = []
    for loss, fits in scaling.laws.items():
        for name, fit in fits.items():
            cells = [fit.interval(attrgetter(quantity)) for quantity in QUANTITIES]
            error = f"{100 * np.abs(fit.errors).max():.1f}"
            rows.append([loss, name, str(len(fit.errors)), *(_interval(cell, ".2f") for cell in cells), error])
    return PageTable(columns, rows, "Loss = floor + a · N^−alpha + b · D^−beta")


def _contests(scaling: Scaling) -> PageTable:
    first = scaling.groups[0].name
    columns = ["loss", "model", "FLOPs", "its loss", f"loss of {first}", f"compute it needs for that of {first}, ×"]
    columns += ["its tokens", f"tokens of {first}"]
    most = max(run.tokens for group in scaling.groups for run in group.runs)
    rows = []
    for loss in scaling.laws:
        for group in scaling.rivals:
            contest = scaling.contest(loss, group.name)
            losses = (_interval(contest.theirs, ".3f"), _interval(contest.ours, ".3f"))
            rows.append([loss, group.name, f"{contest.flops:.3g}", *losses, _interval(contest.ratio, ".2f")])
            rows[-1] += [f"{contest.their_tokens:.3g}", f"{contest.our_tokens:.3g}"]
    return PageTable(columns, rows, f"At the same compute, each with its best size; runs had at most {most:.3g} tokens")


def _lines(scaling: Scaling) -> PageTable:
    columns = [
        "accuracy",
        "model",
        "runs",
        "points for ten times the compute",
        "FLOPs",
        "% there",
        "spread of runs, points",
    ]
    rows = []
    for number, lines in scaling.lines.items():
        flops = math.sqrt(min(group.flops.max() for group in scaling.groups) * max(_least(scaling)))
        for name, line in lines.items():
            slope, there = _in_percent(line.slope_interval), _in_percent(line.interval(flops))
            cells = (_interval(slope, "+.1f"), f"{flops:.3g}", _interval(there, ".1f"), f"{100 * line.spread:.1f}")
            rows.append([title_of(number), name, str(line.n), *cells])
    return PageTable(columns, rows, "Accuracy = middle + slope · log10(compute)")


def _least(scaling: Scaling) -> list[float]:
    return [float(group.flops.min()) for group in scaling.groups]


def _runs(scaling: Scaling) -> PageTable:
    columns = ["model", "run", "parameters", "tokens", "FLOPs", *(f"loss {loss}" for loss in scaling.losses)]
    columns += [f"{title_of(number)} %" for number in scaling.numbers]
    rows = []
    for group in scaling.groups:
        for run in sorted(group.runs, key=lambda run: (run.size, run.tokens)):
            losses = [f"{run.losses[loss]:.4f}" for loss in scaling.losses]
            shares = [f"{100 * run.accuracies[number]:.1f}" for number in scaling.numbers]
            sizes = (f"{run.size:.4g}", f"{run.tokens:.4g}", f"{run.flops:.4g}")
            rows.append([group.name, str(run.folder), *sizes, *losses, *shares])
    return PageTable(columns, rows, "Runs")


def title_of(number: Number) -> str:
    """What to call an accuracy."""
    return " · ".join(number)


def _in_percent(found: Interval) -> Interval:
    return Interval(*(None if x is None else 100 * x for x in (found.value, found.low, found.high)))


def _interval(found: Interval, form: str) -> str:
    value, low, high = ("–" if x is None else format(x, form) for x in (found.value, found.low, found.high))
    return value if found.low is None else f"{value} [{low}, {high}]"


# ---- pictures


def _figure(panels: int) -> tuple[Any, list[Any]]:
    columns = min(3, max(2, panels))
    lines = -(-panels // columns)
    figure = new_figure(1 + 4.3 * columns, 3.6 * lines)
    found = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in found[panels:]:
        panel.set_visible(False)
    for panel in found[:panels]:
        panel.set_xscale("log")
        panel.set_xlabel("training FLOPs")
        panel.spines[["top", "right"]].set_visible(False)
    return figure, found[:panels]


def _losses_picture(scaling: Scaling) -> str:
    figure, panels = _figure(len(scaling.laws))
    for panel, loss in zip(panels, scaling.laws, strict=True):
        for colour, group in zip(colours(), scaling.groups, strict=False):
            flops = _span(group)
            fit = scaling.laws[loss][group.name]
            drawn = np.quantile([law.at(flops) for law in fit.draws], [0.025, 0.975], axis=0)
            panel.fill_between(flops, *drawn, color=colour, alpha=0.15, linewidth=0)
            panel.plot(flops, fit.law.at(flops), color=colour, label=group.name)
            _dots(panel, group, [run.losses[loss] for run in group.runs], colour)
        panel.set_yscale("log")
        panel.set_title(loss, fontsize=10)
    panels[0].legend(fontsize=8)
    return data_uri(figure)


def _accuracies_picture(scaling: Scaling) -> str:
    figure, panels = _figure(len(scaling.numbers))
    for panel, number in zip(panels, scaling.numbers, strict=True):
        for colour, group in zip(colours(), scaling.groups, strict=False):
            flops, line = _span(group), scaling.lines[number][group.name]
            middle, reach = line.at(flops), line.reach(flops)
            panel.fill_between(
                flops, 100 * (middle - reach), 100 * (middle + reach), color=colour, alpha=0.15, linewidth=0
            )
            panel.plot(flops, 100 * middle, color=colour, label=group.name)
            _dots(panel, group, [100 * run.accuracies[number] for run in group.runs], colour)
        panel.set_title(f"{title_of(number)}, %", fontsize=10)
    panels[0].legend(fontsize=8)
    return data_uri(figure)


def _span(group: Group) -> np.ndarray:
    return np.geomspace(group.flops.min(), group.flops.max(), POINTS)


def _dots(panel: Any, group: Group, values: list[float], colour: str) -> None:
    """A marker for each size, the smallest first."""
    sizes = sorted({run.size for run in group.runs})
    for run, value in zip(group.runs, values, strict=True):
        panel.plot(run.flops, value, MARKERS[sizes.index(run.size) % len(MARKERS)], color=colour, markersize=4)
