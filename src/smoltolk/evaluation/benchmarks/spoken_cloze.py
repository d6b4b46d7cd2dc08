"""Makes a spoken cross-modal benchmark from texts: prompts and endings, each spoken apart.

The folder has the layout that `cross_modal.py` reads; besides,

    spoken.json               what speaks: a later start must agree with it
    <base>_<part>.wav         written first
    <base>_<part>.txt         the text; written last, so that both are there when a text is done

A text that is done is not spoken again; one that has changed is.
"""

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smoltolk.data.sources import read_manifest
from smoltolk.data.store import LOCK, lock
from smoltolk.evaluation.benchmarks.benchmark import BenchmarkError, Fault
from smoltolk.evaluation.benchmarks.cross_modal import PART_NAMES, parse_name, read_cross_modal
from smoltolk.speech.audio import load_native_audio, save_wav, write_atomically
from smoltolk.speech.tts_command import CommandSynthesizer
from smoltolk.terminal import progress_bar

SETTINGS = "spoken.json"
COLUMNS = ("id", "prompt_text", "true_text", "false_text")
# Columns of the Story Cloze Test as it is distributed (cs.rochester.edu/nlp/rocstories; arXiv 1604.01696).
_SENTENCES = tuple(f"InputSentence{number}" for number in range(1, 5))
_ENDINGS = ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2")
_STORY_COLUMNS = ("InputStoryid", *_SENTENCES, *_ENDINGS, "AnswerRightEnding")
_ESPEAK_VOICE = "en-us"
_TRIED = 20  # texts of which at least one must work
_SHOWN = 50  # failures

