"""Interleaving: from utterances to training rows in one id space (paper, section 3).

Everything here is a pure function of its arguments and of a random generator. Each task has a *stream*, an
endless sequence of short pieces of ids, and a row is the first `row_tokens` ids of its stream; the cut may
fall anywhere. Labels follow Hugging Face: they equal the inputs (the model shifts), −100 where nothing is
predicted.

Every stream starts at a random place of its first utterance, so that the ends of utterances longer than a row
are seen as often as their beginnings, and goes on with whole utterances. An utterance ends with the end token
of the modality it ends in.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from smoltolk.data.utterance import Utterance
from smoltolk.model.configuration_smoltolk import IdSpace

IGNORED_LABEL = -100


@dataclass(frozen=True)
class SpanPolicy:
    """How many words a run has before the modality changes; both bounds are included.

    The defaults are the paper's.

    Args:
        text_words: fewest and most words of a text run.
        speech_words: fewest and most words of a speech run.

    Raises:
        ValueError: bounds are not 1 ≤ fewest ≤ most.
    """

    text_words: tuple[int, int] = (10, 31)
    speech_words: tuple[int, int] = (5, 16)

    def __post_init__(self) -> None:
        for name in ("text_words", "speech_words"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise ValueError(f"{name} is {(fewest, most)}: give 1 <= fewest <= most words")

    def draw(self, rng: np.random.Generator, is_speech: bool) -> int:
        """Number of words of a new run."""
        fewest, most = self.speech_words if is_speech else self.text_words
        return int(rng.integers(fewest, most + 1))


@dataclass(frozen=True, eq=False)
class Row:
    """One training row.

    Args:
        input_ids: ids (row_tokens,) int64.
        labels: the same ids, −100 where nothing is predicted (row_tokens,) int64.
    """

    input_ids: np.ndarray
    labels: np.ndarray


def word_units(utterance: Utterance, unit_rate_hz: float) -> np.ndarray:
    """Where the units of each word begin: word w has units `bounds[w]:bounds[w + 1]`.

    The speech of a word is the units whose first frame lies after the previous word's end and up to its own
    end. Units after the last word's end belong to the last word, so every unit belongs to exactly one word; a
    word may have none.

    Args:
        utterance: an utterance with both halves.
        unit_rate_hz: frames per second of the speech tokenizer.

    Returns:
        Bounds (num_words + 1,).
    """
    durations = utterance.array("unit_durations").astype(np.int64)
    ends_s = utterance.array("word_ends_s")
    # In the precision of the stored times: a unit that starts just at a word's end is that word's.
    starts_s = ((np.cumsum(durations) - durations) / unit_rate_hz).astype(np.float32)
    bounds = np.zeros(len(ends_s) + 1, dtype=np.int64)
    bounds[1:-1] = starts_s.searchsorted(ends_s[:-1], side="right")
    bounds[-1] = len(durations)
    return bounds


def word_tokens(utterance: Utterance) -> np.ndarray:
    """Where the text tokens of each word begin, (num_words + 1,): word w has `bounds[w]:bounds[w + 1]`."""
    return np.concatenate([[0], np.cumsum(utterance.array("word_token_counts"), dtype=np.int64)])


def interleaved_stream(
    utterances: Iterator[Utterance],
    rng: np.random.Generator,
    ids: IdSpace,
    policy: SpanPolicy,
    unit_rate_hz: float,
) -> Iterator[np.ndarray]:
    """Endless pieces of interleaved ids.

    Starts at a random word in a modality chosen by a coin, then alternates runs of text and speech with the
    switch token between them. An utterance that ends inside of a run gets the end token of the run's
    modality, and the run goes on with the next utterance. Every word appears once, in one of the modalities.

    A speech run whose words have no units at all is extended, word by word, until it holds a token (a unit or
    an end-of-speech), so that there are never two switches in a row.

    Args:
        utterances: endless draws of utterances with both halves.
        rng: source of all choices made here.
        ids: the id space.
        policy: how long runs are.
        unit_rate_hz: frames per second of the speech tokenizer.
    """
    is_speech = bool(rng.integers(2))
    words = _words(next(utterances), ids, unit_rate_hz)
    word = int(rng.integers(words.num_words))
    while True:
        words_left = policy.draw(rng, is_speech)
        is_empty = True
        while words_left > 0 or is_empty:
            stop = min(word + max(words_left, 1), words.num_words)
            words_left -= stop - word
            piece = words.piece(word, stop, is_speech)
            is_empty &= len(piece) == 0
            yield piece
            word = stop
            if word == words.num_words:
                is_empty = False
                yield np.array([ids.end_id(is_speech)])
                words, word = _words(next(utterances), ids, unit_rate_hz), 0
        yield np.array([ids.switch_id])
        is_speech = not is_speech


@dataclass(frozen=True, eq=False)
class _Words:
    """Both halves of an utterance as ids, with the bounds of the words in each."""

    text: np.ndarray
    text_bounds: np.ndarray
    speech: np.ndarray
    speech_bounds: np.ndarray

    @property
    def num_words(self) -> int:
        return len(self.text_bounds) - 1

    def piece(self, start: int, stop: int, is_speech: bool) -> np.ndarray:
        """Ids of words `start` to `stop` (not included) in one modality."""
        if is_speech:
            return self.speech[self.speech_bounds[start] : self.speech_bounds[stop]]
        return self.text[self.text_bounds[start] : self.text_bounds[stop]]


def _words(utterance: Utterance, ids: IdSpace, unit_rate_hz: float) -> _Words:
    return _Words(
        text=utterance.array("text_ids").astype(np.int64),
        text_bounds=word_tokens(utterance),
        speech=utterance.array("units").astype(np.int64) + ids.speech_offset,
        speech_bounds=word_units(utterance, unit_rate_hz),
    )


def text_stream(utterances: Iterator[Utterance], rng: np.random.Generator, ids: IdSpace) -> Iterator[np.ndarray]:
    """Endless pieces of text: utterances with end-of-text after each, from a random word of the first one."""
    utterance = next(utterances)
    starts = word_tokens(utterance)[:-1]
    start = starts[rng.integers(len(starts))]
    while True:
        yield utterance.array("text_ids")[start:].astype(np.int64)
        yield np.array([ids.end_of_text_id])
        utterance, start = next(utterances), 0


def speech_stream(utterances: Iterator[Utterance], rng: np.random.Generator, ids: IdSpace) -> Iterator[np.ndarray]:
    """Endless pieces of speech: utterances with end-of-speech after each, from a random unit of the first.

    The start is a unit, not a word: speech without text has no words.
    """
    utterance = next(utterances)
    start = int(rng.integers(len(utterance.array("units"))))
    while True:
        yield utterance.array("units")[start:].astype(np.int64) + ids.speech_offset
        yield np.array([ids.end_of_speech_id])
        utterance, start = next(utterances), 0


def cut_row(stream: Iterator[np.ndarray], row_tokens: int, ids: IdSpace, *, predict_switch: bool = False) -> Row:
    """The first `row_tokens` ids of a stream; labels are −100 on the switch token unless it is predicted."""
    pieces: list[np.ndarray] = []
    num_tokens = 0
    while num_tokens < row_tokens:  # an utterance is drawn only when its ids are needed
        pieces.append(next(stream))
        num_tokens += len(pieces[-1])
    input_ids = np.concatenate(pieces)[:row_tokens]
    if predict_switch:
        return Row(input_ids, input_ids.copy())
    return Row(input_ids, np.where(input_ids == ids.switch_id, IGNORED_LABEL, input_ids))


def interleave(
    utterances: Iterator[Utterance],
    rng: np.random.Generator,
    ids: IdSpace,
    policy: SpanPolicy,
    row_tokens: int,
    unit_rate_hz: float,
    *,
    predict_switch: bool = False,
) -> Row:
    """One interleaved row; see `interleaved_stream` and `cut_row`."""
    stream = interleaved_stream(utterances, rng, ids, policy, unit_rate_hz)
    return cut_row(stream, row_tokens, ids, predict_switch=predict_switch)


def text_row(utterances: Iterator[Utterance], rng: np.random.Generator, ids: IdSpace, row_tokens: int) -> Row:
    """One row of text; see `text_stream`."""
    return cut_row(text_stream(utterances, rng, ids), row_tokens, ids)


def speech_row(utterances: Iterator[Utterance], rng: np.random.Generator, ids: IdSpace, row_tokens: int) -> Row:
    """One row of speech; see `speech_stream`."""
    return cut_row(speech_stream(utterances, rng, ids), row_tokens, ids)
