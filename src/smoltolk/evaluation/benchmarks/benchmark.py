"""What a benchmark is once it is read, whatever its layout, and the errors of those that are not whole."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from smoltolk.evaluation.pairs import PairItem, PairTask
from smoltolk.evaluation.protocols import CONTINUATION, Candidate, Protocol
from smoltolk.evaluation.results import Average, TaskResult
from smoltolk.evaluation.tasks import PAIRS, PARTS, ClozeItem, cloze_task
from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.speech.audio import load_audio, write_atomically

Modality = Literal["speech", "text"]
MODALITIES: tuple[Modality, ...] = ("speech", "text")
_PAIRS_AT_ONCE = 8  # whose audio is in memory and tokenized together
_SHOWN_FAULTS = 20


@dataclass(frozen=True)
class Fault:
    """Something that is wrong with a benchmark.

    Args:
        where: the file, with the line where there is one.
        what: what is wrong there, and what to do about it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class BenchmarkError(ValueError):
    """A benchmark that is not whole; nothing of it is scored.

    Args:
        folder: the benchmark.
        faults: all that is wrong with it.
    """

    def __init__(self, folder: Path, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        lines = [f"{folder} is not whole, {len(faults)} faults:", *map(str, faults[:_SHOWN_FAULTS])]
        if len(faults) > _SHOWN_FAULTS:
            lines.append(f"… and {len(faults) - _SHOWN_FAULTS} more: `smoltolk data check {folder}` lists them")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Stimulus:
    """One sequence of a benchmark.

    Args:
        name: its name, without a suffix; what submissions call it.
        content: the audio file, or the text.
    """

    name: str
    content: Path | str


@dataclass(frozen=True)
class StimulusPair:
    """Two stimuli, the first of which should be the likelier one.

    Args:
        id: what to call the pair; voices of one pair share it.
        positive: the right one.
        negative: the wrong one.
        labels: what averages choose and group by.
    """

    id: str
    positive: Stimulus
    negative: Stimulus
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PairBenchmark:
    """A benchmark of pairs without prompts.

    Args:
        name: what to call it in results.
        folder: where it lies.
        pairs: the pairs.
        averages: the numbers to report.
        protocol: how it is usually scored.
        split: part of the benchmark, None where it has none.
        is_cloze: whether ties count as in StoryCloze.
        submission: path of the official submission file in a submission, None where there is none.
    """

    name: str
    folder: Path
    pairs: tuple[StimulusPair, ...]
    averages: tuple[Average, ...]
    protocol: Protocol
    split: str | None = None
    is_cloze: bool = False
    submission: str | None = None

    def num_sequences(self, pairs: Sequence[str] | None = None) -> int:
        """How many sequences are scored."""
        return 2 * len(self.pairs)

    def sizes(self) -> dict[str, int]:
        """Number of pairs in each part; all in "" where there are no parts."""
        return dict(Counter(pair.labels.get("part", "") for pair in self.pairs))

    def audio_files(self) -> list[Path]:
        """Every audio file of the benchmark."""
        stimuli = [stimulus for pair in self.pairs for stimulus in (pair.positive, pair.negative)]
        return [stimulus.content for stimulus in stimuli if isinstance(stimulus.content, Path)]

    def task(
        self,
        pipeline: SmolTolkPipeline,
        *,
        protocol: Protocol,
        pairs: Sequence[str] | None = None,
        tokenized: Callable[[int], None] | None = None,
    ) -> PairTask:
        """The task for a model; audio is tokenized when its turn has come, with the model's own speech tokenizer.

        Args:
            pipeline: the model with its tokenizers.
            protocol: how it will be scored.
            pairs: modality pairs, which this benchmark has not.
            tokenized: called with the number of audio files that were tokenized since the last call.

        Raises:
            ValueError: the model has no speech tokenizer, or there are settings that only cloze tasks have.
        """
        if pairs is not None:
            raise ValueError(f"pairs is {list(pairs)}, but {self.name} has no prompts: leave --pairs out")
        if protocol.num_prefix_tokens:
            raise ValueError(
                f"num_prefix_tokens is {protocol.num_prefix_tokens}, but {self.name} has no prompts: leave it out"
            )
        _check_tokenizer(pipeline, self.name, bool(self.audio_files()))
        return PairTask(self.name, self._items(pipeline, tokenized), self.averages, self.split, self.is_cloze)

    def _items(self, pipeline: SmolTolkPipeline, tokenized: Callable[[int], None] | None) -> Iterator[PairItem]:
        for start in range(0, len(self.pairs), _PAIRS_AT_ONCE):
            some = self.pairs[start : start + _PAIRS_AT_ONCE]
            stimuli = [stimulus.content for pair in some for stimulus in (pair.positive, pair.negative)]
            ids = _encode(pipeline, stimuli, tokenized)
            for number, pair in enumerate(some):
                positive, negative = (Candidate(np.zeros(0, dtype=np.int64), ids[2 * number + i]) for i in (0, 1))
                about = "\n".join(_identity(content) for content in stimuli[2 * number : 2 * number + 2])
                yield PairItem(pair.id, positive, negative, pair.labels, couple=pair.id, content=about)

    def write_submission(self, folder: Path, result: TaskResult) -> Path | None:
        """Writes the scores as the Zero Resource Challenge takes them: lines of a stimulus's name and its score.

        Args:
            folder: folder of the submission.
            result: scores of this benchmark.

        Returns:
            The file, None for a benchmark that the challenge does not have.

        Raises:
            ValueError: the result is not of this benchmark.
        """
        if self.submission is None:
            return None
        if result.task != self.name or result.table["id"].to_pylist() != [pair.id for pair in self.pairs]:
            raise ValueError(f"the result of {result.task} holds other items than {self.folder}: evaluate it again")
        positive, negative = (result.table[f"{side}_score"].to_pylist() for side in ("positive", "negative"))
        lines = [
            f"{stimulus.name} {score!r}\n"
            for pair, *scores in zip(self.pairs, positive, negative, strict=True)
            for stimulus, score in zip((pair.positive, pair.negative), scores, strict=True)
        ]
        path = folder / self.submission
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, "".join(lines).encode())
        return path


