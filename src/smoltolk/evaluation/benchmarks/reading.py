"""From a folder to its benchmark: told by its layout, or by name."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from smoltolk.evaluation.benchmarks.benchmark import (
    MODALITIES,
    BenchmarkError,
    ClozeBenchmark,
    Fault,
    Modality,
    PairBenchmark,
)
from smoltolk.evaluation.benchmarks.cross_modal import is_cross_modal, read_cross_modal
from smoltolk.evaluation.benchmarks.numbered import (
    RENAMED,
    STORYCLOZE,
    is_renamed,
    is_salmon,
    is_storycloze,
    read_renamed,
    read_salmon,
    read_storycloze,
)
from smoltolk.evaluation.benchmarks.token_cloze import TokenClozeBenchmark, is_token_cloze, read_token_cloze
from smoltolk.evaluation.benchmarks.zerospeech import GOLD_FILE, SPLITS, find_gold, read_gold, text_notes
from smoltolk.evaluation.tasks import PAIRS
from smoltolk.speech.audio import AudioError, load_audio

TASKS = ("swuggy", "sblimp", "prosaudit", *STORYCLOZE, "cross-modal-storycloze", "salmon")
Benchmark = PairBenchmark | ClozeBenchmark | TokenClozeBenchmark
# Stories in the 2016 test set of the Story Cloze Test, by the card of huggingface.co/datasets/LSDSem/story_cloze; they
# are what github.com/slp-rl/SpokenStoryCloze speaks.
NUM_STORIES = 1871
# In each part, by the card of huggingface.co/datasets/slprl/SALMon; its sample numbers go up to 363, with gaps.
NUM_SALMON_SAMPLES = 200
_CHECK_RATE_HZ = 16_000  # any will do


@dataclass(frozen=True)
class Found:
    """A benchmark that a folder holds.

    Args:
        task: its name, one of `TASKS`.
        place: where its files lie.
        split: part of the benchmark, None where it has none.
        read: reads it, given where to report faults.
    """

    task: str
    place: Path
    split: str | None
    read: Callable[[Callable[[Fault], None]], Benchmark]


def find_benchmarks(
    folder: Path, *, modality: Modality = "speech", pairs: Sequence[str] | None = None, story: str = "storycloze"
) -> list[Found]:
    """Every benchmark that a folder holds, by its layout; nothing but names and headers is read.

    Args:
        folder: a split, a folder of splits, a whole data set, or a folder of wavs.
        modality: "speech", or "text" for the text twins of sWUGGY and sBLIMP.
        pairs: modality pairs that will be scored of a cross-modal benchmark.
        story: which StoryCloze spoken stories are; their files do not say.
    """
    found = []
    for layout, place in find_gold(folder):
        split = place.name if place.name in SPLITS else None
        found.append(Found(layout.name, place, split, partial(read_gold, layout, place, modality)))
    if found or not folder.is_dir():
        return found
    if is_salmon(folder):
        return [Found("salmon", folder, None, partial(read_salmon, folder))]
    if is_token_cloze(folder):
        return [Found("cross-modal-storycloze", folder, None, partial(read_token_cloze, folder))]
    if is_cross_modal(folder):
        read = partial(read_cross_modal, folder, pairs=pairs)
        return [Found("cross-modal-storycloze", folder, None, read)]
    if is_storycloze(folder):
        return [Found(story, folder, None, partial(read_storycloze, folder, story))]
    names = [name for name in RENAMED if is_renamed(folder, name)]
    return [Found(name, folder, None, partial(read_renamed, folder, name)) for name in names]


def open_benchmark(
    folder: Path,
    task: str = "auto",
    *,
    split: str | None = None,
    modality: Modality = "speech",
    pairs: Sequence[str] | None = None,
) -> Benchmark:
    """Reads a benchmark that is whole.

    Args:
        folder: a split, a folder of splits, a whole data set, or a folder of wavs.
        task: one of `TASKS`, or "auto" where the folder holds one only.
        split: "dev" or "test", where it holds both.
        modality: "speech", or "text" for the text twins of sWUGGY and sBLIMP.
        pairs: modality pairs that will be scored of a cross-modal benchmark, by default all four.

    Raises:
        BenchmarkError: something is missing, has no partner or cannot be read; says all that is.
        ValueError: the folder holds no such benchmark, or several.
    """
    if task != "auto" and task not in TASKS:
        raise ValueError(f"task is {task!r}: choose one of auto, {', '.join(TASKS)}")
    if modality not in MODALITIES:
        raise ValueError(f"modality is {modality!r}: choose one of {', '.join(MODALITIES)}")
    if wrong := [pair for pair in pairs or () if pair not in PAIRS]:
        raise ValueError(f"pair is {wrong[0]!r}: choose from {', '.join(PAIRS)}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder of a benchmark")
    story = task if task in STORYCLOZE else "storycloze"
    there = find_benchmarks(folder, modality=modality, pairs=pairs, story=story)
    fitting = [found for found in there if task in ("auto", found.task) and split in (None, found.split)]
    if not fitting:
        holds = ", ".join(map(_named, there)) or "nothing of a known layout"
        wanted = " ".join(filter(None, ("benchmark" if task == "auto" else task, split)))
        raise ValueError(f"{folder} holds no {wanted}, but {holds}: correct the folder, --task or --split")
    if len(fitting) > 1:
        raise ValueError(f"{folder} holds {', '.join(map(_named, fitting))}: choose one by --task and --split")
    if modality == "text" and not (fitting[0].place / GOLD_FILE).is_file():
        raise ValueError(f"modality is 'text', but {fitting[0].task} in this layout has no text column: leave it out")
    faults: list[Fault] = []
    benchmark = fitting[0].read(faults.append)
    if faults:
        raise BenchmarkError(fitting[0].place, faults)
    return benchmark


def _named(found: Found) -> str:
    return f"{found.task} {found.split}" if found.split else found.task


@dataclass(frozen=True, eq=False)
class Checked:
    """A benchmark with all that was found in it.

    Args:
        found: which it is.
        benchmark: what can be used of it.
        faults: what keeps it from being scored.
        notes: what is odd, and does not.
    """

    found: Found
    benchmark: Benchmark
    faults: tuple[Fault, ...]
    notes: tuple[Fault, ...]


def check_benchmarks(folder: Path) -> Iterator[Checked]:
    """Reads every benchmark in a folder with all its audio, and says all that is wrong or odd with each.

    Args:
        folder: as for `open_benchmark`.

    Raises:
        ValueError: the folder holds none.
    """
    there = find_benchmarks(folder)
    if not there:
        raise ValueError(f"{folder} holds no benchmark that is known: {', '.join(TASKS)}")
    texts = {place: layout for layout, place in find_gold(folder)}
    for found in there:
        faults: list[Fault] = []
        benchmark = found.read(faults.append)
        for path in benchmark.audio_files():
            try:
                load_audio(path, sample_rate_hz=_CHECK_RATE_HZ)
            except AudioError as error:
                if path.is_file():  # otherwise it is said already
                    faults.append(Fault(str(path), str(error).removeprefix(f"{path} ")))
        notes = text_notes(texts[found.place], found.place) if found.place in texts else []
        notes += _size_notes(found, benchmark)
        yield Checked(found, benchmark, tuple(faults), tuple(notes))


def _size_notes(found: Found, benchmark: Benchmark) -> list[Fault]:
    """Parts whose number of items is not the published one: parts of sets are of use too."""
    if found.task in STORYCLOZE or found.task == "cross-modal-storycloze":
        known, what = NUM_STORIES, "pairs"
    elif found.task == "salmon":
        known, what = NUM_SALMON_SAMPLES, "samples"
    else:
        return []
    notes = []
    for part, count in sorted(benchmark.sizes().items()):
        if count != known:
            where = found.place / part if (found.place / part).is_dir() else found.place
            some = f"{count:,} of the" if count < known else f"{count:,} {what}, more than the"
            notes.append(Fault(str(where), f"holds {some} {known:,} {what} of the published set"))
    return notes