Speak = Callable[[str, str | None], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class ClozeTexts:
    """A prompt and its endings as texts.

    Args:
        id: what to call the item; names its files.
        texts: texts by part ("prompt", "true", "false").
    """

    id: str
    texts: Mapping[str, str]


@dataclass(frozen=True)
class SpokenCloze:
    """What became of the texts.

    Args:
        items: number of items in the folder.
        num_spoken: recordings that were made now.
        num_kept: recordings that were there.
        seconds: length of all recordings that were made now.
    """

    items: int
    num_spoken: int
    num_kept: int
    seconds: float


@dataclass(frozen=True)
class _Part:
    """One text to speak."""

    item: str
    part: str
    text: str
    voice: str | None
    folder: Path

    @property
    def wav(self) -> Path:
        return self.folder / f"{self.item}_{PART_NAMES[self.part]}.wav"

    @property
    def txt(self) -> Path:
        return self.wav.with_suffix(".txt")

    @property
    def content(self) -> bytes:
        return f"{self.text}\n".encode()

    def is_done(self) -> bool:
        return self.wav.is_file() and self.txt.is_file() and self.txt.read_bytes() == self.content

    def make(self, speak: Speak) -> "float | str":
        """Speaks the text; seconds of audio, or why it cannot be spoken."""
        for path in (self.txt, self.wav):  # of another text
            path.unlink(missing_ok=True)
        try:
            audio, sample_rate_hz = speak(self.text, self.voice)
        except (ValueError, OSError) as error:
            return f"{self.item}, {self.part}: {error}"
        save_wav(self.wav, audio, sample_rate_hz)
        try:
            load_native_audio(self.wav)  # silence, for one, is of no use
        except ValueError as error:
            self.wav.unlink()
            return f"{self.item}, {self.part}: {str(error).removeprefix(f'{self.wav} ')}"
        write_atomically(self.txt, self.content)
        return len(audio) / sample_rate_hz


def read_cloze_texts(path: Path) -> list[ClozeTexts]:
    """Reads the texts of cloze items from a CSV or JSONL file.

    Its columns are `id`, `prompt_text`, `true_text` and `false_text`, or those of the Story Cloze Test:
    `InputStoryid`, `InputSentence1` … `4`, `RandomFifthSentenceQuiz1` and `2`, `AnswerRightEnding`. Others are left
    alone. White space around texts is removed; the sentences of a story are joined by one space.

    Raises:
        ValueError: the file cannot be read, or holds no items.
        BenchmarkError: a cell is missing, empty or of no use, or an id is there twice; says all that are.
    """
    rows = list(read_manifest(path))
    if not rows:
        raise ValueError(f"texts {path} holds no items")
    columns = _STORY_COLUMNS if "InputStoryid" in rows[0] else COLUMNS
    if missing := [column for column in columns if not any(column in row for row in rows)]:
        raise ValueError(
            f"texts {path} lacks {', '.join(missing)}; it has {', '.join(rows[0])}: give the columns "
            f"{', '.join(COLUMNS)}, or those of the Story Cloze Test"
        )
    faults: list[Fault] = []
    items: dict[str, ClozeTexts] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        cells = {column: "" if row.get(column) is None else str(row[column]).strip() for column in columns}
        if empty := [column for column, cell in cells.items() if not cell]:
            faults.append(Fault(where, f"{', '.join(empty)} is empty or missing"))
            continue
        if columns is COLUMNS:
            name, *texts = cells.values()
        else:
            name, answer = cells["InputStoryid"], cells["AnswerRightEnding"]
            if answer not in ("1", "2"):
                faults.append(Fault(where, f"AnswerRightEnding is {answer!r}: give 1 or 2"))
                continue
            endings = [cells[ending] for ending in _ENDINGS]
            texts = [" ".join(cells[sentence] for sentence in _SENTENCES), *endings[:: 1 if answer == "1" else -1]]
        if not re.fullmatch(r"\w[\w.-]*", name):
            faults.append(Fault(where, f"id is {name!r}, but it names files: use letters, digits, '_', '-' and '.'"))
        elif name in items:
            faults.append(Fault(where, f"id {name!r} is there twice"))
        else:
            items[name] = ClozeTexts(name, dict(zip(PART_NAMES, texts, strict=True)))
    if faults:
        raise BenchmarkError(path, faults)
    return list(items.values())


def speak_cloze(
    items: Sequence[ClozeTexts],
    folder: Path,
    *,
    tts: str | None = None,
    voices: Sequence[str] = (),
    jobs: int = 1,
    progress: bool = True,
) -> SpokenCloze:
    """Speaks prompts and endings, each apart, into the layout of cross-modal StoryCloze; goes on where it was stopped.

    Args:
        items: the texts.
        folder: where to, a new folder or one that was begun with the same settings.
        tts: command that speaks a text, see `CommandSynthesizer`; None for the built-in espeak-ng (extra `demo`).
        voices: voices to speak with, all texts of an item with the one that its id decides. Languages of espeak-ng
            with or without a variant ("en-us+f2"), by default "en-us"; or what `{voice}` stands for in the command.
        jobs: how many commands run at once.
        progress: whether to show a progress bar.

    Raises:
        ValueError: settings that do not fit together or are not those of the folder, other items in the folder, or
            texts that cannot be spoken: names each; the others are done.
        ImportError: the built-in synthesizer is not installed.
        OSError: the folder cannot be written.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more")
    speak, settings = _espeak(voices, jobs) if tts is None else _command(tts, voices)
    with lock(folder):
        _agree(folder, settings, {item.id for item in items})
        chosen = settings["voices"]
        parts = [
            _Part(item.id, part, text, _choose(chosen, item.id), folder)
            for item in items
            for part, text in item.texts.items()
        ]
        waiting = [part for part in parts if not part.is_done()]
        failures, seconds = [], 0.0
        with (
            closing(_make_all(waiting, speak, jobs)) as outcomes,  # so that nothing is written after the lock
            progress_bar(disable=not progress) as bar,
        ):
            task = bar.add_task("speak texts", total=len(parts), completed=len(parts) - len(waiting))
            for count, outcome in enumerate(outcomes, start=1):
                if isinstance(outcome, str):
                    failures.append(outcome)
                    if count == len(failures) == _TRIED:
                        raise _failed(failures, f"none of the first {count} texts could be spoken")
                else:
                    seconds += outcome
                bar.advance(task)
        if failures:
            done = "the others are done; run the same command again to try these"
            raise _failed(failures, f"{len(failures)} of {len(parts)} texts could not be spoken, {done}")
    faults: list[Fault] = []
    read_cross_modal(folder, faults.append)
    if faults:
        raise BenchmarkError(folder, faults)
    return SpokenCloze(len(items), len(waiting), len(parts) - len(waiting), seconds)


def _espeak(voices: Sequence[str], jobs: int) -> tuple[Speak, dict[str, Any]]:
    from smoltolk.speech.synthesis import EspeakSynthesizer  # the extra `demo`

    if jobs > 1:
        raise ValueError(f"jobs is {jobs}, but the built-in synthesizer speaks one text at a time: leave it out")
    speakers = {voice: EspeakSynthesizer(voice) for voice in voices or (_ESPEAK_VOICE,)}

    def speak(text: str, voice: str | None) -> tuple[np.ndarray, int]:
        return speakers[voice or _ESPEAK_VOICE].speak_freely(text)

    rate_wpm, pitch = next((speaker.rate_wpm, speaker.pitch) for speaker in speakers.values())
    return speak, {"synthesizer": "espeak-ng", "rate_wpm": rate_wpm, "pitch": pitch, "voices": list(speakers)}


def _command(tts: str, voices: Sequence[str]) -> tuple[Speak, dict[str, Any]]:
    synthesizer = CommandSynthesizer(tts)
    if bool(voices) != synthesizer.takes_voice:
        has, gives = ("a", "name voices") if synthesizer.takes_voice else ("no", "leave voices out")
        raise ValueError(f"tts {tts!r} has {has} {{voice}}, and voices are {list(voices)}: {gives}, or change it")
    return synthesizer.speak, {"synthesizer": "command", "command": tts, "voices": list(voices)}


def _choose(voices: Sequence[str], item: str) -> str | None:
    """The voice of an item: it does not depend on the other items."""
    number = int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], "little")
    return voices[number % len(voices)] if voices else None


def _agree(folder: Path, settings: Mapping[str, Any], ids: set[str]) -> None:
    """Writes the settings into a new folder, or refuses to mix others, or other items, into an old one."""
    path = folder / SETTINGS
    names = sorted(file.name for file in folder.iterdir() if file.name != LOCK)
    if not path.is_file():
        if names:
            raise ValueError(f"{folder} holds {names[0]!r} and was not made from texts: choose an empty folder")
        write_atomically(path, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another folder") from None
    if kept != settings:
        raise ValueError(f"{folder} was spoken with {kept}, not with {dict(settings)}: choose another folder")
    if others := sorted({found[0] for name in names if (found := parse_name(name))} - ids):
        raise ValueError(
            f"{folder} holds {len(others)} items that the texts do not have, first {others[0]!r}: choose another "
            "folder, or remove their files"
        )


def _make_all(parts: Iterable[_Part], speak: Speak, jobs: int) -> Generator[float | str, None, None]:
    """Seconds of each text, or why it cannot be spoken, as they come."""
    if jobs == 1:
        for part in parts:
            yield part.make(speak)
        return
    pool = ThreadPoolExecutor(jobs)  # threads that wait for processes
    try:
        for future in as_completed([pool.submit(part.make, speak) for part in parts]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _failed(failures: Sequence[str], summary: str) -> ValueError:
    more = [f"… and {len(failures) - _SHOWN} more"] if len(failures) > _SHOWN else []
    return ValueError("\n".join([f"{summary}:", *sorted(failures)[:_SHOWN], *more]))
