"""Batches as a pure function of (seed, step).

Row `r` of step `s` depends on the seed, `s` and `r` alone: any split of a step into ranks and micro-batches
draws the same rows, and a run resumes at any step without other state.
"""

import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from smoltolk.data.interleaving import (
    IGNORED_LABEL,
    PAIR_CONTROL_TOKENS,
    Row,
    interleaved_row,
    speech_row,
    synthesis_row,
    text_row,
    transcription_row,
)
from smoltolk.data.policies import Policy, SpanPolicy
from smoltolk.data.shard import Tokens
from smoltolk.data.store import Store
from smoltolk.model.configuration_smoltolk import IdSpace

TASKS = ("interleaved", "speech", "text", "transcription", "synthesis")
Weight = float | Literal["size"]
PAIR_TASKS = ("transcription", "synthesis")
NEEDS = {
    "interleaved": "text, speech and word times",
    "transcription": "text and speech",
    "synthesis": "text and speech",
}


@dataclass(frozen=True)
class TaskMixture:
    """Shares of the tasks, drawn per row; only their ratios matter (paper: stage 1 1:0:0, stage 2 1:1:1).

    Args:
        interleaved: rows of alternating text and speech.
        speech: rows of speech alone.
        text: rows of text alone.
        transcription: rows of pairs, speech and then its text.
        synthesis: rows of pairs, text and then its speech.

    Raises:
        ValueError: a weight is negative, or all are zero.
    """

    interleaved: float = 1.0
    speech: float = 1.0
    text: float = 1.0
    transcription: float = 0.0
    synthesis: float = 0.0

    def __post_init__(self) -> None:
        for task in TASKS:
            if getattr(self, task) < 0:
                raise ValueError(f"{task} is {getattr(self, task)}: a task's weight is 0 or more")
        if sum(self.weights) == 0:
            raise ValueError(f"{', '.join(TASKS)} are all 0: give at least one task a weight")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of `TASKS`."""
        return tuple(getattr(self, task) for task in TASKS)


@dataclass(frozen=True, eq=False)
class Transcripts:
    """Rows in writing, see `Transcript`; rows of other tasks than interleaved and speech say nothing.

    Args:
        text_ids: text tokens (rows, most_tokens) int64, end-of-text after the last one.
        places: which of them has just been said (rows, row_tokens) int64; −1 for none.
        word_ids: the word that is being said (rows, row_tokens) int64; −100 for none.
    """

    text_ids: torch.Tensor
    places: torch.Tensor
    word_ids: torch.Tensor

    def select(self, rows: slice | torch.Tensor) -> "Transcripts":
        """Some of the rows."""
        return Transcripts(self.text_ids[rows], self.places[rows], self.word_ids[rows])

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each row that are needed, (rows,)."""
        return self.places.amax(1) + 1


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step.

    Args:
        input_ids: ids (rows, row_tokens) int64.
        labels: targets (rows, row_tokens) int64, −100 where nothing is predicted; the model shifts.
        tasks: the task of each row.
        samples: the utterances in each row, as (store, row) by number; `BatchSource.sample_ids` has their names.
        transcripts: the rows in writing, where asked for.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    tasks: list[str]
    samples: list[list[tuple[int, int]]]
    transcripts: Transcripts | None = None

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def attention_mask(self) -> torch.Tensor:
        """Ones (rows, row_tokens) int64: rows are full."""
        return torch.ones_like(self.input_ids)

    def select(self, rows: slice) -> "Batch":
        """Some of the rows, as a micro-batch of views."""
        transcripts = None if self.transcripts is None else self.transcripts.select(rows)
        return Batch(self.input_ids[rows], self.labels[rows], self.tasks[rows], self.samples[rows], transcripts)


@dataclass(frozen=True, eq=False)
class _Draws:
    """What a task draws utterances from: stores with their row numbers and cumulative shares."""

    stores: list[Store]
    rows: list[np.ndarray]
    cumulative: list[float]
    reads_text: bool

    def tokens(self, rng: np.random.Generator, samples: list[tuple[int, int]]) -> Iterator[Tokens]:
        """Endless draws: a store by its share, then one of its rows uniformly; notes which."""
        while True:
            which = bisect_right(self.cumulative, rng.random())
            rows = self.rows[which]
            row = int(rows[rng.integers(len(rows))])
            samples.append((which, row))
            yield self.stores[which].tokens(row, reads_text=self.reads_text)


