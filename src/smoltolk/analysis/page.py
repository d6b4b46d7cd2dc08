"""Analyses side by side, in one HTML page with the numbers underneath."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from smoltolk.analysis.analyze import Comparison
from smoltolk.analysis.uncertainty import Mean
from smoltolk.pages import PageTable, Section, colours, data_uri, new_figure, path_of_numbers, save_page
from smoltolk.speech.audio import write_atomically

LENS = "Logit lens: what the text head reads off each level where a word ends"
SECTIONS = {
    "Layer selector: mean weight of each level where a unit is predicted": {"selector": "weight"},
    "Shared space: the same words in speech and in text": {
        "cka": "linear CKA",
        "subspace_overlap": "subspace overlap",
        "speech_to_text": "retrieval, speech → text",
        "text_to_speech": "retrieval, text → speech",
    },
    "Abstraction: intrinsic dimension where a word ends (TwoNN)": {
        "dimension_speech": "speech",
        "dimension_text": "text",
    },
    "Abstraction: accuracy of a linear probe that reads the word just said": {
        "word_probe_speech": "speech",
        "word_probe_text": "text",
    },
    f"{LENS}, best token": {
        "lens_said_speech": "speech, the word just said",
        "lens_next_speech": "speech, the next word",
        "lens_said_text": "text, the word just read",
        "lens_next_text": "text, the next word",
    },
    f"{LENS}, log-probability in nats": {
        "lens_said_log_probability_speech": "speech, the word just said",
        "lens_next_log_probability_speech": "speech, the next word",
        "lens_said_log_probability_text": "text, the word just read",
        "lens_next_log_probability_text": "text, the next word",
    },
}
COUNTS = ("utterances", "pieces", "words")
EXPLAINED = (
    "Levels: 0 is what the backbone reads, 1 and on are its layers, the last one after its final norm. Error bars are "
    "standard errors: over seeds where a model has several, else over utterances. Differences are paired, seed by seed "
    "or utterance by utterance. Dotted: chance."
)
MAPS = {
    "cka_between_levels": ("Linear CKA of each level of speech with each level of text", "text level", "speech level"),
    "selector_after_switch": ("Layer selector by distance from the switch to speech", "level", "units since"),
    "selector_by_unit": ("Layer selector by predicted unit, from low to high levels", "level", "unit"),
}


def write_page(comparison: Comparison, output: Path) -> Path:
    """Draws a comparison into one page that needs nothing else, and writes everything beside it as JSON.

    Args:
        comparison: what was found.
        output: the HTML file; the JSON file has its name.

    Raises:
        ValueError: the page would have the name of the JSON file.
        ImportError: matplotlib or Jinja is not installed.
        OSError: a file cannot be written.
    """
    models = []
    for name, found in comparison.found.items():
        counts = [str(found[0].counts[what]) for what in COUNTS]
        folders = ", ".join(str(subject.folder) for subject in comparison.subjects[name])
        models.append([name, str(len(found)), *counts, folders])
    columns = ["model", "seeds", *COUNTS, "folders"]
    sections = [Section(tables=[PageTable(columns, models)], text=EXPLAINED)]
    for title, quantities in SECTIONS.items():
        tables = [_table(comparison, *item) for item in quantities.items()]
        sections.append(Section(title, _picture(comparison, quantities), tables))
    sections += [Section(title, _map_picture(comparison, name)) for name, (title, *_) in MAPS.items()]
    settings = "; ".join(f"{name}: {value}" for name, value in vars(comparison.settings).items())
    sections.append(Section("Settings", text=settings))
    record = json.dumps(comparison.to_json(), indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(path_of_numbers(output), record.encode())
    return save_page(output, "Analysis", sections)


def _first_level(quantity: str) -> int:
    return 1 if quantity == "selector" else 0


def _picture(comparison: Comparison, quantities: dict[str, str]) -> str:
    """The panels of a section, each with all variants."""
    figure = new_figure(1.2 + 3.9 * max(2, len(quantities)), 3.3)
    panels = figure.subplots(1, max(2, len(quantities)), squeeze=False)[0]
    for panel in panels[len(quantities) :]:
        panel.set_visible(False)
    for panel, (quantity, title) in zip(panels, quantities.items(), strict=False):
        first = _first_level(quantity)
        chances: list[np.ndarray] = []
        for colour, (name, found) in zip(colours(), comparison.found.items(), strict=False):
            mean, chance = comparison.mean(name, quantity), found[0].curves[quantity].chance
            levels = np.arange(first, first + len(mean.value))
            panel.errorbar(
                levels, mean.value, mean.standard_error, color=colour, label=name, marker="o", markersize=3, capsize=2
            )
            if chance is not None and not any(np.array_equal(chance, other) for other in chances):
                label = "chance" if not chances else None
                panel.plot(levels, chance, color="#999", linestyle=":", linewidth=1.2, label=label)
                chances.append(chance)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("level")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8)
    return data_uri(figure)


def _table(comparison: Comparison, quantity: str, title: str) -> PageTable:
    rows, longest, baseline = [], 0, next(iter(comparison.found))
    for name in comparison.found:
        mean = comparison.mean(name, quantity)
        rows.append([f"{name}, {mean.num_seeds} seeds" if mean.num_seeds > 1 else name, *_cells(mean)])
        longest = max(longest, len(mean.value))
    chance = comparison.found[baseline][0].curves[quantity].chance
    if chance is not None:
        rows.append(["chance", *(_number(value) for value in chance)])
    for name in comparison.found:
        if difference := comparison.difference(name, quantity):
            rows.append([f"{name} − {baseline}", *_cells(difference)])
    first = _first_level(quantity)
    return PageTable(["level", *map(str, range(first, first + longest))], rows, title)


def _cells(mean: Mean) -> list[str]:
    return [f"{_number(v)} ± {_number(e)}" for v, e in zip(mean.value, mean.standard_error, strict=True)]


def _number(value: Any) -> str:
    return f"{value:.3f}" if np.isfinite(value) else "–"


def _map_picture(comparison: Comparison, name: str) -> str:
    """A heat map of each variant, the mean over seeds; units differ from seed to seed, so of these the first seed's."""
    _, across, down = MAPS[name]
    figure = new_figure(3.8 * max(2, len(comparison.found)), 3.4)
    panels = figure.subplots(1, max(2, len(comparison.found)), squeeze=False)[0]
    for panel in panels[len(comparison.found) :]:
        panel.set_visible(False)
    images = []
    for panel, (variant, found) in zip(panels, comparison.found.items(), strict=False):
        values = found[0].maps[name]
        if name == "selector_by_unit":
            values = values[np.isfinite(values).all(1)]
            values = values[np.argsort(values @ np.arange(values.shape[1]), kind="stable")]
        elif len(found) > 1:
            values = np.mean([one.maps[name] for one in found], axis=0)
        first = 0 if name == "cka_between_levels" else 1
        height, width = values.shape
        extent = (first - 0.5, first + width - 0.5, -0.5, height - 0.5)
        images.append(
            panel.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=1, extent=extent, cmap="viridis")
        )
        panel.set_title(variant, fontsize=10)
        panel.set_xlabel(across)
    panels[0].set_ylabel(down)
    figure.colorbar(images[0], ax=list(panels[: len(comparison.found)]))
    return data_uri(figure)
