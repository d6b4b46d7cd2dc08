"""Resynthesis: audio to units and back, the check of a tokenizer with its vocoder.

What a recogniser no longer understands afterwards is lost to any model of these units.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from smoltolk.speech.asr import WordErrors, word_error_rate
from smoltolk.speech.audio import load_audio, save_wav
from smoltolk.speech.units import SpeechTokenizer, Units
from smoltolk.speech.vocoder import Vocoder


@dataclass(frozen=True)
class Recording:
    """A recording.

    Args:
        audio: the file.
        name: what it is called among others, such as its path in a folder.
        text: what is said, if that is known.
    """

    audio: Path
    name: str
    text: str | None = None


def resynthesize(
    audio: np.ndarray, tokenizer: SpeechTokenizer, vocoder: Vocoder, *, with_durations: bool = True
) -> tuple[Units, np.ndarray]:
    """Speak the units of a waveform.

    Args:
        audio: waveform at the tokenizer's rate, float32 (samples,).
        tokenizer: what makes the units.
        vocoder: what speaks them.
        with_durations: whether it is told how long each unit lasted; otherwise it predicts that, as it has to for
            the units that a model says.

    Returns:
        The units, and the waveform at the vocoder's rate, float32 (samples,).

    Raises:
        ValueError: the vocoder decodes the units of another tokenizer, or the audio cannot be encoded.
    """
    _refuse_another_tokenizer(vocoder, tokenizer)
    units = tokenizer.encode(audio)
    return units, vocoder.decode(units.units, units.durations if with_durations else None)


def resynthesize_files(
    recordings: Sequence[Recording],
    output: Path,
    tokenizer: SpeechTokenizer,
    vocoder: Vocoder,
    *,
    transcriber: Callable[[np.ndarray, int], str] | None = None,
    with_durations: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Resynthesise files; with a recogniser, count the words that are understood before and after.

    Errors are counted against the text of a recording. Where it has none, the original's errors are not known, and
    those of the resynthesis are counted against what is heard in the original.

    Args:
        recordings: the files.
        output: folder of the WAV files, which are named as the recordings are.
        tokenizer: what makes the units.
        vocoder: what speaks them.
        transcriber: what is heard in a waveform, float32 (samples,), of a sampling rate: `Transcriber`, or another
            recogniser; None to leave words aside.
        with_durations: as in `resynthesize`.
        progress: called with 1 after each file.

    Returns:
        What can be written as JSON. "files": what came of each file; "failed": those that could not be used, with
        the reason; "seconds" and "units" of all; "word_error_rate", with a recogniser: "original", against the
        texts, and "resynthesised", each with its errors, its "rate" and the 95 % "interval" of the rate by a
        bootstrap over files, None with fewer than two.

    Raises:
        ValueError: there are no recordings, two have the same output, one would be written over, none can be used,
            or the vocoder decodes the units of another tokenizer.
        OSError: an output cannot be written.
    """
    outputs = _output_files(recordings, output)
    _refuse_another_tokenizer(vocoder, tokenizer)
    files: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    for recording, path in zip(recordings, outputs, strict=True):
        try:
            audio = load_audio(recording.audio, sample_rate_hz=tokenizer.sample_rate_hz)
            units, again = resynthesize(audio, tokenizer, vocoder, with_durations=with_durations)
        except ValueError as error:
            failed.append({"audio": str(recording.audio), "reason": str(error)})
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_wav(path, again, vocoder.sample_rate_hz)
            file: dict[str, Any] = {
                "audio": str(recording.audio),
                "output": str(path),
                "seconds": len(audio) / tokenizer.sample_rate_hz,
                "units": len(units.units),
            }
            if transcriber is not None:
                heard = transcriber(audio, tokenizer.sample_rate_hz)
                file |= _compare(recording.text, heard, transcriber(again, vocoder.sample_rate_hz))
            files.append(file)
        if progress is not None:
            progress(1)
    if not files:
        raise ValueError(f"no recording can be used; the first: {failed[0]['reason']}")
    results: dict[str, Any] = {
        "tokenizer": tokenizer.card(),
        "vocoder": vocoder.kind,
        "with_durations": with_durations,
        "seconds": sum(file["seconds"] for file in files),
        "units": sum(file["units"] for file in files),
        "files": files,
        "failed": failed,
    }
    if transcriber is not None:
        results["word_error_rate"] = {
            name: total_word_errors([file[name] for file in files if file[name] is not None])
            for name in ("original", "resynthesised")
        }
    return results


def _compare(text: str | None, heard: str, heard_again: str) -> dict[str, Any]:
    """The words of a file and their errors."""
    return {
        "text": text,
        "heard_in_original": heard,
        "heard_in_resynthesised": heard_again,
        "original": None if text is None else asdict(word_error_rate(text, heard)),
        "resynthesised": asdict(word_error_rate(heard if text is None else text, heard_again)),
    }


def total_word_errors(counts: list[dict[str, int]]) -> dict[str, Any] | None:
    """All errors of files with their "rate" and the 95 % "interval" of it; None where nothing was counted.

    Args:
        counts: the fields of `WordErrors` of each file.
    """
    errors = [WordErrors(**count) for count in counts]
    total = sum(errors, WordErrors(0, 0, 0, 0))
    if total.num_words == 0:
        return None
    interval = None
    if len(errors) > 1:
        # Whole files are drawn: errors in one file depend on each other.
        found = scipy.stats.bootstrap(
            (np.array([e.count for e in errors]), np.array([e.num_words for e in errors])),
            lambda count, num_words, axis=-1: count.sum(axis=axis) / np.maximum(num_words.sum(axis=axis), 1),
            paired=True,
            method="percentile",
            rng=0,
        ).confidence_interval
        interval = [float(found.low), float(found.high)]
    return asdict(total) | {"rate": total.rate, "interval": interval}


def _output_files(recordings: Sequence[Recording], folder: Path) -> list[Path]:
    """A WAV file for each recording; refuses to lose one."""
    if not recordings:
        raise ValueError("recordings is empty: give at least one audio file")
    owners: dict[Path, Path] = {}
    for recording in recordings:
        output = (folder / recording.name).with_suffix(".wav")
        if output.resolve() in owners:
            raise ValueError(
                f"{owners[output.resolve()]} and {recording.audio} would both become {output}: rename one of them"
            )
        owners[output.resolve()] = recording.audio
    for recording in recordings:
        if recording.audio.resolve() in owners:
            raise ValueError(f"{recording.audio} would be written over: give another output")
    return [(folder / recording.name).with_suffix(".wav") for recording in recordings]


def _refuse_another_tokenizer(vocoder: Vocoder, tokenizer: SpeechTokenizer) -> None:
    if vocoder.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the vocoder decodes units of {vocoder.tokenizer_fingerprint}, not of {tokenizer.fingerprint}: give the "
            "vocoder of this tokenizer"
        )
