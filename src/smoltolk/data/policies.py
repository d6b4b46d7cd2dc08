"""Interleaving policies: which words of an utterance are read as text, which as speech.

A policy is a pure function of a random generator, the words of an utterance, and what it carried over from the
utterance before; what it gives are runs of words of one modality. `smoltolk.data.interleaving` turns them into rows.

A word without units (the times of "the" may hold none) would be nothing as speech. No policy leaves a speech run
with nothing in it: there are never two switches in a row.
"""

import re
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from smoltolk.data.shard import Tokens

Run = tuple[int, bool]  # the word it ends before, and whether it is speech; it begins where the run before it ends


class Words(NamedTuple):
    """The words of an utterance in both modalities.

    Args:
        tokens: the utterance.
        text_bounds: word w has text tokens `text_bounds[w]` to `text_bounds[w + 1]`.
        unit_bounds: word w has units `unit_bounds[w]` to `unit_bounds[w + 1]`.
    """

    tokens: Tokens
    text_bounds: list[int]
    unit_bounds: list[int]

    @classmethod
    def of(cls, tokens: Tokens) -> "Words":
        """The words of an utterance with both halves and the times that align them."""
        # Lists: a run needs two bounds, and a Python integer is read faster from a list than from an array.
        counts, ends = tokens.word_token_counts.tolist(), tokens.word_unit_ends.tolist()
        return cls(tokens, [0, *accumulate(counts)], [0, *ends])

    @property
    def num_words(self) -> int:
        """Number of words."""
        return len(self.unit_bounds) - 1


class Policy(Protocol):
    """What an interleaving policy offers; `reads_text` says whether it looks at the written words."""

    reads_text: ClassVar[bool]

    def begin(self, rng: np.random.Generator) -> Any:
        """What is carried into the first utterance of a row."""

    def runs(self, rng: np.random.Generator, words: Words, start: int, carried: Any) -> tuple[list[Run], Any]:
        """Runs that cover the words from `start` on, each once, and what is carried into the next utterance."""


class _Carried(NamedTuple):
    """The run that goes on in the next utterance: words it still has; 0 for a run that is yet to begin."""

    is_speech: bool
    words_left: int


@dataclass(frozen=True)
class SpanPolicy:
    """Alternates runs of text and speech, the paper's policy; the defaults are the paper's.

    The first modality is chosen by a coin. A run that reaches the end of an utterance goes on in the next one. A
    speech run whose words have no units at all is extended, word by word, until it holds a token (a unit or an
    end-of-speech).

    Args:
        text_words: fewest and most words of a text run, both included.
        speech_words: fewest and most words of a speech run, both included.

    Raises:
        ValueError: bounds are not 1 ≤ fewest ≤ most.
    """

    text_words: tuple[int, int] = (10, 31)
    speech_words: tuple[int, int] = (5, 16)
    reads_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("text_words", "speech_words"):
            fewest, most = getattr(self, name)
            if not 1 <= fewest <= most:
                raise ValueError(f"{name} is {(fewest, most)}: give 1 <= fewest <= most words")

    def draw(self, rng: np.random.Generator, is_speech: bool) -> int:
        """Number of words of a new run."""
        fewest, most = self.speech_words if is_speech else self.text_words
        return int(rng.integers(fewest, most + 1))

    def begin(self, rng: np.random.Generator) -> _Carried:
        """The modality of the first run."""
        return _Carried(bool(rng.integers(2)), 0)

    def runs(self, rng: np.random.Generator, words: Words, start: int, carried: _Carried) -> tuple[list[Run], _Carried]:
        """Runs of the words from `start` on; the last one may go on in the next utterance."""
        (is_speech, words_left), word, num_words = carried, start, words.num_words
        unit_bounds, runs = words.unit_bounds, []
        while word < num_words:
            begins_at, is_new = word, words_left == 0
            if is_new:
                words_left = self.draw(rng, is_speech)
            word = min(begins_at + words_left, num_words)
            if is_new and is_speech:
                while unit_bounds[word] == unit_bounds[begins_at] and word < num_words:
                    word, words_left = word + 1, words_left + 1
            words_left -= word - begins_at
            runs.append((word, is_speech))
            if words_left == 0:
                is_speech = not is_speech
        return runs, _Carried(is_speech, words_left)


