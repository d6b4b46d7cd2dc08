"""The work on rows: audio to units, text to tokens, one block of rows at a time.

A `Preparer` is sent once to each process or machine. It turns the rows of a piece into blocks; each becomes a shard.
Nothing it does depends on other rows: a bad one changes nothing but the quarantine list.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import PreTrainedTokenizerBase

from smoltolk.data.alignments import words_of_utterance
from smoltolk.data.sources import SourceRow
from smoltolk.data.text import encode_words
from smoltolk.data.utterance import StoreMetadata, Utterance, check_utterance
from smoltolk.speech.alignment import Aligner, AlignmentError, align_words, joined_text
from smoltolk.speech.audio import AudioError, load_audio, load_part, stream_audio
from smoltolk.speech.units import SpeechTokenizer, Units

BATCH_S = 120.0  # audio that is encoded together; units do not depend on it
_LONG_S = 600.0  # longer recordings are encoded while they are read, in memory that does not grow with them
_LONG_BYTES = 1 << 20  # smaller files are not opened to see how long they are


@dataclass(frozen=True)
class Block:
    """What became of some rows.

    Args:
        utterances: those that could be used, in order.
        quarantined: id, source and reason of the others, in order.
        confidences: of the alignments that were made.
        files: the files that were read, by the source's names of them, each with its `file_state` before.
    """

    utterances: list[Utterance]
    quarantined: list[dict[str, str]]
    confidences: list[float]
    files: dict[str, tuple[int, int] | None]


@dataclass
class _Work:
    """A row between being read and being encoded; `error` ends it."""

    row: SourceRow
    fields: dict[str, Any] = field(default_factory=dict)
    audio: np.ndarray | None = None
    confidence: float | None = None
    utterance: Utterance | None = None
    error: ValueError | None = None


@dataclass(frozen=True)
class Preparer:
    """Everything rows need besides themselves.

    Args:
        metadata: metadata of the store.
        audio_folder: where relative audio paths start.
        text_tokenizer: a fast tokenizer, None for rows without text.
        speech_tokenizer: turns audio into units, None for rows without audio.
        aligner: finds word times for rows with text and audio but without them, None to leave them out.
        validation_share: share of the rows that become the split "validation".
        batch_s: audio that is encoded together.
        device: where a neural speech tokenizer runs, in every process that does the work; None for where it is.
        dtype: what it computes in there.
    """

    metadata: StoreMetadata
    audio_folder: Path | None
    text_tokenizer: PreTrainedTokenizerBase | None
    speech_tokenizer: SpeechTokenizer | None
    aligner: Aligner | None = None
    validation_share: float = 0.0
    batch_s: float = BATCH_S
    device: str | None = None
    dtype: str = "float32"

    def start(self) -> None:
        """To be called once in each process, before its first block."""
        if self.speech_tokenizer is not None and self.device is not None:
            self.speech_tokenizer.to(self.device, self.dtype)

    def prepare(self, rows: Iterable[SourceRow], *, on_row: Callable[[], object] = lambda: None) -> Block:
        """Prepare the rows of one block; holds the audio of one batch at a time."""
        done: list[_Work] = []
        batch: list[_Work] = []
        files: dict[str, tuple[int, int] | None] = {}
        num_samples = 0
        for row in rows:
            for name in files_of(row):
                if name not in files:  # an archive, or a recording of many utterances
                    files[name] = file_state((self.audio_folder or Path()) / name)
            work = self._read(row)
            batch.append(work)
            num_samples += 0 if work.audio is None else len(work.audio)
            if self.speech_tokenizer is None or num_samples >= self.batch_s * self.speech_tokenizer.sample_rate_hz:
                self._encode(batch)
                done, batch, num_samples = done + batch, [], 0
            on_row()
        self._encode(batch)
        done += batch
        return Block(
            [work.utterance for work in done if work.utterance is not None],
            [
                {"id": work.row.id, "source": work.row.source, "reason": str(work.error)}
                for work in done
                if work.error is not None
            ],
            [work.confidence for work in done if work.utterance is not None and work.confidence is not None],
            files,
        )

    def _read(self, row: SourceRow) -> _Work:
        """Tokenize the text and load the audio of a row."""
        work = _Work(row)
        try:
            if row.error is not None:
                raise ValueError(row.error)
            row = with_word_times(row, self.audio_folder)
            if row.text is not None and self.text_tokenizer is not None:
                check_text(row.text)
                work.fields["text"] = row.text
                work.fields["text_ids"], work.fields["word_token_counts"] = encode_words(self.text_tokenizer, row.text)
            if row.audio is not None and self.speech_tokenizer is not None:
                needs_alignment = self.aligner is not None and row.text is not None and row.word_ends_s is None
                if not needs_alignment and is_long(row, self.audio_folder):
                    self._encode_stream(work, self.speech_tokenizer)
                else:
                    rate_hz = self.speech_tokenizer.sample_rate_hz
                    work.audio = read_audio(row, self.audio_folder, rate_hz)
                    work.fields["seconds"] = len(work.audio) / rate_hz
            if row.word_ends_s is not None:
                work.fields["word_ends_s"] = np.array(row.word_ends_s, dtype=np.float32)
            elif self.aligner is not None and row.text is not None and work.audio is not None:
                self._align(work, self.aligner, row.text)
        except ValueError as error:
            work.error, work.audio = error, None
        return work

    def _encode_stream(self, work: _Work, tokenizer: SpeechTokenizer) -> None:
        """Units of a long recording; they are the same as if it were read at once."""
        num_samples = 0

        def counted(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            nonlocal num_samples
            for block in blocks:
                num_samples += len(block)
                yield block

        name = str((self.audio_folder or Path()) / str(work.row.audio))
        try:
            units = tokenizer.encode_stream(counted(stream_audio(name, sample_rate_hz=tokenizer.sample_rate_hz)))
        except AudioError as error:
            raise AudioError(str(error).replace(name, work.row.source)) from error
        work.fields |= {"units": units.units, "unit_durations": units.durations}
        work.fields["seconds"] = num_samples / tokenizer.sample_rate_hz

    def _align(self, work: _Work, aligner: Aligner, text: str) -> None:
        audio = work.audio
        if (
            audio is None
            or self.speech_tokenizer is None
            or aligner.sample_rate_hz != self.speech_tokenizer.sample_rate_hz
        ):
            audio = read_audio(work.row, self.audio_folder, aligner.sample_rate_hz)
        alignment = aligner.align(audio, text)
        work.fields["word_ends_s"] = np.asarray(alignment.word_ends_s, dtype=np.float32)
        work.confidence = alignment.confidence

    def _encode(self, batch: list[_Work]) -> None:
        """Encode the audio of rows together, then check each row."""
        spoken = [work for work in batch if work.audio is not None]
        for work, units in zip(spoken, self._units(spoken), strict=True):
            work.audio = None
            if isinstance(units, ValueError):
                work.error = units
            else:
                work.fields |= {"units": units.units, "unit_durations": units.durations}
        for work in batch:
            if work.error is not None:
                continue
            row = work.row
            try:
                split = row.split or draw_split(row.id, self.validation_share)
                utterance = Utterance(row.id, speaker=row.speaker, source=row.source, split=split, **work.fields)
                check_utterance(utterance, self.metadata)
            except ValueError as error:
                work.error = error
            else:
                work.utterance = utterance

    def _units(self, spoken: list[_Work]) -> list[Units | ValueError]:
        """Units of each row, or why it has none."""
        audios = [work.audio for work in spoken if work.audio is not None]
        if not audios or self.speech_tokenizer is None:
            return []
        try:
            return list(self.speech_tokenizer.encode_batch(audios))
        except ValueError as error:
            if len(audios) == 1:
                return [error]
        return [units for work in spoken for units in self._units([work])]  # one of them is bad: each by itself


def files_of(row: SourceRow) -> list[str]:
    """The files that a row is in, as its source names them; none where it brings its bytes along."""
    return [name for name in (row.audio, row.alignment) if isinstance(name, str)]


def file_state(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns, by which a change is noticed; None if there is no such file."""
    try:
        status = path.stat()
    except (OSError, ValueError):  # the second of a name that no file can have
        return None
    return status.st_size, status.st_mtime_ns