class BatchSource:
    """Draws batches from stores.

    Args:
        stores: for each task (`TASKS`) the stores it draws from, with the share of utterances drawn from each, or
            "size" for as many as there are. Utterances without the needed halves are never drawn.
        mixture: share of each task in the rows.
        ids: id space of the model.
        row_tokens: length of a row.
        policy: which words of interleaved rows are text and which are speech; by default the paper's.
        split: the split to draw from. Fixed validation rows are those of `split="validation"` at a fixed
            seed and step.
        max_positions: longest sequence the model has positions for.
        predict_switch: whether the switch token is a target.
        with_transcripts: whether batches hold their rows in writing.
        speech_fingerprint: fingerprint of the model's speech tokenizer, None when unknown.
        text_fingerprint: fingerprint of the model's text tokenizer, None when unknown.

    Raises:
        ValueError: a setting is out of range, a store does not fit the model, stores differ in their
            tokenizers, or a task has nothing to draw from.
    """

    def __init__(
        self,
        stores: Mapping[str, Sequence[tuple[Store, Weight]]],
        *,
        mixture: TaskMixture,
        ids: IdSpace,
        row_tokens: int,
        policy: Policy | None = None,
        split: str = "train",
        max_positions: int | None = None,
        predict_switch: bool = False,
        with_transcripts: bool = False,
        speech_fingerprint: str | None = None,
        text_fingerprint: str | None = None,
    ) -> None:
        if row_tokens < 2:
            raise ValueError(f"row_tokens is {row_tokens}: a row needs 2 tokens to predict one")
        if max_positions is not None and row_tokens > max_positions:
            raise ValueError(
                f"row_tokens is {row_tokens}, but the backbone has {max_positions} positions: "
                f"lower row_tokens to {max_positions} or less"
            )
        if unknown := set(stores) - set(TASKS):
            raise ValueError(f"stores names {', '.join(sorted(unknown))}: tasks are {', '.join(TASKS)}")
        self.ids = ids
        self.row_tokens = row_tokens
        self.split = split
        self._policy = policy or SpanPolicy()
        self._predict_switch = predict_switch
        self._with_transcripts = with_transcripts
        self._task_cumulative = _cumulative(mixture.weights)
        self._draws: dict[str, _Draws] = {}
        for task, weight in zip(TASKS, mixture.weights, strict=True):
            if weight == 0:
                continue
            for store, _ in stores.get(task, ()):
                needs_text, needs_speech = task != "speech", task != "text"
                speech_fingerprint, text_fingerprint = self._check_store(
                    store, needs_text, needs_speech, speech_fingerprint, text_fingerprint
                )
            self._draws[task] = self._make_draws(task, stores.get(task, ()))

    @property
    def stores(self) -> list[Store]:
        """The stores that rows are drawn from; one of several tasks comes several times."""
        return [store for draws in self._draws.values() for store in draws.stores]

    def _check_store(
        self,
        store: Store,
        needs_text: bool,
        needs_speech: bool,
        speech_fingerprint: str | None,
        text_fingerprint: str | None,
    ) -> tuple[str | None, str | None]:
        """Check a store against the model and the stores before it; returns the fingerprints of all."""
        if needs_speech:
            store.require(speech_fingerprint=speech_fingerprint)
            speech_fingerprint = store.metadata.speech_tokenizer_fingerprint
            if store.num_units != self.ids.num_units:
                raise ValueError(
                    f"{store.path} has num_units {store.num_units}, the model has {self.ids.num_units}: "
                    f"prepare the store with the model's speech tokenizer"
                )
        if needs_text:
            store.require(text_fingerprint=text_fingerprint)
            text_fingerprint = store.metadata.text_tokenizer_fingerprint
            if store.max_text_id >= self.ids.text_vocab_size:
                raise ValueError(
                    f"{store.path} holds text token {store.max_text_id}, but the model's text vocabulary has "
                    f"{self.ids.text_vocab_size}: prepare the store with the model's text tokenizer"
                )
        return speech_fingerprint, text_fingerprint

    def _make_draws(self, task: str, weighted: Sequence[tuple[Store, Weight]]) -> _Draws:
        if not weighted:
            raise ValueError(f"task {task} has a weight but no store: give it a store, or the weight 0")
        if len({weight == "size" for _, weight in weighted}) > 1:
            raise ValueError(f'task {task} has the weight "size" for some stores and numbers for others: give one kind')
        rows = []
        for store, weight in weighted:
            if weight != "size" and weight <= 0:
                raise ValueError(f'{store.path} has the weight {weight} in task {task}: give more than 0 or "size"')
            found = store.ids_of_split(
                self.split,
                has_text=task != "speech",
                has_speech=task != "text",
                is_aligned=task == "interleaved",
            )
            rows.append(self._without_overlong(store, task, found) if task in PAIR_TASKS else found)
            if len(rows[-1]) == 0:
                remedy = "with such utterances"
                if self.split == "validation" and not len(store.ids_of_split(self.split)):
                    remedy = "with --validation-share, or set validation.rows to 0"
                elif task == "interleaved" and len(store.ids_of_split(self.split, has_text=True, has_speech=True)):
                    remedy = "with word times or --aligner"
                raise ValueError(
                    f"{store.path} has no utterance with {NEEDS.get(task, task)} in the split {self.split!r}: "
                    f"prepare it {remedy}, or leave the store out of the task {task}"
                )
        return _Draws(
            [store for store, _ in weighted],
            rows,
            _cumulative([len(r) if w == "size" else w for (_, w), r in zip(weighted, rows, strict=True)]),
            reads_text=task == "interleaved" and self._policy.reads_text,
        )

    def _without_overlong(self, store: Store, task: str, rows: np.ndarray) -> np.ndarray:
        """Leaves out, and says so, utterances that are longer than a row and have no word times to cut them by."""
        num_tokens = store.lengths("text_ids")[rows] + store.lengths("units")[rows] + PAIR_CONTROL_TOKENS
        is_overlong = (num_tokens > self.row_tokens) & (store.lengths("word_ends_s")[rows] == 0)
        if is_overlong.any():
            warnings.warn(
                f"task {task} leaves out {is_overlong.sum()} of {len(rows)} utterances of {store.path}: as pairs they "
                f"have up to {num_tokens[is_overlong].max()} tokens, more than row_tokens {self.row_tokens}, and no "
                f"word times to cut them by: align them, cut the recordings, or raise row_tokens",
                stacklevel=4,
            )
        return rows[~is_overlong]

    def batch(self, seed: int, step: int, *, rows: range | int) -> Batch:
        """The given rows of a step: `range(8, 16)` is rows 8 to 15 of it, a number is that many from 0."""
        rows = range(rows) if isinstance(rows, int) else rows
        drawn = [self._row(seed, step, row) for row in rows]
        return Batch(
            input_ids=torch.from_numpy(np.stack([row.input_ids for row, _, _ in drawn])),
            labels=torch.from_numpy(np.stack([row.labels for row, _, _ in drawn])),
            tasks=[task for _, task, _ in drawn],
            samples=[samples for _, _, samples in drawn],
            transcripts=self._transcripts([row for row, _, _ in drawn]) if self._with_transcripts else None,
        )

    def _transcripts(self, rows: Sequence[Row]) -> Transcripts:
        written = [row.transcript for row in rows]
        most_tokens = max(1, *(0 if t is None else len(t.text_ids) for t in written))
        text_ids = np.full((len(rows), most_tokens), self.ids.end_of_text_id, dtype=np.int64)
        places = np.full((len(rows), self.row_tokens), -1)
        word_ids = np.full((len(rows), self.row_tokens), IGNORED_LABEL)
        for i, transcript in enumerate(written):
            if transcript is not None:
                text_ids[i, : len(transcript.text_ids)] = transcript.text_ids
                places[i], word_ids[i] = transcript.places, transcript.word_ids
        return Transcripts(*(torch.from_numpy(array) for array in (text_ids, places, word_ids)))

    def sample_ids(self, batch: Batch) -> list[list[str]]:
        """Names of the utterances in each row of a batch, for error reports."""
        return [
            [self._draws[task].stores[which][row].id for which, row in samples]
            for task, samples in zip(batch.tasks, batch.samples, strict=True)
        ]

    def _row(self, seed: int, step: int, row: int) -> tuple[Row, str, list[tuple[int, int]]]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, row])))
        task = TASKS[bisect_right(self._task_cumulative, rng.random())]
        samples: list[tuple[int, int]] = []
        return self._draw(task, self._draws[task].tokens(rng, samples), rng), task, samples

    def _draw(self, task: str, tokens: Iterator[Tokens], rng: np.random.Generator) -> Row:
        is_written = self._with_transcripts
        if task == "interleaved":
            settings = {"predict_switch": self._predict_switch, "is_written": is_written}
            return interleaved_row(tokens, rng, self.ids, self._policy, self.row_tokens, **settings)
        if task == "speech":
            return speech_row(tokens, rng, self.ids, self.row_tokens, is_written=is_written)
        rows = {"text": text_row, "transcription": transcription_row, "synthesis": synthesis_row}
        return rows[task](tokens, rng, self.ids, self.row_tokens)


def _cumulative(weights: Sequence[float]) -> list[float]:
    """Upper ends in [0, 1] of consecutive shares; the last one that is not 0 is exactly 1."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return (cumulative / cumulative[-1]).tolist()
