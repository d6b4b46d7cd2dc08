"""The summary of a preparation: counts, shares, reasons and histograms."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from smoltolk.data.utterance import Utterance
from smoltolk.speech.audio import write_atomically

SUMMARY = "summary.json"
PICTURE = "summary.png"

# Upper and lower ends of the bars. They are fixed, so that blocks and machines can be added up; values beyond
# the ends count in the outermost bars.
BINS: dict[str, np.ndarray] = {
    "seconds per utterance": 0.1 * 2 ** np.arange(0, 18.5, 0.5),  # 0.1 s to 7 h
    "units per second": np.arange(0, 101, 2.0),
    "words per second": np.arange(0, 8.1, 0.25),
    "confidence of the alignment": np.linspace(0, 1, 21),
}


@dataclass(frozen=True)
class PrepareSummary:
    """What a preparation made.

    Args:
        utterances: number of utterances in the store.
        splits: number of utterances in each split.
        quarantined: number of rows in `quarantine.jsonl`.
        reasons: how often each kind of reason is in it, the most frequent first.
        unaligned: utterances with text and speech but without word times: they serve as speech and as text,
            but are never interleaved.
        words: number of written words.
        units: number of speech units.
        seconds: length of all audio.
        histograms: counts of utterances for each of `BINS`.
    """

    utterances: int
    splits: dict[str, int]
    quarantined: int
    reasons: dict[str, int]
    unaligned: int
    words: int
    units: int
    seconds: float
    histograms: dict[str, list[int]] = field(repr=False)

    @property
    def hours(self) -> float:
        """Length of all audio in hours."""
        return self.seconds / 3600

    @property
    def units_per_s(self) -> float:
        """Speech units for each second of audio, 0 without audio."""
        return self.units / self.seconds if self.seconds else 0.0

    @property
    def share_quarantined(self) -> float:
        """Share of the source's rows that could not be used, 0 … 1."""
        rows = self.utterances + self.quarantined
        return self.quarantined / rows if rows else 0.0

    def to_json(self) -> dict[str, Any]:
        """What `summary.json` holds: also the derived figures, and the ends of the bars."""
        derived = {
            "hours": self.hours,
            "units_per_s": self.units_per_s,
            "share_quarantined": self.share_quarantined,
            "bins": {name: [round(float(edge), 6) for edge in edges] for name, edges in BINS.items()},
        }
        return asdict(self) | derived


def read_summary(folder: Path) -> PrepareSummary:
    """The summary in the folder of a store."""
    content = json.loads((folder / SUMMARY).read_bytes())
    return PrepareSummary(**{name: content[name] for name in PrepareSummary.__dataclass_fields__})


def count_block(utterances: Sequence[Utterance], confidences: Iterable[float]) -> dict[str, Any]:
    """The figures of one block, to be added up by `summarize`."""
    spoken = [utterance for utterance in utterances if utterance.has_speech]
    seconds = np.array([utterance.seconds for utterance in spoken], dtype=np.float64)
    units = np.array([len(utterance.array("units")) for utterance in spoken], dtype=np.float64)
    both = [utterance for utterance in spoken if utterance.has_text]
    words = np.array([len(utterance.array("word_token_counts")) for utterance in both], dtype=np.float64)
    words_seconds = np.array([utterance.seconds for utterance in both], dtype=np.float64)
    values = (seconds, units / seconds, words / words_seconds, np.array(list(confidences), dtype=np.float64))
    return {
        "splits": dict(Counter(utterance.split for utterance in utterances)),
        "words": sum(len(utterance.array("word_token_counts")) for utterance in utterances if utterance.has_text),
        "units": int(units.sum()),
        "seconds": float(seconds.sum()),
        "unaligned": sum(not utterance.is_aligned for utterance in both),
        "histograms": {
            name: np.histogram(np.clip(x, edges[0], edges[-1]), edges)[0].tolist()
            for (name, edges), x in zip(BINS.items(), values, strict=True)
        },
    }


def summarize(blocks: Sequence[dict[str, Any]]) -> PrepareSummary:
    """Add up the records of all blocks, in their order."""
    splits: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for block in blocks:
        splits.update(block["splits"])
        reasons.update(kind_of_reason(entry["reason"], entry["source"]) for entry in block["quarantined"])
    return PrepareSummary(
        utterances=sum(block["shard"]["rows"] for block in blocks),
        splits=dict(sorted(splits.items())),
        quarantined=reasons.total(),
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        unaligned=sum(block["unaligned"] for block in blocks),
        words=sum(block["words"] for block in blocks),
        units=sum(block["units"] for block in blocks),
        seconds=sum(block["seconds"] for block in blocks),
        histograms={name: np.sum([block["histograms"][name] for block in blocks], axis=0).tolist() for name in BINS},
    )


def kind_of_reason(reason: str, source: str) -> str:
    """A reason without its names, numbers and remedy, so that equal ones can be counted."""
    kind = reason.replace(source, "it")
    kind = re.sub(r"^utterance '.*?': ", "", kind)
    kind = re.sub(r"'[^']*'|\"[^\"]*\"", "…", kind)
    kind = re.sub(r"-?\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", "N", kind)
    return kind.split(": ", 1)[0]


def draw(summary: PrepareSummary, path: Path) -> None:
    """Draw the histograms as PNG; the same summary gives the same bytes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture of the summary needs matplotlib: pip install 'smoltolk[demo]'") from error

    drawn = {name: counts for name, counts in summary.histograms.items() if any(counts)}
    figure = Figure(figsize=(8, 2.2 * max(1, len(drawn))), layout="constrained")
    title = f"{summary.utterances:,} utterances, {summary.hours:,.1f} h, {summary.quarantined:,} quarantined"
    figure.suptitle(title)
    for number, (name, counts) in enumerate(drawn.items(), start=1):
        axes = figure.add_subplot(len(drawn), 1, number)
        axes.stairs(counts, BINS[name], fill=True)
        used = np.flatnonzero(counts)
        axes.set_xlim(BINS[name][used[0]], BINS[name][used[-1] + 1])
        if name.startswith("seconds"):
            axes.set_xscale("log")
        axes.set_xlabel(name)
        axes.set_ylabel("utterances")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    write_atomically(path, file.getvalue())
