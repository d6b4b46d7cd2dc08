"""Alignment: when each word of a transcript is spoken.

An aligner takes audio and its text: `smoltolk.speech.pocketsphinx_aligner` for English without a download,
`smoltolk.speech.ctc_aligner` for the languages that a CTC model writes. `align_words` takes the timed words that
another program has written. Both give one time for each word of `text.split()`, or say why they cannot.
"""

import hashlib
import json
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

APOSTROPHES = str.maketrans(dict.fromkeys("’‘ʼ´`", "'"))
_SPOKEN_MARKS = frozenset("&%@#")  # Unicode calls them punctuation, but who reads them aloud says a word


class AlignmentError(ValueError):
    """Audio and text that cannot be aligned; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Alignment:
    """When the words of a text are spoken.

    Args:
        word_starts_s: where each word starts, float32 (num_words,), in seconds.
        word_ends_s: where each word ends, float32 (num_words,), never decreasing and within the audio. A pause
            after a word belongs to no word.
        confidence: how well audio and text fit, higher for better; each aligner says what it is.
    """

    word_starts_s: np.ndarray
    word_ends_s: np.ndarray
    confidence: float | None = None


@dataclass(frozen=True)
class TimedWord:
    """A word, or a few, as another program has timed them.

    Args:
        text: what is said.
        start_s: where it starts.
        end_s: where it ends.
    """

    text: str
    start_s: float
    end_s: float


class Aligner(ABC):
    """Finds when the words of a transcript are spoken.

    Aligners are pickled without their models, which each process loads when it aligns its first utterance.

    Attributes:
        kind: name of the kind of aligner in files and messages.
        sample_rate_hz: sampling rate of the audio that `align` takes.
        min_confidence: utterances with less are refused; None for no limit.
    """

    kind: ClassVar[str]
    sample_rate_hz: int

    def __init__(self, min_confidence: float | None = None) -> None:
        if min_confidence is not None and not np.isfinite(min_confidence):
            raise ValueError(f"min_confidence is {min_confidence}: give a number, or none for no limit")
        self.min_confidence = min_confidence

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that the times depend on, besides audio and text."""

    @abstractmethod
    def _align(self, audio: np.ndarray, words: list[str]) -> Alignment:
        """Align checked audio (samples,) and at least one word; ends may pass the audio's by a frame."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()

    def align(self, audio: np.ndarray, text: str) -> Alignment:
        """Align a text to its audio; the same audio and text always give the same times.

        Args:
            audio: float32 (samples,) at `sample_rate_hz`.
            text: its words, separated by white space.

        Returns:
            The times of the words of `text.split()`. A word of punctuation alone has no length and stands at the
            end of the word before it.

        Raises:
            AlignmentError: the text cannot be aligned to the audio, or only with less than `min_confidence`.
        """
        if audio.ndim != 1 or not len(audio) or not np.isfinite(audio).all():
            raise AlignmentError(f"audio {audio.shape} is empty, not finite or of the wrong shape: give (samples,)")
        words = text.split()
        if not words:
            raise AlignmentError(f"text {text!r} has no words: give a text with at least one word")
        alignment = self._align(audio, words)
        seconds = len(audio) / self.sample_rate_hz
        ends_s = np.minimum(np.maximum.accumulate(alignment.word_ends_s), seconds).astype(np.float32)
        starts_s = np.minimum(alignment.word_starts_s, ends_s).astype(np.float32)
        confidence = alignment.confidence
        if self.min_confidence is not None and confidence is not None and confidence < self.min_confidence:
            raise AlignmentError(
                f"confidence {confidence:.2f} is below {self.min_confidence:g}: the text is perhaps not what is said"
            )
        return Alignment(starts_s, ends_s, confidence)


def merge_parts(starts_s: np.ndarray, ends_s: np.ndarray, num_parts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Times of words from those of their parts; a word without parts stands at the end of the one before it."""
    lasts = np.cumsum(num_parts)
    all_ends_s = np.append(0.0, ends_s)
    has_parts = np.array(num_parts) > 0
    word_ends_s = all_ends_s[lasts]
    word_starts_s = np.where(has_parts, np.append(starts_s, 0.0)[lasts - num_parts], word_ends_s)
    return word_starts_s, word_ends_s


def is_punctuation(character: str) -> bool:
    """Whether a character is punctuation, and not a sign that is read aloud, such as "%"."""
    return unicodedata.category(character)[0] == "P" and character not in _SPOKEN_MARKS


def without_accents(text: str) -> str:
    """Letters without their accents: "café" as "cafe"."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def joined_text(words: Sequence[TimedWord]) -> str:
    """The text that timed words make."""
    return " ".join(" ".join(word.text for word in words).split())


def align_words(words: Sequence[TimedWord], text: str | None = None) -> np.ndarray:
    """When each word of a text ends, from timed words of another program.

    Letters and digits must be the same in the same order; case, punctuation and where words are divided need not
    ("cannot" for "can not", "well-known" for "well known"). A word that ends inside a timed one gets its share
    of that one's time by its number of characters; a word of punctuation alone ends with the word before it.

    Args:
        words: in time.
        text: its words, separated by white space; the joined timed words by default.

    Returns:
        Ends in seconds of the words of `text.split()`, float32 (num_words,).

    Raises:
        AlignmentError: the texts differ; names the first word that does, and the timed word in its place.
    """
    text_words = (joined_text(words) if text is None else text).split()
    if not text_words:
        raise AlignmentError("the text has no words: give a text with at least one word")
    timed = [(word, characters) for word in words if (characters := _characters(word.text))]
    stream = "".join(characters for _, characters in timed)
    bounds = np.cumsum([0, *(len(characters) for _, characters in timed)])
    ends_s = np.zeros(len(text_words), dtype=np.float32)
    position, end_s = 0, 0.0
    for number, text_word in enumerate(text_words):
        characters = _characters(text_word)
        if characters:
            index = int(bounds.searchsorted(position, side="right")) - 1
            if not stream.startswith(characters, position):
                found = repr(timed[index][0].text) if index < len(timed) else "the end"
                raise AlignmentError(
                    f"word {text_word!r} (number {number}) of the text differs from {found} of the timed words: "
                    "give the text that was aligned"
                )
            position += len(characters)
            index = int(bounds.searchsorted(position)) - 1
            word, word_characters = timed[index]
            share = (position - bounds[index]) / len(word_characters)
            end_s = word.end_s if share == 1 else word.start_s + share * (word.end_s - word.start_s)
        ends_s[number] = end_s
    if position < len(stream):
        index = int(bounds.searchsorted(position, side="right")) - 1
        raise AlignmentError(
            f"the text ends after {text_words[-1]!r}, but {timed[index][0].text!r} of the timed words follows: "
            "give the text that was aligned"
        )
    return ends_s


def _characters(word: str) -> str:
    """Letters, accents and digits of a word without case: what has to be the same in two texts."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return "".join(c for c in folded if unicodedata.category(c)[0] in "LMN")
