"""Word errors against known answers; recognisers as tiny random models in the real format."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.speech.recognisers import save_ctc, save_whisper

from smoltolk.speech.asr import Transcriber, WordErrors, normalised_words, word_error_rate

RATE_HZ = 16_000


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("the cat sat", "the cat sat", (0, 0, 0, 3)),
        ("The cat's here, isn't it?", "the cats here isnt it", (0, 0, 0, 5)),
        ("the cat sat", "the bat sat", (1, 0, 0, 3)),
        ("the cat sat", "the sat", (0, 1, 0, 3)),
        ("the cat sat", "the fat cat sat", (0, 0, 1, 3)),
        ("a b c d", "b c d e", (0, 1, 1, 4)),
        ("a b", "c d e", (2, 0, 1, 2)),
        ("", "noise", (0, 0, 1, 0)),
        ("words", "", (0, 1, 0, 1)),
        ("", "", (0, 0, 0, 0)),
    ],
)
def test_word_errors_of_known_cases(reference: str, hypothesis: str, errors: tuple[int, ...]) -> None:
    assert word_error_rate(reference, hypothesis) == WordErrors(*errors)


def distance(a: list[str], b: list[str]) -> int:
    """Levenshtein's recursion as it is written down, slow."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.lists(st.sampled_from("abc"), max_size=5), st.lists(st.sampled_from("abc"), max_size=5))
def test_errors_are_the_fewest_and_account_for_the_lengths(reference: list[str], hypothesis: list[str]) -> None:
    errors = word_error_rate(" ".join(reference), " ".join(hypothesis))
    assert errors.count == distance(reference, hypothesis)
    assert errors.num_words == len(reference)
    assert errors.insertions - errors.deletions == len(hypothesis) - len(reference)


def test_rates_are_errors_for_each_word_and_add_up_over_utterances() -> None:
    total = word_error_rate("a b c", "a x c") + word_error_rate("d", "d e f")
    assert total == WordErrors(1, 0, 2, 4)
    assert total.rate == 0.75
    with pytest.raises(ValueError, match="num_words is 0"):
        _ = word_error_rate("…", "a").rate


def test_words_are_compared_in_lower_case_without_punctuation_in_any_script() -> None:
    assert normalised_words("“Don't”, he said—twice: 2×!") == ["dont", "he", "said", "twice", "2"]
    assert normalised_words("Straße, ﬁne; हिन्दी") == ["strasse", "fine", "हिन्दी"]


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recognisers") / "ctc"
    save_ctc(folder)
    return folder


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recognisers") / "whisper"
    save_whisper(folder)
    return folder


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(RATE_HZ * seconds))).astype(np.float32)


def test_a_ctc_model_transcribes_audio_of_any_rate_and_length(ctc_folder: Path) -> None:
    transcribe = Transcriber(ctc_folder)
    heard = transcribe(noise(1), RATE_HZ)
    assert normalised_words(heard)
    assert transcribe(noise(1), RATE_HZ) == heard
    assert len(transcribe(noise(1), RATE_HZ // 2)) > 1.5 * len(heard)  # twice as long
    assert len(transcribe(noise(33), RATE_HZ)) > 5 * len(heard)  # in chunks
    with pytest.raises(ValueError, match=r"language is 'en', but .* cannot be told"):
        Transcriber(ctc_folder, language="en")


def test_a_whisper_model_transcribes_short_and_long_audio_in_a_chosen_language(whisper_folder: Path) -> None:
    transcribe = Transcriber(whisper_folder)
    heard = transcribe(noise(1), RATE_HZ)
    assert heard
    assert transcribe(noise(1), RATE_HZ) == heard
    assert transcribe(noise(31), RATE_HZ)
    assert Transcriber(whisper_folder, language="de")(noise(1), RATE_HZ) != heard


def test_a_missing_recogniser_is_said(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="none"):
        Transcriber(tmp_path / "none")
