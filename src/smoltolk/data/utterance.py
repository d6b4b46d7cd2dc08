"""Utterances, and what the numbers in them mean: the rows of a store, and their checks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 2
WORD_END_TOLERANCE_S = 0.05  # aligners round their times: how far a word may end after the audio
MAX_DURATION = np.iinfo(np.uint16).max

LIST_TYPES = {
    "text_ids": np.uint32,
    "units": np.uint16,
    "unit_durations": np.uint16,
    "word_ends_s": np.float32,
    "word_token_counts": np.uint8,
}
Refusal = Callable[[str], NoReturn]

TEXT_FIELDS = ("text", "text_ids", "word_token_counts")
SPEECH_FIELDS = ("units", "unit_durations", "seconds")

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        *((name, pa.list_(pa.from_numpy_dtype(dtype))) for name, dtype in LIST_TYPES.items()),
        ("seconds", pa.float64()),
        ("speaker", pa.string()),
        ("source", pa.string()),
        ("split", pa.string()),
    ]
)


@dataclass(frozen=True, eq=False)
class Utterance:
    """One utterance: a text half, a speech half, or both; word times align the halves.

    Args:
        id: name of the utterance.
        text: the written words, separated by white space.
        text_ids: text tokens (num_tokens,).
        units: speech units (num_units,), consecutive equal ones merged.
        unit_durations: length of each unit (num_units,), in frames of the speech tokenizer.
        word_ends_s: when each word ends in the audio (num_words,), in seconds.
        word_token_counts: number of text tokens of each word (num_words,).
        seconds: length of the audio.
        speaker: who speaks.
        source: where the utterance came from.
        split: "train", "validation", …
    """

    id: str
    text: str | None = None
    text_ids: np.ndarray | None = None
    units: np.ndarray | None = None
    unit_durations: np.ndarray | None = None
    word_ends_s: np.ndarray | None = None
    word_token_counts: np.ndarray | None = None
    seconds: float | None = None
    speaker: str | None = None
    source: str | None = None
    split: str | None = None

    @property
    def has_text(self) -> bool:
        """Whether the text half is there."""
        return self.text_ids is not None

    @property
    def has_speech(self) -> bool:
        """Whether the speech half is there."""
        return self.units is not None

    @property
    def is_aligned(self) -> bool:
        """Whether both halves are there with the times that align them."""
        return self.word_ends_s is not None

    def array(self, field: str) -> np.ndarray:
        """The array of a field that has to be there.

        Raises:
            ValueError: the utterance does not have it.
        """
        values = getattr(self, field)
        if values is None:
            raise ValueError(f"utterance {self.id!r} has no {field}: use utterances with the halves that are needed")
        return values


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
    ends_s = utterance.array("word_ends_s").astype(np.float32)
    # In the precision of the stored times: a unit that starts just at a word's end is that word's.
    starts_s = ((np.cumsum(durations) - durations) / unit_rate_hz).astype(np.float32)
    bounds = np.zeros(len(ends_s) + 1, dtype=np.int64)
    bounds[1:-1] = starts_s.searchsorted(ends_s[:-1], side="right")
    bounds[-1] = len(durations)
    return bounds


@dataclass(frozen=True)
class StoreMetadata:
    """What the numbers in a store mean; kept in the schema metadata of every shard.

    Args:
        text_tokenizer_fingerprint: fingerprint of the text tokenizer, None in a store without text.
        speech_tokenizer: card of the speech tokenizer (`fingerprint`, `unit_rate_hz`, `num_units`, …),
            None in a store without speech.
    """

    text_tokenizer_fingerprint: str | None
    speech_tokenizer: dict[str, Any] | None

    def __post_init__(self) -> None:
        missing = {"fingerprint", "unit_rate_hz", "num_units"} - set(self.speech_tokenizer or {})
        if self.speech_tokenizer is not None and missing:
            raise ValueError(
                f"speech_tokenizer lacks {', '.join(sorted(missing))}: give the card of a speech tokenizer"
            )
        if self.num_units is not None and not 1 <= self.num_units <= np.iinfo(np.uint16).max + 1:
            raise ValueError(f"num_units is {self.num_units}: a store holds units as uint16, 1 to 65,536 of them")

    @property
    def speech_tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the speech tokenizer, None in a store without speech."""
        return None if self.speech_tokenizer is None else self.speech_tokenizer["fingerprint"]

    @property
    def unit_rate_hz(self) -> float | None:
        """Frames per second before merging, None in a store without speech."""
        return None if self.speech_tokenizer is None else float(self.speech_tokenizer["unit_rate_hz"])

    @property
    def num_units(self) -> int | None:
        """Number of different units, None in a store without speech."""
        return None if self.speech_tokenizer is None else int(self.speech_tokenizer["num_units"])

    def to_schema(self, columns: pa.Schema) -> pa.Schema:
        """The schema of a shard with these columns, with this metadata."""
        fields = {
            "format_version": FORMAT_VERSION,
            "text_tokenizer_fingerprint": self.text_tokenizer_fingerprint,
            "speech_tokenizer_fingerprint": self.speech_tokenizer_fingerprint,
            "unit_rate_hz": self.unit_rate_hz,
            "num_units": self.num_units,
            "speech_tokenizer": self.speech_tokenizer,
        }
        return columns.with_metadata(
            {f"smoltolk.{key}": json.dumps(value, sort_keys=True) for key, value in fields.items()}
        )

    @classmethod
    def from_schema(cls, schema: pa.Schema, path: Path, columns: pa.Schema) -> "StoreMetadata":
        """Read the metadata of a shard that must have these columns; `path` is named in errors."""
        fields = {
            key.decode().removeprefix("smoltolk."): json.loads(value)
            for key, value in (schema.metadata or {}).items()
            if key.startswith(b"smoltolk.")
        }
        check_version(fields.get("format_version"), path)
        if not schema.equals(columns):
            raise ValueError(f"{path} has other columns than a store's shard: prepare the store again")
        return cls(fields["text_tokenizer_fingerprint"], fields["speech_tokenizer"])