def with_word_times(row: SourceRow, audio_folder: Path | None) -> SourceRow:
    """The row with the word times of its alignment file; where it has no text, with the words of that file.

    Raises:
        AlignmentError: the file cannot be used, or has other words.
    """
    if row.alignment is None:
        return row
    path = (audio_folder or Path()) / row.alignment
    try:
        words = words_of_utterance(path, (row.id, Path(str(row.audio)).stem))
        text = joined_text(words) if row.text is None else row.text
        ends_s = align_words(words, text)
    except AlignmentError as error:
        raise AlignmentError(str(error).replace(str(path), row.alignment)) from error
    return row._replace(text=text, word_ends_s=tuple(ends_s.tolist()))


def blocks_of(rows: Iterable[SourceRow], rows_per_block: int) -> Iterator[Iterator[SourceRow]]:
    """Rows in runs of so many, lazily: each run has to be used up before the next is asked for."""
    rows = iter(rows)
    for first in rows:

        def run(first: SourceRow = first) -> Iterator[SourceRow]:
            yield first
            for _, row in zip(range(rows_per_block - 1), rows, strict=False):
                yield row

        yield run()


def is_long(row: SourceRow, audio_folder: Path | None) -> bool:
    """Whether the audio of a row is a file of its own that is better not read at once."""
    if not isinstance(row.audio, str) or (row.start_s, row.end_s, row.byte_range) != (None, None, None):
        return False
    path = (audio_folder or Path()) / row.audio
    try:
        if path.stat().st_size < _LONG_BYTES:
            return False
        with open(path, "rb") as file:
            return soundfile.info(file).duration > _LONG_S
    except (OSError, soundfile.LibsndfileError):
        return False  # reading it says what is wrong