@dataclass(frozen=True)
class PoissonPolicy:
    """Spans of Poisson length until a share of the words is reached, as in Zeng et al. 2024.

    "Scaling Speech-Text Pre-training with Synthetic Interleaved Data" (arXiv 2411.17607) draws span lengths from a
    Poisson distribution, λ = 10, until they are a share of the text, at best η = 0.3, and turns spans of these
    lengths at random places into speech. Here, exactly, for the n words of an utterance (of the first one, from its
    random start on):

    1. m = η·n, rounded up with the probability of its fraction, so that the share is met on average.
    2. Lengths from Poisson(λ), 0 counting as 1, until they add up to m; the last one is cut to do so.
    3. The spans stand, in their order, at distinct places among the n − m other words, before, between and after
       them; all choices of places are equally likely, so spans never touch. Spans that find no place join the last.

    Speech spans without units stay text.

    Args:
        mean_words: λ, the mean length of a span before cutting.
        share: η, the share of the words in spans.
        spans: the modality of the spans; all else is the other one.

    Raises:
        ValueError: a setting is out of range.
    """

    mean_words: float = 10.0
    share: float = 0.3
    spans: Literal["speech", "text"] = "speech"
    reads_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.mean_words <= 1e6:
            raise ValueError(f"mean_words is {self.mean_words}: give a mean length of more than 0 words")
        _check_share("share", self.share)
        if self.spans not in ("speech", "text"):
            raise ValueError(f"spans is {self.spans!r}: choose speech or text")

    def begin(self, rng: np.random.Generator) -> None:
        """Nothing is carried over."""

    def runs(self, rng: np.random.Generator, words: Words, start: int, carried: None) -> tuple[list[Run], None]:
        """Runs of the words from `start` on."""
        is_span = self._is_span(rng, words.num_words - start)
        return _runs(is_span if self.spans == "speech" else ~is_span, words, start), None

    def _is_span(self, rng: np.random.Generator, num_words: int) -> np.ndarray:
        """Which words are in a span, (num_words,)."""
        num_span_words = int(self.share * num_words + rng.random())
        lengths: list[int] = []
        while (missing := num_span_words - sum(lengths)) > 0:
            lengths.append(min(max(1, int(rng.poisson(self.mean_words))), missing))
        num_places = num_words - num_span_words + 1
        if len(lengths) > num_places:
            lengths[num_places - 1 :] = [sum(lengths[num_places - 1 :])]
        places = np.sort(rng.choice(num_places, len(lengths), replace=False))
        is_span = np.zeros(num_words, dtype=bool)
        before = 0
        for place, length in zip(places.tolist(), lengths, strict=True):
            is_span[place + before : place + before + length] = True
            before += length
        return is_span


@dataclass(frozen=True)
class CoinPolicy:
    """A coin for every word; neighbours of one modality are one run. Speech runs without units stay text.

    Args:
        speech_share: probability that a word is speech.

    Raises:
        ValueError: the probability is not between 0 and 1.
    """

    speech_share: float = 0.5
    reads_text: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_share("speech_share", self.speech_share)

    def begin(self, rng: np.random.Generator) -> None:
        """Nothing is carried over."""

    def runs(self, rng: np.random.Generator, words: Words, start: int, carried: None) -> tuple[list[Run], None]:
        """Runs of the words from `start` on."""
        return _runs(rng.random(words.num_words - start) < self.speech_share, words, start), None


# A sentence ends with a word that ends in . ! ? or … (also their fullwidth and CJK forms), whatever quotes and
# brackets follow it; commas, colons and dashes end none. Abbreviations with a full stop do end one.
SENTENCE_END = re.compile(r"[.!?…。！？｡][\"'”’»›)\]}」』）]*$")


@dataclass(frozen=True)
class SentencePolicy:
    """Changes modality at the ends of sentences only.

    A sentence ends with a word that ends in . ! ? or …, and with the utterance. Sentences of speech without units
    stay text.

    Args:
        speech_share: probability that a sentence is speech, one coin for each; None alternates, from one utterance
            to the next too, beginning by a coin.

    Raises:
        ValueError: the probability is not between 0 and 1.
    """

    speech_share: float | None = None
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.speech_share is not None:
            _check_share("speech_share", self.speech_share)

    def begin(self, rng: np.random.Generator) -> bool:
        """Whether the first sentence is speech, where sentences alternate."""
        return self.speech_share is None and bool(rng.integers(2))

    def runs(self, rng: np.random.Generator, words: Words, start: int, carried: bool) -> tuple[list[Run], bool]:
        """Runs of the words from `start` on."""
        written = bytes(words.tokens.text).decode().split()[start:]
        number = np.cumsum([False, *(SENTENCE_END.search(word) is not None for word in written[:-1])])
        num_sentences = int(number[-1]) + 1
        if self.speech_share is None:
            is_speech = (np.arange(num_sentences) % 2 == 1) != carried
            return _runs(is_speech[number], words, start), carried != (num_sentences % 2 == 1)
        return _runs((rng.random(num_sentences) < self.speech_share)[number], words, start), carried


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} is {share}: give a share from 0 to 1")


def _runs(is_speech: np.ndarray, words: Words, start: int) -> list[Run]:
    """Runs by the modality of each word from `start` on; speech runs without units become text."""
    changes = np.flatnonzero(is_speech[1:] != is_speech[:-1]) + (start + 1)
    runs, begins_at, is_spoken, bounds = [], start, bool(is_speech[0]), words.unit_bounds
    for stop in [*changes.tolist(), words.num_words]:
        runs.append((stop, is_spoken and bounds[stop] > bounds[begins_at]))
        begins_at, is_spoken = stop, not is_spoken
    return runs
