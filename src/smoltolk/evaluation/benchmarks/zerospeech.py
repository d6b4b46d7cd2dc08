"""sWUGGY, sBLIMP and prosAudit as the Zero Resource Challenge hands them out: a `gold.csv` and wavs beside it.

Columns and averages are those that https://github.com/zerospeech/benchmarks documents for sLM21 (arXiv 2011.11588)
and prosAudit (arXiv 2302.12057); no code is from there.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smoltolk.evaluation.benchmarks.benchmark import Fault, Modality, PairBenchmark, Stimulus, StimulusPair
from smoltolk.evaluation.protocols import AUTHORS
from smoltolk.evaluation.results import Average

GOLD_FILE = "gold.csv"
SPLITS = ("dev", "test")
Row = Mapping[str, str]


@dataclass(frozen=True)
class GoldLayout:
    """A kind of `gold.csv`.

    Args:
        name: the benchmark.
        folder: where its splits lie in the whole data set, and their scores in a submission.
        columns: columns that it must have.
        item: columns that name an item, whose voices are averaged.
        voice: columns that tell the pairs of an item apart.
        labels: columns that become labels.
        text: column of the text twin, None for none.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    item: tuple[str, ...]
    voice: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    text: str | None = None

    def submission(self, split: str | None) -> str | None:
        """Path of the scores in a submission."""
        if split is None:
            return None
        return f"{self.folder}_{split}.txt" if self is PROSAUDIT else f"{self.folder}/{split}.txt"


SWUGGY = GoldLayout(
    "swuggy",
    "lexical",
    ("filename", "id", "voice", "frequency", "correct"),
    item=("id",),
    voice=("voice",),
    labels=("voice",),
    text="word",
)
SBLIMP = GoldLayout(
    "sblimp",
    "syntactic",
    ("filename", "id", "voice", "type", "subtype", "correct"),
    item=("type", "subtype", "id"),
    voice=("voice",),
    labels=("voice", "type", "subtype"),
    text="transcription",
)
PROSAUDIT = GoldLayout(
    "prosaudit", "english", ("filename", "id", "type", "correct"), item=("type", "id"), labels=("type",)
)
GOLD_LAYOUTS = (SWUGGY, SBLIMP, PROSAUDIT)


def find_gold(folder: Path) -> list[tuple[GoldLayout, Path]]:
    """Every `gold.csv` in a split's folder, a folder of splits or a whole data set, with its kind."""
    places = [folder, *(folder / split for split in SPLITS)]
    places += [folder / layout.folder / split for layout in GOLD_LAYOUTS for split in SPLITS]
    found = []
    for place in places:
        if (place / GOLD_FILE).is_file() and (layout := _kind_of(place)) is not None:
            found.append((layout, place))
    return found


def _kind_of(place: Path) -> GoldLayout | None:
    """The kind of a gold file, by what only that kind has; by its folder where columns are missing."""
    try:
        with (place / GOLD_FILE).open(encoding="utf-8-sig", newline="", errors="replace") as file:
            columns = next(csv.reader(file), [])
    except csv.Error:
        columns = []
    for layout, mark in ((SWUGGY, "frequency"), (SBLIMP, "subtype")):
        if mark in columns:
            return layout
    by_folder = [layout for layout in GOLD_LAYOUTS if layout.folder in (place.name, place.parent.name)]
    return by_folder[0] if by_folder else PROSAUDIT if "type" in columns else None


def read_gold(layout: GoldLayout, place: Path, modality: Modality, report: Callable[[Fault], None]) -> PairBenchmark:
    """Reads a split.

    Args:
        layout: its kind.
        place: the folder of `gold.csv`.
        modality: "speech" for the wavs, "text" for the texts in the gold file.
        report: called with each fault; what the benchmark then holds is not the whole of it.

    Raises:
        ValueError: the benchmark has no texts, and they are asked for.
    """
    if modality == "text" and layout.text is None:
        raise ValueError(f"modality is 'text', but {layout.name} has no texts: leave --modality out")
    split = place.name if place.name in SPLITS else None
    rows = _read_rows(layout, place, modality, report)
    if modality == "speech":
        _check_wavs(place, rows, report)
    pairs = _pair(layout, place, rows, modality, report)
    if not pairs:
        report(Fault(str(place / GOLD_FILE), "it holds no pair"))
    name = layout.name if modality == "speech" else f"{layout.name}-text"
    averages = _averages(layout, pairs, modality)
    submission = layout.submission(split)
    return PairBenchmark(name, place, tuple(pairs), averages, AUTHORS, split, submission=submission)


def text_notes(layout: GoldLayout, place: Path) -> list[Fault]:
    """What keeps the texts of a split from being scored, which does not matter to its audio.

    Args:
        layout: its kind.
        place: the folder of `gold.csv`.
    """
    if layout.text is None:
        return []
    path = place / GOLD_FILE
    columns, rows = _read_cells(path, lambda fault: None)  # what is wrong with the file itself is said of the audio
    if columns and layout.text not in columns:
        return [Fault(str(path), f"lacks the column {layout.text}: there are no texts to score")]
    what = f"{layout.text} is empty, there is no text to score"
    return [Fault(f"{path}:{line}", what) for line, row in rows if not row[layout.text].strip()]


