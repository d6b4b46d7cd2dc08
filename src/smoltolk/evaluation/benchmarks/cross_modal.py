"""Cross-modal StoryCloze in slamkit's layout: `<base>_{mutual,correct,incorrect}.{wav,txt}`.

The names are those that https://github.com/slp-rl/slamkit (`slamkit/metric/cross_modal_metric.py`) reads.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from smoltolk.evaluation.benchmarks.benchmark import ClozeBenchmark, ClozeStimuli, Fault, needs
from smoltolk.evaluation.tasks import PAIRS

PART_NAMES = {"prompt": "mutual", "true": "correct", "false": "incorrect"}
_NAME = re.compile(r"(.+)_(mutual|correct|incorrect)\.(wav|txt)")


def parse_name(name: str) -> tuple[str, str, str] | None:
    """Base, part and suffix of a file's name; None for a name of another form."""
    found = _NAME.fullmatch(name)
    return found and (found[1], found[2], found[3])


def is_cross_modal(folder: Path) -> bool:
    """Whether a folder, or a folder in it, holds prompts (`_mutual`) with endings."""
    return any(_NAME.fullmatch(path.name) and "_mutual." in path.name for here in _places(folder) for path in _in(here))


def read_cross_modal(
    folder: Path, report: Callable[[Fault], None], *, pairs: Sequence[str] | None = None
) -> ClozeBenchmark:
    """Reads prompts and endings; each folder in the folder is a kind of its own.

    Texts lose the white space around them, and endings begin with one space, as words do in running text.

    Args:
        folder: the folder of files, or of folders of them.
        report: called with each fault.
        pairs: modality pairs that will be scored, by default all four; what none of them needs may be missing.
    """
    pairs = PAIRS if pairs is None else pairs
    stimuli = []
    for here in _places(folder):
        names = {path.name for path in _in(here)}
        bases = sorted({match[1] for name in names if (match := _NAME.fullmatch(name))})
        for name in sorted(names):
            if name.endswith(".wav") and not _NAME.fullmatch(name):
                report(Fault(str(here / name), "is no part: names are <base>_mutual.wav, _correct.wav, _incorrect.wav"))
        for base in bases:
            audio, text = {}, {}
            for part, suffix in PART_NAMES.items():
                if needs(part, "speech", pairs):
                    audio[part] = here / f"{base}_{suffix}.wav"
                    if audio[part].name not in names:
                        report(Fault(str(audio[part]), "is missing"))
                if needs(part, "text", pairs):
                    found = _read_text(here / f"{base}_{suffix}.txt", report)
                    text[part] = found if part == "prompt" else f" {found}"
            is_below = here != folder
            kind, name = (here.name, f"{here.name}/{base}") if is_below else ("cloze", base)
            stimuli.append(ClozeStimuli(name, kind, audio, text))
    if not stimuli:
        report(Fault(str(folder), "holds no item: names are <base>_mutual.wav, <base>_mutual.txt and so on"))
    return ClozeBenchmark("cross-modal-storycloze", folder, tuple(stimuli))


def _places(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]


def _in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]


def _read_text(path: Path, report: Callable[[Fault], None]) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except FileNotFoundError:
        report(Fault(str(path), "is missing"))
        return ""
    except UnicodeDecodeError as error:
        report(Fault(str(path), f"is not UTF-8 (byte {error.start}): convert it"))
        return ""
    if not text:
        report(Fault(str(path), "is empty, there is no text to score"))
    return text
