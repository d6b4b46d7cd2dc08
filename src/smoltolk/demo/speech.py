"""The miniature's speech: stories and cloze items spoken by espeak-ng, as units."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import PreTrainedTokenizerBase

from smoltolk.data.store import write_store
from smoltolk.data.text import encode_words, tokenizer_fingerprint
from smoltolk.data.utterance import Utterance
from smoltolk.demo import world
from smoltolk.evaluation.tasks import ClozeItem
from smoltolk.speech.audio import load_audio
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.mel_vocoder import MelVocoder
from smoltolk.speech.synthesis import EspeakSynthesizer
from smoltolk.speech.units import Units

VOICE, RATE_WPM = "en-us", 220
TEXTS_PER_BLOCK = 1000


@dataclass(frozen=True, eq=False)
class SpokenUnits:
    """A text as units.

    Args:
        units: units and their durations in frames.
        word_ends_s: where each word ends (num_words,).
        seconds: length of the audio.
    """

    units: Units
    word_ends_s: np.ndarray
    seconds: float


def speak(texts: Sequence[str], sample_rate_hz: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Audio (samples,) at the given rate and word ends (num_words,) in seconds of each text."""
    synthesizer = EspeakSynthesizer(voice=VOICE, rate_wpm=RATE_WPM)
    for text in texts:
        spoken = synthesizer.speak(text)
        audio = load_audio(spoken.audio, sample_rate_hz=sample_rate_hz, source_rate_hz=spoken.sample_rate_hz)
        yield audio, spoken.word_ends_s


def fit_tokenizer(texts: Sequence[str], num_units: int, seed: int, output: Path) -> MelTokenizer:
    """Fits the mel tokenizer on spoken texts, and saves it."""
    audios = (audio for audio, _ in speak(texts, MelTokenizer.sample_rate_hz))
    tokenizer = MelTokenizer.fit(audios, num_units=num_units, seed=seed)
    tokenizer.save(output)
    return tokenizer


def fit_vocoder(
    texts: Sequence[str],
    tokenizer: MelTokenizer,
    steps: int,
    seed: int,
    output: Path,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Fits the vocoder of the one voice on spoken texts, and saves it."""
    pairs = ((tokenizer.encode(audio), audio) for audio, _ in speak(texts, tokenizer.sample_rate_hz))
    MelVocoder.fit(pairs, tokenizer, steps=steps, seed=seed, progress=progress).save(output)


def speak_units(
    texts: Sequence[str],
    tokenizer_folder: Path,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> list[SpokenUnits]:
    """Speaks and tokenizes texts in several processes.

    Each block of texts has a process of its own, so that the audio is the same in every run: the engine
    carries state from call to call.
    """
    blocks = [list(texts[i : i + TEXTS_PER_BLOCK]) for i in range(0, len(texts), TEXTS_PER_BLOCK)]
    spoken: list[SpokenUnits] = []
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1)
    with pool:
        # Processes inherit what is blocked when they are started: Ctrl-C is this process's, which stops the pool.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            made = pool.map(_speak_block, blocks, [tokenizer_folder] * len(blocks))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for block in made:
            spoken += block
            if progress is not None:
                progress(len(block))
    return spoken


def _speak_block(texts: list[str], tokenizer_folder: Path) -> list[SpokenUnits]:
    torch.set_num_threads(1)
    tokenizer = MelTokenizer.load(tokenizer_folder)
    rate = tokenizer.sample_rate_hz
    with threadpool_limits(1):  # NumPy's threads, too many of which halve the speed
        return [SpokenUnits(tokenizer.encode(audio), ends, len(audio) / rate) for audio, ends in speak(texts, rate)]


def write_speech_store(
    path: Path,
    texts: Sequence[str],
    spoken: Sequence[SpokenUnits],
    text_tokenizer: PreTrainedTokenizerBase,
    speech_tokenizer: MelTokenizer,
    num_validation: int,
) -> None:
    """Writes spoken stories as a store; the last ones are for validation."""

    def utterances() -> Iterator[Utterance]:
        for i, (text, speech) in enumerate(zip(texts, spoken, strict=True)):
            text_ids, counts = encode_words(text_tokenizer, text)
            yield Utterance(
                id=f"story-{i:06d}",
                text=text,
                text_ids=text_ids,
                units=speech.units.units,
                unit_durations=speech.units.durations,
                word_ends_s=speech.word_ends_s,
                word_token_counts=counts,
                seconds=speech.seconds,
                speaker=VOICE,
                source="miniature",
                split="validation" if i >= len(texts) - num_validation else "train",
            )

    write_store(
        path,
        utterances(),
        text_tokenizer_fingerprint=tokenizer_fingerprint(text_tokenizer),
        speech_tokenizer=speech_tokenizer.card(),
    )


def write_text_store(
    path: Path, texts: Sequence[str], text_tokenizer: PreTrainedTokenizerBase, num_validation: int
) -> None:
    """Writes stories that are not spoken as a store; the last ones are for validation."""

    def utterances() -> Iterator[Utterance]:
        for i, text in enumerate(texts):
            text_ids, counts = encode_words(text_tokenizer, text)
            split = "validation" if i >= len(texts) - num_validation else "train"
            yield Utterance(
                id=f"text-{i:06d}",
                text=text,
                text_ids=text_ids,
                units=None,
                unit_durations=None,
                word_ends_s=None,
                word_token_counts=counts,
                seconds=None,
                speaker=None,
                source="miniature",
                split=split,
            )

    write_store(
        path,
        utterances(),
        text_tokenizer_fingerprint=tokenizer_fingerprint(text_tokenizer),
        speech_tokenizer=None,
    )


def spoken_cloze(
    items: Sequence[world.ClozeItem],
    tokenizer_folder: Path,
    workers: int,
    progress: Callable[[int], None] | None = None,
) -> list[ClozeItem]:
    """Cloze items in text and units; contexts and endings are spoken apart, each distinct text once.

    So an ending has the same units in both items of its couple, and who ignores the context scores 50 %.
    """
    parts = [(item.context, item.true_ending, item.false_ending) for item in items]
    texts = sorted({text for part in parts for text in part})
    spoken = dict(zip(texts, speak_units(texts, tokenizer_folder, workers, progress), strict=True))
    return [
        ClozeItem(
            id=item.id,
            kind=item.kind,
            couple=item.couple,
            prompt_text=item.context,
            true_text=item.true_ending,
            false_text=item.false_ending,
            prompt_units=spoken[item.context].units.units,
            true_units=spoken[item.true_ending].units.units,
            false_units=spoken[item.false_ending].units.units,
        )
        for item in items
    ]
