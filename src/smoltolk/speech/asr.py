"""Speech recognition as a judge: what is heard in audio, and how far it is from what should be."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from transformers import pipeline

from smoltolk.speech.neural import check_device

_WHISPER_WINDOW_S = 30.0
_CTC_CHUNK_S = 30.0  # attention over longer audio needs memory that grows with its square
_APOSTROPHES = str.maketrans("", "", "'’ʼ`´")


@dataclass(frozen=True)
class WordErrors:
    """Differences between a transcript and its reference; they add up over utterances.

    Args:
        substitutions: words in the place of others.
        deletions: words of the reference that are not there.
        insertions: words that the reference does not have.
        num_words: words of the reference.
    """

    substitutions: int
    deletions: int
    insertions: int
    num_words: int

    @property
    def count(self) -> int:
        """All errors."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Word error rate: errors for each word of the reference; above 1 when many words were inserted.

        Raises:
            ValueError: the reference has no words.
        """
        if self.num_words == 0:
            raise ValueError("num_words is 0: there is no word error rate without words in the reference")
        return self.count / self.num_words

    def __add__(self, other: "WordErrors") -> "WordErrors":
        return WordErrors(
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
            self.num_words + other.num_words,
        )


def normalised_words(text: str) -> list[str]:
    """The words of a text as they are compared: in lower case, without punctuation.

    Apostrophes vanish ("don't" is "dont"); every other character that is neither letter, digit nor combining mark
    separates words. Numbers are not spelt out: "2" and "two" differ.
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES)
    return "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text).split()


def word_error_rate(reference: str, hypothesis: str) -> WordErrors:
    """The fewest word errors that make a reference the hypothesis (Levenshtein distance over `normalised_words`).

    Where several ways are equally short, the one with the most substitutions is counted.
    """
    expected, heard = normalised_words(reference), normalised_words(hypothesis)
    ids = {word: i for i, word in enumerate({*expected, *heard})}
    heard_ids = np.array([ids[word] for word in heard], dtype=np.int64)
    places = np.arange(len(heard) + 1)
    costs = np.empty((len(expected) + 1, len(heard) + 1), np.int32)  # of making so many words so many others
    costs[0] = places
    for i, word in enumerate(expected, start=1):
        row = costs[i - 1] + 1  # this word deleted
        np.minimum(row[1:], costs[i - 1, :-1] + (heard_ids != ids[word]), out=row[1:])
        costs[i] = np.minimum.accumulate(row - places) + places  # any number of words inserted

    substitutions = deletions = insertions = 0
    i, j = len(expected), len(heard)
    while i or j:
        differs = bool(i and j and expected[i - 1] != heard[j - 1])
        if i and j and costs[i, j] == costs[i - 1, j - 1] + differs:
            substitutions += differs
            i, j = i - 1, j - 1
        elif i and costs[i, j] == costs[i - 1, j] + 1:
            deletions += 1
            i -= 1
        else:
            insertions += 1
            j -= 1
    return WordErrors(substitutions, deletions, insertions, len(expected))


class Transcriber:
    """A recogniser of transformers: Whisper, or a wav2vec2, HuBERT or WavLM with a CTC head.

    Args:
        model: folder or name of the model, with its processor.
        device: where it computes.
        language: what is spoken, such as "en", for recognisers of many languages; heard by default.

    Raises:
        ValueError: the model is no recogniser, or has one language of its own.
        OSError: there is no such model.
    """

    def __init__(self, model: str | Path, *, device: str = "cpu", language: str | None = None) -> None:
        self._pipeline: Any = pipeline("automatic-speech-recognition", model=str(model), device=check_device(device))
        self._is_whisper = self._pipeline.type == "seq2seq_whisper"
        is_multilingual = self._is_whisper and getattr(self._pipeline.model.generation_config, "is_multilingual", False)
        if language is not None and not is_multilingual:
            raise ValueError(f"language is {language!r}, but {model} cannot be told the language: leave it out")
        self._language = language

    def __call__(self, audio: np.ndarray, sample_rate_hz: int) -> str:
        """What is heard in a waveform, float32 (samples,)."""
        rate_hz = self._pipeline.feature_extractor.sampling_rate
        if sample_rate_hz != rate_hz:
            audio = soxr.resample(audio, sample_rate_hz, rate_hz)
        options: dict[str, Any] = {}
        if self._pipeline.type.startswith("ctc"):
            options["chunk_length_s"] = _CTC_CHUNK_S
        elif self._is_whisper and len(audio) > _WHISPER_WINDOW_S * rate_hz:
            options["return_timestamps"] = True  # Whisper moves on through long audio by its own times
        if self._language is not None:
            options["generate_kwargs"] = {"language": self._language}
        heard = self._pipeline({"raw": audio, "sampling_rate": rate_hz}, **options)
        return str(heard["text"]).strip()
