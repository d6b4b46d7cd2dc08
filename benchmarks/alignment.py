"""Word times by pocketsphinx on synthetic speech, whose times are known: errors, failures, speed, wrong texts.

python -m benchmarks.alignment --help
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from benchmarks.english_sentences import sentences

from smoltolk.speech.alignment import AlignmentError
from smoltolk.speech.audio import load_audio
from smoltolk.speech.pocketsphinx_aligner import PocketsphinxAligner
from smoltolk.speech.pronunciation import pronounce
from smoltolk.speech.synthesis import EspeakSynthesizer

VOICES = ("en-us", "en-us+f2", "en-us+f4", "en-us+m3", "en-us+m7", "en-gb-x-rp")
RATES_WPM = (150, 180, 220)
FALSE_ALARMS = (1, 5)
COLUMNS = ("median", "95 %", "< 50 ms", "failed", "× real time")


@dataclass(frozen=True, eq=False)
class Utterance:
    """A spoken sentence and its true word ends."""

    voice: str
    text: str
    audio: np.ndarray
    word_ends_s: np.ndarray

    @property
    def words(self) -> list[str]:
        return self.text.split()


class NoiselessAligner(PocketsphinxAligner):
    """Without the white noise."""

    _NOISE_DBFS = -np.inf


class SpellingAligner(PocketsphinxAligner):
    """Pronounces all words of four letters or more by their spelling, as if the dictionary lacked them."""

    def _entries(self, word: str) -> list[str]:
        plain = "".join(c for c in word.lower() if c.isalpha())
        if len(plain) < 4:
            return super()._entries(word)
        entry = f"{plain}'unknown"
        if self._decoder.lookup_word(entry) is None:
            self._decoder.add_word(entry, pronounce(plain), update=False)
        return [entry]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--wrong", type=int, default=200, help="sentences to pair with wrong texts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    corpus = speak(options.sentences, options.seed)
    seconds = sum(len(utterance.audio) for utterance in corpus) / 16_000
    words = sum(len(utterance.words) for utterance in corpus)
    print(f"{len(corpus)} sentences, {words} words, {seconds / 60:.1f} min, {len(VOICES)} voices\n")
    print(f"| end errors of words without a pause behind them | {' | '.join(COLUMNS)} |")
    print(f"|---|{'---|' * len(COLUMNS)}")
    aligner = PocketsphinxAligner()
    measure("all", aligner, corpus)
    for voice in VOICES:
        measure(voice, aligner, [utterance for utterance in corpus if utterance.voice == voice])
    measure("last words", aligner, corpus, of_word=lambda words, i: i == len(words) - 1)
    measure("starts of all words but the first", aligner, corpus, are_starts=True)
    measure("without noise", NoiselessAligner(), corpus)
    measure("long words, from the dictionary", aligner, corpus, of_word=is_long)
    measure("long words, by their spelling", SpellingAligner(), corpus, of_word=is_long)
    print()
    measure_wrong_texts(corpus[: options.wrong], aligner, random.Random(options.seed))


def speak(count: int, seed: int) -> list[Utterance]:
    corpus = []
    for i, text in enumerate(sentences(count, seed)):
        voice = VOICES[i % len(VOICES)]
        spoken = EspeakSynthesizer(voice, RATES_WPM[i // len(VOICES) % len(RATES_WPM)]).speak(text)
        audio = load_audio(spoken.audio, sample_rate_hz=16_000, source_rate_hz=spoken.sample_rate_hz)
        corpus.append(Utterance(voice, text, audio, spoken.word_ends_s))
    return corpus


def has_no_pause(words: list[str], i: int) -> bool:
    """The synthesiser counts a pause to the word before it, an aligner to none."""
    return words[i][-1].isalpha() or i == len(words) - 1


def is_long(words: list[str], i: int) -> bool:
    return has_no_pause(words, i) and sum(c.isalpha() for c in words[i]) >= 4


def measure(
    name: str,
    aligner: PocketsphinxAligner,
    corpus: list[Utterance],
    of_word: Callable[[list[str], int], bool] = has_no_pause,
    are_starts: bool = False,
) -> None:
    """Prints a row of the table."""
    errors_s: list[float] = []
    failed, aligned_s, elapsed_s = 0, 0.0, 0.0
    for utterance in corpus:
        begin = time.process_time()
        try:
            alignment = aligner.align(utterance.audio, utterance.text)
        except AlignmentError:
            failed += 1
            continue
        finally:
            elapsed_s += time.process_time() - begin
            aligned_s += len(utterance.audio) / aligner.sample_rate_hz
        if are_starts:
            errors_s += list(alignment.word_starts_s[1:] - utterance.word_ends_s[:-1])
        else:
            chosen = [i for i in range(len(utterance.words)) if of_word(utterance.words, i)]
            errors_s += list((alignment.word_ends_s - utterance.word_ends_s)[chosen])
    errors_ms = np.abs(errors_s) * 1000
    print(
        f"| {name} ({len(errors_ms)}) | {np.median(errors_ms):.0f} ms | {np.percentile(errors_ms, 95):.0f} ms | "
        f"{np.mean(errors_ms < 50):.1%} | {failed} of {len(corpus)} | {aligned_s / elapsed_s:.0f} |",
        flush=True,
    )


def measure_wrong_texts(corpus: list[Utterance], aligner: PocketsphinxAligner, rng: random.Random) -> None:
    """Prints how many wrong texts are caught at thresholds that the first half of the right ones gives."""
    confidences: dict[str, list[float]] = {}
    for utterance in corpus:
        for kind, words in pairings(utterance, corpus, rng).items():
            try:
                confidence = aligner.align(utterance.audio, " ".join(words)).confidence
            except AlignmentError:
                confidence = -np.inf
            confidences.setdefault(kind, []).append(confidence)
    right = np.array(confidences["right text"])
    half = len(right) // 2
    thresholds = [float(np.percentile(right[:half], alarm)) for alarm in FALSE_ALARMS]
    limits = " | ".join(f"{t:.2f} ({a} %)" for t, a in zip(thresholds, FALSE_ALARMS, strict=True))
    print(
        f"thresholds from {half} right texts (false alarms among them), refused among the other {len(right) - half}\n"
    )
    print(f"| refused | no path | below {limits} |\n|---|---|{'---|' * len(thresholds)}")
    for kind, values in confidences.items():
        rest = np.array(values[half:])
        shares = " | ".join(f"{np.mean(rest < threshold):.1%}" for threshold in thresholds)
        print(f"| {kind} | {np.mean(rest == -np.inf):.1%} | {shares} |")


def pairings(utterance: Utterance, corpus: list[Utterance], rng: random.Random) -> dict[str, list[str]]:
    words = utterance.words
    others = [other for other in corpus if other.text != utterance.text]
    near = min(rng.sample(others, min(60, len(others))), key=lambda o: abs(len(o.text) - len(utterance.text)))
    place = rng.randrange(len(words))
    return {
        "right text": words,
        "another text": rng.choice(others).words,
        "another text of the same length": near.words,
        "one word replaced": [*words[:place], rng.choice(near.words), *words[place + 1 :]],
        "one word left out": words[:place] + words[place + 1 :],
        "one word too many": [*words[:place], rng.choice(near.words), *words[place:]],
        "second half left out": words[: len(words) // 2],
    }


if __name__ == "__main__":
    main()
