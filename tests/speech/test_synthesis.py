import importlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import espeakng_loader
import numpy as np
import pytest

from smoltolk.speech import synthesis
from smoltolk.speech.synthesis import EspeakSynthesizer

VOCABULARY = """
the a of and to in it was he she they for at while by his her this that one two red dog cat cow horse barn
river forest garden house Tom Anna ate saw found took ran slept bread milk cheese don't again then well-fed
"""
WORDS = VOCABULARY.split()


def random_sentence(rng: random.Random) -> str:
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 12))]
    if rng.random() < 0.4:
        words[len(words) // 2] += rng.choice(",;:!?")
    return " ".join(words) + "."


def speak_all(texts: list[str]) -> list[bytes]:
    synthesizer = EspeakSynthesizer("en-us+f2", rate_wpm=200)
    return [synthesizer.speak(text).audio.tobytes() for text in texts]


def test_every_word_of_200_sentences_has_exactly_one_end_in_order_and_within_the_audio() -> None:
    rng = random.Random(0)
    synthesizer = EspeakSynthesizer()
    for _ in range(200):
        text = f"{random_sentence(rng)} {random_sentence(rng)}"
        spoken = synthesizer.speak(text)
        assert spoken.words == text.split()
        assert spoken.word_ends_s.shape == (len(spoken.words),)
        assert spoken.word_ends_s.dtype == np.float32
        assert spoken.word_ends_s[0] > 0
        assert np.all(np.diff(spoken.word_ends_s) > 0)
        assert spoken.word_ends_s[-1] <= len(spoken.audio) / spoken.sample_rate_hz


def test_audio_is_float32_at_22050_hz_within_one() -> None:
    spoken = EspeakSynthesizer().speak("A red dog.")
    assert spoken.sample_rate_hz == 22050
    assert spoken.audio.dtype == np.float32
    assert 0.1 < np.abs(spoken.audio).max() <= 1


def test_the_last_word_ends_before_the_closing_pause() -> None:
    spoken = EspeakSynthesizer().speak("The dog sat.")
    end = round(float(spoken.word_ends_s[-1]) * spoken.sample_rate_hz)
    assert end < len(spoken.audio)
    assert np.abs(spoken.audio[end + 300 :]).max() < 0.02


def test_a_fresh_process_with_the_same_calls_gives_the_same_audio() -> None:
    texts = ["The red dog sat on the mat.", "She saw a shy fish.", "The red dog sat on the mat."]
    context = multiprocessing.get_context("spawn")
    runs = []
    for _ in range(2):
        with context.Pool(1) as pool:
            runs.append(pool.apply(speak_all, (texts,)))
    assert runs[0] == runs[1]


def test_voice_rate_and_pitch_change_the_audio_and_do_not_leak_into_other_synthesizers() -> None:
    text = "The dog sat."
    plain = EspeakSynthesizer()
    slow = EspeakSynthesizer(rate_wpm=120)
    length = len(plain.speak(text).audio)
    assert len(slow.speak(text).audio) > 1.3 * length
    assert abs(len(plain.speak(text).audio) - length) < 0.1 * length
    other = EspeakSynthesizer("en-us+f2").speak(text).audio
    assert len(other) != length


def test_threads_take_turns() -> None:
    synthesizer = EspeakSynthesizer()
    word_counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: word_counts.append(len(synthesizer.speak("one two three.").words)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert word_counts == [3] * 8


def test_quotes_dashes_and_brackets_around_a_word_are_not_spoken() -> None:
    spoken = EspeakSynthesizer().speak("“It (was) a dog!” he said...")
    assert len(spoken.word_ends_s) == 6


def test_a_small_letter_after_a_full_stop_still_has_its_word() -> None:
    assert len(EspeakSynthesizer().speak("don't go. it is late").word_ends_s) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no words"),
        (" \n ", "no words"),
        ("It was 7 o'clock.", "spell numbers out"),
        ("A dog – a cat.", "no letters"),
        ("of the " * 200, "shorter"),
    ],
)
def test_a_text_that_cannot_be_spoken_word_by_word_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EspeakSynthesizer().speak(text)


@pytest.mark.parametrize("voice", ["xx-nope", "", "en-us+", "en-us+nobody", "f2", "../x", "mb-en1"])
def test_an_unknown_voice_or_variant_is_refused(voice: str) -> None:
    with pytest.raises(ValueError, match="voice"):
        EspeakSynthesizer(voice)


@pytest.mark.parametrize(("field", "value"), [("rate_wpm", 20), ("rate_wpm", 2000), ("pitch", -1), ("pitch", 100)])
def test_a_rate_or_pitch_out_of_range_is_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=field):
        EspeakSynthesizer(**{field: value})


def test_a_ctrl_c_while_speaking_is_not_lost() -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    synthesizer = EspeakSynthesizer()
    synthesizer.speak("warm up")
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        timer.start()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            synthesizer.speak("The red dog sat on the mat. " * 20)
    timer.join()
    signal.signal(signal.SIGINT, previous)
    assert len(synthesizer.speak("again").words) == 1


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.delitem(sys.modules, "smoltolk.speech.synthesis")
    with pytest.raises(ImportError, match=r"pip install 'smoltolk\[demo\]'"):
        importlib.import_module("smoltolk.speech.synthesis")


def test_a_data_folder_without_phonemes_is_refused_before_the_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="no phontab: reinstall"):
        synthesis._Engine()


def test_any_text_can_be_spoken_without_word_times() -> None:
    synthesizer = EspeakSynthesizer()
    audio, sample_rate_hz = synthesizer.speak_freely("He owed $10,000 & left in 1984...")
    assert (audio.dtype, sample_rate_hz) == (np.float32, 22050)
    assert len(audio) > 2 * sample_rate_hz  # the numbers are read out
    assert 0.1 < np.abs(audio).max() <= 1