def check_version(version: int | None, path: Path) -> None:
    """Refuse any other format version than ours."""
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this smoltolk reads version {FORMAT_VERSION}: "
            f"prepare the store again, or use the smoltolk that wrote it"
        )


def check_utterance(utterance: Utterance, metadata: StoreMetadata) -> None:
    """Check that an utterance is whole and consistent.

    Raises:
        ValueError: names the utterance, what is wrong and the remedy.
    """

    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"utterance {utterance.id!r}: {reason}")

    for half in (TEXT_FIELDS, SPEECH_FIELDS):
        given = [name for name in half if getattr(utterance, name) is not None]
        if given and len(given) < len(half):
            refuse(f"{', '.join(given)} given without {', '.join(set(half) - set(given))}: give all or none")
    if not utterance.has_text and not utterance.has_speech:
        refuse("neither text nor speech: give at least one half")
    for name, dtype in LIST_TYPES.items():
        values = getattr(utterance, name)
        if values is None:
            continue
        if values.ndim != 1:
            refuse(f"{name} has shape {values.shape}: give one dimension")
        if np.issubdtype(dtype, np.integer) and values.dtype.kind not in "iu":
            refuse(f"{name} has dtype {values.dtype}: give integers")
    if utterance.has_text:
        _check_text(utterance, metadata, refuse)
    if utterance.has_speech:
        _check_speech(utterance, metadata, refuse)
    if utterance.word_ends_s is not None:
        if not (utterance.has_text and utterance.has_speech):
            refuse("word_ends_s without both text and speech: leave it out")
        _check_word_ends(utterance, utterance.word_ends_s.astype(np.float64), refuse)


def _check_text(utterance: Utterance, metadata: StoreMetadata, refuse: Refusal) -> None:
    if metadata.text_tokenizer_fingerprint is None:
        refuse("has text, but the store has no text_tokenizer_fingerprint: give it when making the store")
    counts = utterance.array("word_token_counts")
    num_words = len((utterance.text or "").split())
    if num_words == 0:
        refuse(f"text {utterance.text!r} has no words: leave the utterance out, or store its speech only")
    if len(counts) != num_words:
        refuse(f"word_token_counts has {len(counts)} entries for {num_words} words: give one for each word")
    if counts.min() < 1 or counts.max() > 255:
        refuse(f"word_token_counts reaches from {counts.min()} to {counts.max()}: a word has 1 to 255 tokens")
    ids = utterance.array("text_ids")
    if counts.sum(dtype=np.int64) != len(ids):
        refuse(f"word_token_counts add up to {counts.sum(dtype=np.int64)}, but text_ids has {len(ids)} tokens")
    if ids.min() < 0 or ids.max() > np.iinfo(np.uint32).max:
        refuse(f"text_ids reach from {ids.min()} to {ids.max()}: token ids are uint32")


def _check_speech(utterance: Utterance, metadata: StoreMetadata, refuse: Refusal) -> None:
    if metadata.num_units is None:
        refuse("has speech, but the store has no speech_tokenizer: give its card when making the store")
    units, durations = utterance.array("units"), utterance.array("unit_durations")
    if len(units) == 0:
        refuse("units is empty: leave the utterance out, or store its text only")
    if len(units) != len(durations):
        refuse(f"units has {len(units)} entries and unit_durations {len(durations)}: give one for each unit")
    if units.min() < 0 or units.max() >= metadata.num_units:
        refuse(
            f"units reach from {units.min()} to {units.max()}, outside of 0 … {metadata.num_units - 1}: "
            f"encode with the store's speech tokenizer"
        )
    if durations.min() < 1 or durations.max() > MAX_DURATION:
        refuse(
            f"unit_durations reach from {durations.min()} to {durations.max()} frames, outside of "
            f"1 … {MAX_DURATION}: cut audio with so long a stretch of one unit"
        )
    if utterance.seconds is None or not 0 < utterance.seconds < np.inf:
        refuse(f"seconds is {utterance.seconds}: give the length of the audio")


def _check_word_ends(utterance: Utterance, ends_s: np.ndarray, refuse: Refusal) -> None:
    num_words = len(utterance.array("word_token_counts"))
    if len(ends_s) != num_words:
        refuse(f"word_ends_s has {len(ends_s)} entries for {num_words} words: give one for each word")
    if not np.isfinite(ends_s).all() or ends_s[0] < 0:
        refuse("word_ends_s holds negative or non-finite times: give seconds from the start of the audio")
    backwards = np.flatnonzero(np.diff(ends_s) < 0)
    if len(backwards):
        word = backwards[0] + 1
        refuse(
            f"word_ends_s runs backwards at word {word} ({ends_s[word]:.3f} s after "
            f"{ends_s[word - 1]:.3f} s): give the times in the order of the words"
        )
    seconds = utterance.seconds or 0.0
    if ends_s[-1] > seconds + WORD_END_TOLERANCE_S:
        refuse(
            f"word_ends_s reaches {ends_s[-1]:.3f} s, past the {seconds:.3f} s of audio: "
            f"give the times that belong to this audio"
        )
