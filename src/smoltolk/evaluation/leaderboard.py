"""Results beside published ones, each with its protocol."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from smoltolk.evaluation.results import load_result

UNKNOWN = "–"


@dataclass(frozen=True)
class Row:
    """A model's numbers.

    Args:
        model: name of the model, or the folder of its results.
        size: number of parameters, in words.
        tokens: what it was trained on, in words.
        protocol: how it was scored.
        source: where the numbers stand.
        scores: accuracy in % by column, as it is printed.
    """

    model: str
    size: str
    tokens: str
    protocol: str
    source: str
    scores: dict[str, str]


@dataclass(frozen=True)
class Leaderboard:
    """What to print.

    Args:
        columns: the benchmarks, in their order.
        rows: published models, then the results.
        others: folder, task, group, name, n, accuracy in %, protocol of numbers that no published one stands beside.
    """

    columns: list[str]
    rows: list[Row]
    others: list[tuple[str, ...]]


def published() -> tuple[list[str], list[Row]]:
    """Columns and rows of the numbers that ship with the package; "–" is what its source does not say."""
    record = json.loads(files("smoltolk.evaluation").joinpath("anchors.json").read_text(encoding="utf-8"))
    columns = record["columns"]
    rows = []
    for model in record["models"]:
        scores = {}
        for column in columns:
            score = model["scores"].get(column)
            scores[column] = UNKNOWN if score is None else f"{score:.1f}"
        words = {key: model[key] or UNKNOWN for key in ("model", "size", "tokens", "protocol", "source")}
        rows.append(Row(**words, scores=scores))
    return columns, rows


def make_leaderboard(folders: Sequence[Path]) -> Leaderboard:
    """Puts results beside the published numbers.

    Args:
        folders: result folders; those of one checkpoint and protocol share a row.

    Raises:
        ValueError: a folder cannot be read, or two give different numbers for the same place.
    """
    columns, rows = published()
    ours: dict[tuple[str, str], Row] = {}
    others: list[tuple[str, ...]] = []
    for folder in folders:
        result = load_result(folder)
        record = result.record
        protocol = f"{record['protocol']}, {record['precision']}"
        knobs = {key: value for key, value in record["knobs"].items() if key != "tie_credit"}  # it is the task's too
        row = ours.setdefault(
            (record["checkpoint"], json.dumps([protocol, knobs], sort_keys=True)),
            Row(str(folder), UNKNOWN, UNKNOWN, protocol, f"checkpoint {record['checkpoint'][:12]}", {}),
        )
        for average in result.averages:
            accuracy = record["accuracy"][average.group][average.name]
            score = f"{100 * accuracy['accuracy']:.1f} ± {100 * accuracy['standard_error']:.1f}"
            if average.anchor is None:
                place = (str(folder), record["task"], average.group, average.name)
                others.append((*place, str(accuracy["n"]), score, protocol))
            elif row.scores.setdefault(average.anchor, score) != score:
                raise ValueError(
                    f"{folder} says {score} for {average.anchor}, and {row.model} {row.scores[average.anchor]}: both "
                    "are of one checkpoint and protocol; give one of them"
                )
    more = [column for row in ours.values() for column in row.scores if column not in columns]
    return Leaderboard([*columns, *dict.fromkeys(more)], [*rows, *(row for row in ours.values() if row.scores)], others)
