"""Benchmarks whose pairs are in file names: slamkit's renamed sWUGGY and sBLIMP, spoken StoryCloze, SALMon.

The names are those that https://github.com/slp-rl/slamkit (`slamkit/metric/modelling_metric.py`) reads.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from smoltolk.evaluation.benchmarks.benchmark import Fault, PairBenchmark, Stimulus, StimulusPair
from smoltolk.evaluation.protocols import AUTHORS, SALMON
from smoltolk.evaluation.results import Average

RENAMED = {"swuggy": ("_", "sWUGGY"), "sblimp": ("+", "sBLIMP")}  # what follows the number, and the benchmark's name
SALMON_PARTS = (
    "bg_alignment",
    "bg_all_consistency",
    "bg_domain_consistency",
    "gender_consistency",
    "rir_consistency",
    "sentiment_alignment",
    "sentiment_consistency",
    "speaker_consistency",
)
STORYCLOZE = {"storycloze": None, "sstorycloze": "sSC", "tstorycloze": "tSC"}  # and their published columns
_STORY = re.compile(r"(\d+)_(.+)_(correct|incorrect)")
_SAMPLE = re.compile(r"sample_(\d+)_([01])")
Report = Callable[[Fault], None]


def wavs_in(folder: Path) -> list[Path]:
    """The wavs of a folder by name; none if there is no such folder."""
    return sorted(path for path in folder.iterdir() if path.suffix == ".wav") if folder.is_dir() else []


def is_renamed(folder: Path, name: str) -> bool:
    """Whether the wavs of a folder are numbered as slamkit numbers "swuggy" or "sblimp"."""
    pattern = re.compile(rf"\d+{re.escape(RENAMED[name][0])}")
    return any(pattern.match(path.stem) for path in wavs_in(folder)) and not is_storycloze(folder)


def is_storycloze(folder: Path) -> bool:
    """Whether a folder holds spoken stories with a right and a wrong end."""
    return any(_STORY.fullmatch(path.stem) for path in wavs_in(folder))


def is_salmon(folder: Path) -> bool:
    """Whether a folder holds parts of SALMon."""
    return any((folder / part).is_dir() for part in SALMON_PARTS)


def read_renamed(folder: Path, name: str, report: Report) -> PairBenchmark:
    """Reads sWUGGY or sBLIMP with slamkit's names: `<number>_….wav` or `<number>+….wav`, the even ones positive.

    There are no ids, voices or types in it: the average is over pairs, not the challenge's.
    """
    separator, group = RENAMED[name]
    pattern = re.compile(rf"(\d+){re.escape(separator)}.+")
    numbered = _numbered(folder, pattern, f"<number>{separator}<anything>.wav", report)
    pairs = []
    for number, both in _consecutive(folder, numbered, first=0, report=report):
        positive, negative = (Stimulus(path.stem, path) for path in both)
        pairs.append(StimulusPair(str(number), positive, negative))
    return _whole(name, folder, pairs, (Average(group, "pairs"),), report)


def read_storycloze(folder: Path, name: str, report: Report) -> PairBenchmark:
    """Reads spoken stories: `<number>_<story>_correct.wav` and `<number + 1>_<story>_incorrect.wav`.

    Args:
        folder: the folder of wavs.
        name: "sstorycloze" or "tstorycloze", which file names do not tell apart, or "storycloze" for either.
        report: called with each fault.
    """
    numbered = _numbered(folder, _STORY, "<number>_<story>_correct.wav or …_incorrect.wav", report)
    first = min(numbered, default=0) % 2
    pairs = []
    for number, both in _consecutive(folder, numbered, first=first, report=report):
        (story, end), (other, other_end) = (_STORY.fullmatch(path.stem).groups()[1:] for path in both)  # type: ignore[union-attr]
        if story != other or (end, other_end) != ("correct", "incorrect"):
            what = f"should be followed by {number + 1}_{story}_incorrect.wav, not by {both[1].name}"
            if end != "correct":
                what = f"should be {number}_{story}_correct.wav, the right end before the wrong one"
            report(Fault(str(both[0]), what))
            continue
        positive, negative = (Stimulus(path.stem, path) for path in both)
        pairs.append(StimulusPair(f"{number}_{story}", positive, negative))
    averages = (Average("StoryCloze", name, anchor=STORYCLOZE[name]),)
    return _whole(name, folder, pairs, averages, report, is_cloze=True)


def read_salmon(folder: Path, report: Report) -> PairBenchmark:
    """Reads SALMon (arXiv 2409.07437): `sample_<i>_0.wav` is right and `sample_<i>_1.wav` wrong, in eight folders."""
    pairs = []
    for part in SALMON_PARTS:
        here = folder / part
        if not here.is_dir():
            report(Fault(str(here), "is missing: SALMon has eight parts"))
            continue
        sides: dict[int, dict[str, Path]] = {}
        for path in wavs_in(here):
            if match := _SAMPLE.fullmatch(path.stem):
                known = sides.setdefault(int(match[1]), {})
                if match[2] in known:
                    report(Fault(str(path), f"is the same sample as {known[match[2]].name}: remove one"))
                known[match[2]] = path
            else:
                report(Fault(str(path), "is no sample: names are sample_<number>_0.wav and sample_<number>_1.wav"))
        if not sides:
            report(Fault(str(here), "holds no samples"))
        for number, known in sorted(sides.items()):
            if len(known) < 2:
                ((side, path),) = known.items()
                report(Fault(str(path), f"has no partner: sample_{number}_{1 - int(side)}.wav is missing"))
                continue
            positive, negative = (Stimulus(f"{part}/{known[side].stem}", known[side]) for side in "01")
            pairs.append(StimulusPair(f"{part}/{number}", positive, negative, {"part": part}))
    present = list(dict.fromkeys(pair.labels["part"] for pair in pairs))
    averages = [Average("SALMon", part, {"part": part}) for part in present]
    averages.append(Average("SALMon", "mean of parts", over=("part", "id")))
    return PairBenchmark("salmon", folder, tuple(pairs), tuple(averages), SALMON)


def _numbered(folder: Path, pattern: re.Pattern[str], names: str, report: Report) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in wavs_in(folder):
        if (match := pattern.fullmatch(path.stem)) is None:
            report(Fault(str(path), f"is no item: names are {names}"))
        elif (number := int(match[1])) in found:
            report(Fault(str(path), f"has the number of {found[number].name}: remove one"))
        else:
            found[number] = path
    return found


def _consecutive(
    folder: Path, numbered: dict[int, Path], *, first: int, report: Report
) -> Iterable[tuple[int, tuple[Path, Path]]]:
    """Pairs of consecutive numbers. Every number up to the last one has to be there: a gap is a lost file."""
    last = max(numbered, default=first - 1)
    last += (last - first + 1) % 2  # the last one needs its partner too
    missing = [number for number in range(first, last + 1) if number not in numbered]
    for number in missing[:1000]:
        partner = first + ((number - first) ^ 1)
        beside = f", the partner of {numbered[partner].name}," if partner in numbered else ""
        report(Fault(str(folder), f"the wav with number {number}{beside} is missing"))
    if len(missing) > 1000:
        report(Fault(str(folder), f"{len(missing) - 1000} more numbers below {last} are missing"))
    for number in sorted(numbered):
        if (number - first) % 2 == 0 and number + 1 in numbered:
            yield number, (numbered[number], numbered[number + 1])


def _whole(
    name: str,
    folder: Path,
    pairs: list[StimulusPair],
    averages: tuple[Average, ...],
    report: Report,
    *,
    is_cloze: bool = False,
) -> PairBenchmark:
    if not pairs:
        report(Fault(str(folder), "holds no pair"))
    return PairBenchmark(name, folder, tuple(pairs), averages, AUTHORS, is_cloze=is_cloze)