@dataclass(frozen=True)
class ClozeStimuli:
    """A prompt and its endings as they lie on disk.

    Args:
        id: what to call the item.
        kind: items of one kind are reported together.
        audio: audio files by part ("prompt", "true", "false").
        text: texts by part.
    """

    id: str
    kind: str
    audio: Mapping[str, Path]
    text: Mapping[str, str]


@dataclass(frozen=True)
class ClozeBenchmark:
    """A benchmark of prompts with two endings, in modality pairs.

    Args:
        name: what to call it in results.
        folder: where it lies.
        stimuli: the items.
        protocol: how it is usually scored.
    """

    name: str
    folder: Path
    stimuli: tuple[ClozeStimuli, ...]
    protocol: Protocol = CONTINUATION

    split = None
    submission = None

    def num_sequences(self, pairs: Sequence[str] | None = None) -> int:
        """How many sequences are scored in so many modality pairs."""
        return 2 * len(self.stimuli) * len(PAIRS if pairs is None else pairs)

    def sizes(self) -> dict[str, int]:
        """Number of items of each kind."""
        return dict(Counter(stimuli.kind for stimuli in self.stimuli))

    def audio_files(self) -> list[Path]:
        """Every audio file of the benchmark."""
        return [path for stimuli in self.stimuli for path in stimuli.audio.values()]

    def task(
        self,
        pipeline: SmolTolkPipeline,
        *,
        protocol: Protocol,
        pairs: Sequence[str] | None = None,
        tokenized: Callable[[int], None] | None = None,
    ) -> PairTask:
        """The task for a model; all audio is tokenized now, with the model's own speech tokenizer.

        Args:
            pipeline: the model with its tokenizers.
            protocol: how it will be scored.
            pairs: modality pairs; by default all four.
            tokenized: called with the number of audio files that were tokenized since the last call.

        Raises:
            ValueError: the model has no speech tokenizer, or an item is empty.
        """
        pairs = PAIRS if pairs is None else pairs
        speech_parts = {part for part in PARTS if needs(part, "speech", pairs)}
        _check_tokenizer(pipeline, self.name, bool(speech_parts))
        items = []
        for stimuli in self.stimuli:
            found: dict[str, str | np.ndarray | None] = {f"{part}_text": stimuli.text.get(part) for part in PARTS}
            chosen = [part for part in PARTS if part in speech_parts]
            ids = _encode(pipeline, [stimuli.audio[part] for part in chosen], tokenized)
            offset = pipeline.model.ids.speech_offset
            found |= {f"{part}_units": some - offset for part, some in zip(chosen, ids, strict=True)}
            items.append(ClozeItem(stimuli.id, stimuli.kind, stimuli.id, **found))  # type: ignore[arg-type]
        task = cloze_task(pipeline.model, items, pipeline.text_ids, pairs=pairs, protocol=protocol)
        return PairTask(self.name, task.items, task.averages, is_cloze=True)

    def write_submission(self, folder: Path, result: TaskResult) -> Path | None:
        """Writes nothing: the Zero Resource Challenge has no such benchmark."""
        return None


def needs(part: str, modality: Modality, pairs: Sequence[str]) -> bool:
    """Whether some modality pair has a part ("prompt", "true", "false") in a modality."""
    return any(pair.split("→")[part != "prompt"] == ("S" if modality == "speech" else "T") for pair in pairs)


def _check_tokenizer(pipeline: SmolTolkPipeline, name: str, has_audio: bool) -> None:
    if has_audio and pipeline.speech_tokenizer is None:
        raise ValueError(f"{name} is audio, but the model was kept without a speech tokenizer: score its text instead")


def _encode(
    pipeline: SmolTolkPipeline, contents: Sequence[Path | str], tokenized: Callable[[int], None] | None
) -> list[np.ndarray]:
    """Ids of texts, and of audio files, which are tokenized together."""
    paths = [content for content in contents if isinstance(content, Path)]
    units = iter(())
    if paths and (tokenizer := pipeline.speech_tokenizer) is not None:
        audios = [load_audio(path, sample_rate_hz=tokenizer.sample_rate_hz) for path in paths]
        units = iter([encoded.units + pipeline.model.ids.speech_offset for encoded in tokenizer.encode_batch(audios)])
        if tokenized is not None:
            tokenized(len(paths))
    return [
        next(units) if isinstance(content, Path) else np.array(pipeline.text_ids(content), dtype=np.int64)
        for content in contents
    ]


def _identity(content: Path | str) -> str:
    """What a stimulus is whatever its tokens: its text, or the hash of its file."""
    return content if isinstance(content, str) else hashlib.sha256(content.read_bytes()).hexdigest()
