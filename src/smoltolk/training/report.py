"""Curves of several runs side by side, in one HTML page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smoltolk.pages import PageTable, Section, colours, data_uri, new_figure, save_page
from smoltolk.speech.audio import check_output
from smoltolk.training.watching import METRICS_FILE, read_metrics

PICTURES = {
    "Training loss": ("loss", "text_loss", "speech_loss"),
    "Validation loss": (
        "validation_interleaved_loss",
        "validation_speech_loss",
        "validation_text_loss",
        "validation_transcription_loss",
        "validation_synthesis_loss",
    ),
    "Text: loss above that of the untouched backbone": ("text_forgetting",),
    "Layer selector: entropy, nats": ("selector_entropy",),
    "Gradient norm": ("speech_grad_norm", "text_grad_norm"),
    "Learning rate of the speech parts": ("learning_rate",),
    "Tokens per second": ("tokens_per_s",),
    "MFU: share of the peak of the devices": ("mfu",),
}
LEVELS = "Mean weight of each level where a unit is predicted, at the last validation"
EXPLAINED = (
    "Losses are nats per label, those of validation and of the text the last measured. Curves of training are averaged "
    "over a fortieth of the run."
)
_SMOOTHED = frozenset({"loss", "text_loss", "speech_loss", "speech_grad_norm", "text_grad_norm", "tokens_per_s", "mfu"})
_LINES = 40  # a smoothed curve has about so many independent points


def write_report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Draws the metrics of training runs into one page that needs nothing else.

    Args:
        runs: output folders of runs; each needs its `metrics.jsonl`.
        output: the HTML file.

    Raises:
        ValueError: a folder holds no run, two runs have the same folder name and parent, or the page cannot be written
            where it is to be.
        ImportError: matplotlib or Jinja is not installed.
        OSError: the page cannot be written.
    """
    check_output(Path(output))
    read = {name: read_run(Path(run)) for name, run in zip(run_names(runs), runs, strict=True)}
    sections = [_summaries(read)]
    for title, names in PICTURES.items():
        found = [name for name in names if any(name in line for lines in read.values() for line in lines)]
        if not found:
            continue
        figure = new_figure(4.6 * len(found), 3.2)
        for axes, name in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
            for colour, (run, lines) in zip(colours(), read.items(), strict=False):
                points = [(line["tokens"], line[name]) for line in lines if line.get(name) is not None]
                if points:
                    tokens, values = zip(*points, strict=True)
                    shown = smoothed(values) if name in _SMOOTHED else values
                    axes.plot(tokens, shown, label=run, color=colour, linewidth=1.4)
            axes.set_title(name.removesuffix("_loss").replace("_", " "), fontsize=10)
            axes.set_xlabel("tokens")
            axes.spines[["top", "right"]].set_visible(False)
        _add_legend(figure)
        sections.append(Section(title, data_uri(figure)))
    levels = {run: _last(lines, "layer_weights") for run, lines in read.items()}
    if any(levels.values()):
        figure = new_figure(6.4, 3.2)
        axes = figure.subplots()
        for colour, (run, weights) in zip(colours(), levels.items(), strict=False):
            if weights:
                axes.plot(range(1, len(weights) + 1), weights, "o-", label=run, color=colour, markersize=3)
        axes.set_xlabel("level")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
        sections.append(Section(LEVELS, data_uri(figure)))
    return save_page(Path(output), "Training runs", sections)


def _add_legend(figure: Any) -> None:
    """Names each run once, though it may not have all of the curves."""
    named = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        figure.axes[0].legend(named.values(), named.keys(), fontsize=8)


def _summaries(read: dict[str, list[dict[str, Any]]]) -> Section:
    rows = {run: summary(lines) for run, lines in read.items()}
    columns = ["run", *next(iter(rows.values()))]
    return Section(tables=[PageTable(columns, [[run, *row.values()] for run, row in rows.items()])], text=EXPLAINED)


def run_names(runs: Sequence[str | Path]) -> list[str]:
    """Short names of run folders: the last part of each path, or as much more as tells them apart.

    Raises:
        ValueError: a run is given twice.
    """
    paths = [Path(run).resolve() for run in runs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"run {path} is given twice: give each once")
    for length in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_run(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run, with tokens per second.

    Raises:
        ValueError: the folder holds no run, or no step is done yet.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {METRICS_FILE}: give the output folder of a training run")
    lines = read_metrics(path)
    if not lines:
        raise ValueError(f"{path} is empty: wait until the run has done a step")
    before = 0
    for line in lines:
        if "tokens_per_s" not in line:
            line["tokens_per_s"] = (line["tokens"] - before) / line["seconds"] if line.get("seconds") else None
        before = line["tokens"]
    return lines


def smoothed(values: Sequence[float]) -> list[float]:
    """An exponential average whose memory is a fortieth of the curve; it starts at the first value."""
    weight = min(1.0, _LINES / len(values))
    result, average = [], values[0]
    for value in values:
        average += weight * (value - average)
        result.append(average)
    return result


def summary(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a run came to, in words."""
    last = lines[-1]
    shown = {"steps": f"{last['step']:,}", "tokens": f"{last['tokens']:.3g}", "FLOPs": f"{last['flops']:.3g}"}
    shown["hours"] = f"{sum(line.get('seconds') or 0 for line in lines) / 3600:.2f}"
    shown["skipped steps"] = str(last["skipped_steps"])
    for name in ("validation_interleaved_loss", "validation_speech_loss", "validation_text_loss", "text_forgetting"):
        value = _last(lines, name)
        shown[name.removeprefix("validation_").replace("_", " ")] = "–" if value is None else f"{value:.4f}"
    return shown


def _last(lines: Sequence[dict[str, Any]], name: str) -> Any:
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)