def read_audio(row: SourceRow, audio_folder: Path | None, sample_rate_hz: int) -> np.ndarray:
    """The audio of a row, float32 (samples,).

    Messages name the row's source, not the path on this machine: quarantine lists are the same everywhere.

    Raises:
        AudioError: the audio cannot be used.
    """
    if isinstance(row.audio, bytes):
        audio: bytes | str = row.audio
        name = f"audio of {len(row.audio)} bytes"
    else:
        audio = name = str((audio_folder or Path()) / (row.audio or ""))
    try:
        if row.byte_range is not None:
            first, count = row.byte_range
            try:
                with open(audio, "rb") as file:
                    file.seek(first)
                    audio = file.read(count)
            except OSError as error:
                raise AudioError(f"{name} cannot be read ({error.strerror}): correct the path") from error
            name = f"audio of {len(audio)} bytes"
        if row.start_s is None and row.end_s is None:
            return load_audio(audio, sample_rate_hz=sample_rate_hz)
        return load_part(audio, sample_rate_hz=sample_rate_hz, start_s=row.start_s or 0.0, end_s=row.end_s)
    except AudioError as error:
        raise AudioError(str(error).replace(name, row.source)) from error


def check_text(text: str) -> None:
    """Refuse a text that no writing system has: control characters or halves of characters.

    Tabs and line ends are white space. Emoji, any script and numbers are text like any other.

    Raises:
        ValueError: names the character.
    """
    if text.isprintable():
        return
    for position, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and not character.isspace():
            raise ValueError(
                f"text has the character {character!r} at {position}, which no text has: "
                f"correct the text or its encoding"
            )


def draw_split(utterance_id: str, validation_share: float) -> str:
    """A split by the hash of the id alone: it stays the same when other rows come or go."""
    point = int.from_bytes(sha256(utterance_id.encode()).digest()[:8]) / 2**64
    return "validation" if point < validation_share else "train"