def _read_cells(path: Path, report: Callable[[Fault], None]) -> tuple[list[str] | None, list[tuple[int, Row]]]:
    """Columns, None if not even they can be read, and rows that have all of them, with their lines."""
    columns: list[str] | None = None
    rows: list[tuple[int, Row]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            for cells in reader:
                if None in cells or None in cells.values():
                    report(Fault(f"{path}:{reader.line_num}", f"does not have the {len(columns)} cells of the header"))
                else:
                    rows.append((reader.line_num, cells))
    except UnicodeDecodeError as error:
        report(Fault(str(path), f"is not UTF-8 (byte {error.start}): convert it"))
    except csv.Error as error:
        report(Fault(str(path), f"is not CSV ({error}): correct it"))
    return columns, rows


def _read_rows(
    layout: GoldLayout, place: Path, modality: Modality, report: Callable[[Fault], None]
) -> list[tuple[int, Row]]:
    """The rows that can be used, with their lines."""
    path = place / GOLD_FILE
    needed = layout.columns + ((layout.text,) if modality == "text" and layout.text else ())
    columns, rows = _read_cells(path, report)
    if columns is None:
        return []
    if missing := [column for column in needed if column not in columns]:
        report(Fault(str(path), f"lacks the columns {', '.join(missing)}; it has {', '.join(columns)}"))
        return []
    good: list[tuple[int, Row]] = []
    names: set[str] = set()
    for line, row in rows:
        where, faults = f"{path}:{line}", []
        if row["correct"] not in ("0", "1"):
            faults.append(f"correct is {row['correct']!r}: give 0 or 1")
        if empty := [key for key in ("filename", *layout.item, *layout.voice) if not row[key].strip()]:
            faults.append(f"{', '.join(empty)} is empty")
        if row["filename"] in names:
            faults.append(f"filename {row['filename']!r} is there twice")
        if modality == "text" and layout.text and not row[layout.text].strip():
            faults.append(f"{layout.text} is empty, there is no text to score")
        if layout is SWUGGY and row["correct"] == "1" and not _is_number(row["frequency"]):
            faults.append(f"frequency is {row['frequency']!r}: a word needs a number to be in or out of vocabulary")
        names.add(row["filename"])
        for fault in faults:
            report(Fault(where, fault))
        if not faults:
            good.append((line, row))
    return good


def _is_number(cell: str) -> bool:
    try:
        return float(cell) >= 0
    except ValueError:
        return False


def _check_wavs(place: Path, rows: Sequence[tuple[int, Row]], report: Callable[[Fault], None]) -> None:
    wavs = {path.name for path in place.iterdir() if path.suffix == ".wav"}
    for line, row in rows:
        if f"{row['filename']}.wav" not in wavs:
            report(Fault(f"{place / GOLD_FILE}:{line}", f"{place / row['filename']}.wav is missing"))
    for name in sorted(wavs - {f"{row['filename']}.wav" for _, row in rows}):
        report(Fault(str(place / name), f"no good row of {GOLD_FILE} names it"))


def _pair(
    layout: GoldLayout,
    place: Path,
    rows: Sequence[tuple[int, Row]],
    modality: Modality,
    report: Callable[[Fault], None],
) -> list[StimulusPair]:
    sides: dict[tuple[str, ...], dict[str, tuple[int, Row]]] = {}
    for line, row in rows:
        key = tuple(row[column] for column in layout.item + layout.voice)
        known = sides.setdefault(key, {})
        if row["correct"] in known:
            other = known[row["correct"]][0]
            what = f"is correct={row['correct']} of {_named(layout, row)}, which line {other} is already"
            report(Fault(f"{place / GOLD_FILE}:{line}", what))
        else:
            known[row["correct"]] = (line, row)
    pairs = []
    for both in sides.values():
        if len(both) < 2:
            ((line, row),) = both.values()
            what = f"has no partner: no row with correct={'01'[row['correct'] == '0']} of {_named(layout, row)}"
            report(Fault(f"{place / GOLD_FILE}:{line}", what))
            continue
        positive, negative = both["1"][1], both["0"][1]
        labels = {column: positive[column] for column in layout.labels}
        if layout is SWUGGY:  # the band "oov" of the challenge: words that LibriSpeech does not have
            labels["vocabulary"] = "in" if float(positive["frequency"]) >= 1 else "out"
        right, wrong = (_stimulus(layout, place, row, modality) for row in (positive, negative))
        pairs.append(StimulusPair("/".join(positive[column] for column in layout.item), right, wrong, labels))
    return pairs


def _stimulus(layout: GoldLayout, place: Path, row: Row, modality: Modality) -> Stimulus:
    name = row["filename"]
    if modality == "text" and layout.text:
        return Stimulus(name, row[layout.text].strip())
    return Stimulus(name, place / f"{name}.wav")


def _named(layout: GoldLayout, row: Row) -> str:
    return ", ".join(f"{column} {row[column]}" for column in layout.item + layout.voice)


def _averages(layout: GoldLayout, pairs: Sequence[StimulusPair], modality: Modality) -> tuple[Average, ...]:
    def anchored(column: str) -> str | None:
        return column if modality == "speech" else None

    by_id = ("id",)
    if layout is SWUGGY:
        averages = [Average("sWUGGY", "all", over=by_id, anchor=anchored("sWUGGY"))]
        if any(pair.labels["vocabulary"] == "in" for pair in pairs):
            averages.append(Average("sWUGGY", "in-vocab", {"vocabulary": "in"}, by_id))
        return tuple(averages)
    types = sorted({pair.labels["type"] for pair in pairs})
    if layout is PROSAUDIT:
        return tuple(Average("prosAudit", kind, {"type": kind}, by_id) for kind in types)
    micro = Average("sBLIMP", "micro", over=by_id, anchor=anchored("sBLIMP"))
    by_type = [Average("sBLIMP types", kind, {"type": kind}, by_id) for kind in types]
    return (micro, Average("sBLIMP", "macro", over=("type", "id")), *by_type)
