"""Batches as a pure function of (seed, step).

Row `r` of step `s` depends on the seed, `s` and `r` alone: any split of a step into ranks and micro-batches
draws the same rows, and a run resumes at any step without other state.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from smoltolk.data.interleaving import Row, SpanPolicy, interleave, speech_row, text_row
from smoltolk.data.store import Store
from smoltolk.data.utterance import Utterance
from smoltolk.model.configuration_smoltolk import IdSpace

TASKS = ("interleaved", "speech", "text")


@dataclass(frozen=True)
class TaskMixture:
    """Shares of the tasks, drawn per row; only their ratios matter (paper: stage 1 1:0:0, stage 2 1:1:1).

    Args:
        interleaved: rows of alternating text and speech.
        speech: rows of speech alone.
        text: rows of text alone.

    Raises:
        ValueError: a weight is negative, or all are zero.
    """

    interleaved: float = 1.0
    speech: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        for task in TASKS:
            if getattr(self, task) < 0:
                raise ValueError(f"{task} is {getattr(self, task)}: a task's weight is 0 or more")
        if sum(self.weights) == 0:
            raise ValueError("interleaved, speech and text are all 0: give at least one task a weight")

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights in the order of `TASKS`."""
        return tuple(getattr(self, task) for task in TASKS)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step.

    Args:
        input_ids: ids (rows, row_tokens) int64.
        labels: targets (rows, row_tokens) int64, −100 where nothing is predicted; the model shifts.
        attention_mask: ones (rows, row_tokens) int64; rows are full.
        tasks: the task of each row.
        sample_ids: ids of the utterances in each row, for error reports.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor
    tasks: list[str]
    sample_ids: list[list[str]]

    def __len__(self) -> int:
        return len(self.tasks)

    def select(self, rows: slice) -> "Batch":
        """Some of the rows, as a micro-batch of views."""
        return Batch(
            self.input_ids[rows],
            self.labels[rows],
            self.attention_mask[rows],
            self.tasks[rows],
            self.sample_ids[rows],
        )


@dataclass(frozen=True, eq=False)
class _Draws:
    """What a task draws utterances from: stores with their row numbers and cumulative shares."""

    stores: list[Store]
    rows: list[np.ndarray]
    cumulative: np.ndarray

    def utterances(self, rng: np.random.Generator, sample_ids: list[str]) -> Iterator[Utterance]:
        """Endless draws: a store by its share, then one of its rows uniformly; notes their ids."""
        while True:
            which = int(self.cumulative.searchsorted(rng.random(), side="right"))
            rows = self.rows[which]
            utterance = self.stores[which][int(rows[rng.integers(len(rows))])]
            sample_ids.append(utterance.id)
            yield utterance


class BatchSource:
    """Draws batches from stores.

    Args:
        stores: for each task ("interleaved", "speech", "text") the stores it draws from, with the share of
            utterances drawn from each. Rows of utterances without the needed halves are never drawn.
        mixture: share of each task in the rows.
        ids: id space of the model.
        row_tokens: length of a row.
        policy: how long the runs of interleaved rows are.
        split: the split to draw from. Fixed validation rows are those of `split="validation"` at a fixed
            seed and step.
        max_positions: longest sequence the model has positions for.
        predict_switch: whether the switch token is a target.
        speech_fingerprint: fingerprint of the model's speech tokenizer, None when unknown.
        text_fingerprint: fingerprint of the model's text tokenizer, None when unknown.

    Raises:
        ValueError: a setting is out of range, a store does not fit the model, stores differ in their
            tokenizers, or a task has nothing to draw from.
    """

    def __init__(
        self,
        stores: Mapping[str, Sequence[tuple[Store, float]]],
        *,
        mixture: TaskMixture,
        ids: IdSpace,
        row_tokens: int,
        policy: SpanPolicy | None = None,
        split: str = "train",
        max_positions: int | None = None,
        predict_switch: bool = False,
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
        self._task_cumulative = _cumulative(mixture.weights)
        self._draws: dict[str, _Draws] = {}
        self._unit_rate_hz = 0.0
        for task, weight in zip(TASKS, mixture.weights, strict=True):
            if weight == 0:
                continue
            for store, _ in stores.get(task, ()):
                needs_text, needs_speech = task != "speech", task != "text"
                speech_fingerprint, text_fingerprint = self._check_store(
                    store, needs_text, needs_speech, speech_fingerprint, text_fingerprint
                )
            self._draws[task] = self._make_draws(task, stores.get(task, ()))

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
            self._unit_rate_hz = store.unit_rate_hz or 0.0
        if needs_text:
            store.require(text_fingerprint=text_fingerprint)
            text_fingerprint = store.metadata.text_tokenizer_fingerprint
            if store.max_text_id >= self.ids.text_vocab_size:
                raise ValueError(
                    f"{store.path} holds text token {store.max_text_id}, but the model's text vocabulary has "
                    f"{self.ids.text_vocab_size}: prepare the store with the model's text tokenizer"
                )
        return speech_fingerprint, text_fingerprint

    def _make_draws(self, task: str, weighted: Sequence[tuple[Store, float]]) -> _Draws:
        if not weighted:
            raise ValueError(f"task {task} has a weight but no store: give it a store, or the weight 0")
        rows = []
        for store, weight in weighted:
            if weight <= 0:
                raise ValueError(f"{store.path} has the weight {weight} in task {task}: give more than 0")
            rows.append(
                store.ids_of_split(
                    self.split,
                    has_text=task != "speech",
                    has_speech=task != "text",
                    is_aligned=task == "interleaved",
                )
            )
            if len(rows[-1]) == 0:
                half = {"interleaved": "text, speech and word times"}.get(task, task)
                raise ValueError(
                    f"{store.path} has no utterance with {half} in the split {self.split!r}: "
                    f"prepare it with such utterances, or leave the store out of the task {task}"
                )
        return _Draws([store for store, _ in weighted], rows, _cumulative([weight for _, weight in weighted]))

    def batch(self, seed: int, step: int, *, rows: range | int) -> Batch:
        """The given rows of a step: `range(8, 16)` is rows 8 to 15 of it, a number is that many from 0."""
        rows = range(rows) if isinstance(rows, int) else rows
        drawn = [self._row(seed, step, row) for row in rows]
        input_ids = torch.from_numpy(np.stack([row.input_ids for row, _, _ in drawn]))
        return Batch(
            input_ids=input_ids,
            labels=torch.from_numpy(np.stack([row.labels for row, _, _ in drawn])),
            attention_mask=torch.ones_like(input_ids),
            tasks=[task for _, task, _ in drawn],
            sample_ids=[sample_ids for _, _, sample_ids in drawn],
        )

    def _row(self, seed: int, step: int, row: int) -> tuple[Row, str, list[str]]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, step, row])))
        task = TASKS[int(self._task_cumulative.searchsorted(rng.random(), side="right"))]
        sample_ids: list[str] = []
        utterances = self._draws[task].utterances(rng, sample_ids)
        if task == "text":
            return text_row(utterances, rng, self.ids, self.row_tokens), task, sample_ids
        if task == "speech":
            return speech_row(utterances, rng, self.ids, self.row_tokens), task, sample_ids
        drawn = interleave(
            utterances,
            rng,
            self.ids,
            self._policy,
            self.row_tokens,
            self._unit_rate_hz,
            predict_switch=self._predict_switch,
        )
        return drawn, task, sample_ids


def _cumulative(weights: Sequence[float]) -> np.ndarray:
    """Upper ends in [0, 1] of consecutive shares; the last one that is not 0 is exactly 1."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return cumulative / cumulative[-1]
