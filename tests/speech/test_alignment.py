"""Alignment: exact lattices, known times, and a reason for every failure."""

import itertools
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    SeamlessM4TFeatureExtractor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from smoltolk.speech.alignment import AlignmentError, TimedWord, align_words, joined_text
from smoltolk.speech.audio import load_audio
from smoltolk.speech.ctc_aligner import WILDCARD, CtcAligner, ctc_forced_alignment
from smoltolk.speech.kinds import make_aligner
from smoltolk.speech.pocketsphinx_aligner import PocketsphinxAligner
from smoltolk.speech.pronunciation import pronounce
from smoltolk.speech.synthesis import EspeakSynthesizer

RATE_HZ = 16_000
TEXT = "Her grandmother loved to read three pages of the chapter."


@pytest.fixture(scope="module")
def spoken():
    """Audio and true word ends of `TEXT`."""
    spoken = EspeakSynthesizer("en-us", rate_wpm=170).speak(TEXT)
    audio = load_audio(spoken.audio, sample_rate_hz=RATE_HZ, source_rate_hz=spoken.sample_rate_hz)
    return audio, spoken.word_ends_s


@pytest.fixture(scope="module")
def pocketsphinx():
    return PocketsphinxAligner()


# Pocketsphinx


def test_words_of_synthetic_speech_end_where_they_do(pocketsphinx, spoken):
    audio, true_ends_s = spoken
    alignment = pocketsphinx.align(audio, TEXT)
    assert alignment.word_ends_s.dtype == np.float32
    errors_s = np.abs(alignment.word_ends_s - true_ends_s)
    assert np.median(errors_s) < 0.02
    assert errors_s.max() < 0.12
    assert np.all(alignment.word_starts_s <= alignment.word_ends_s)
    assert np.all(np.diff(alignment.word_ends_s) >= 0)
    assert alignment.word_ends_s[-1] <= len(audio) / RATE_HZ


@pytest.mark.parametrize("gain", [0.01, 0.5, 3.0])
def test_the_level_of_the_recording_does_not_matter(pocketsphinx, spoken, gain):
    audio, true_ends_s = spoken
    assert np.median(np.abs(pocketsphinx.align(audio * np.float32(gain), TEXT).word_ends_s - true_ends_s)) < 0.02


def test_an_alignment_does_not_depend_on_the_ones_before_nor_on_the_process(pocketsphinx, spoken):
    audio, _ = spoken
    first = pickle.loads(pickle.dumps(pocketsphinx)).align(audio, TEXT)  # noqa: S301
    pocketsphinx.align(audio[::-1].copy() * 0.3, "a")
    again = pocketsphinx.align(audio, TEXT)
    assert np.array_equal(first.word_ends_s, again.word_ends_s)
    assert first.confidence == again.confidence


def test_a_wrong_text_fails_or_has_less_confidence(pocketsphinx, spoken):
    audio, _ = spoken
    good = pocketsphinx.align(audio, TEXT).confidence
    assert good > -9.3
    with pytest.raises(AlignmentError, match="no way through the audio"):
        pocketsphinx.align(audio, TEXT + " " + TEXT)
    assert pocketsphinx.align(audio, "Her grandmother loved to read.").confidence < good - 2
    with pytest.raises(AlignmentError, match=r"confidence -\d+\.\d\d is below -9\.3"):
        PocketsphinxAligner(min_confidence=-9.3).align(audio, "Her grandmother loved to read.")


def test_punctuation_and_spelling_leave_the_times_as_they_are(pocketsphinx, spoken):
    audio, _ = spoken
    plain = pocketsphinx.align(audio, TEXT).word_ends_s
    marked = pocketsphinx.align(
        audio, "— “HER” grandmother, — loved to (read) three pages ... of the chapter!"
    ).word_ends_s
    assert marked[0] == 0
    assert marked[3] == marked[2]
    assert marked[9] == marked[8]
    assert np.array_equal(np.delete(marked, [0, 3, 9]), plain)


def test_words_that_the_dictionary_lacks_are_pronounced_by_their_spelling(pocketsphinx, spoken):
    audio, true_ends_s = spoken
    text = "Her grand-mother luvvd to reede threigh pagez of the chaptur."
    assert np.median(np.abs(pocketsphinx.align(audio, text).word_ends_s - true_ends_s)) < 0.03


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" ", "no words"),
        ("… —", "no words that are spoken"),
        ("Her grandmother loved 3 pages", "'3' has signs that are no letters of English"),
        ("Her grandmother & I", "'&' has signs that are no letters of English"),
        ("read(2) <sil>", "no letters of English"),
        ("бабушка", "no letters of English"),
    ],
)
def test_a_text_that_cannot_be_spoken_says_why(pocketsphinx, spoken, text, reason):
    with pytest.raises(AlignmentError, match=reason):
        pocketsphinx.align(spoken[0], text)


@pytest.mark.parametrize(
    ("audio", "reason"),
    [
        (np.zeros(RATE_HZ, np.float32), "silent"),
        (np.full(RATE_HZ, np.nan, np.float32), "not finite"),
        (np.zeros((2, RATE_HZ), np.float32), "wrong shape"),
        (np.zeros(0, np.float32), "empty"),
        (np.ones(10, np.float32), "no way through the audio"),
    ],
)
def test_audio_that_cannot_be_aligned_says_why(pocketsphinx, audio, reason):
    with pytest.raises(AlignmentError, match=reason):
        pocketsphinx.align(audio, "a word")


def test_without_pocketsphinx_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    with pytest.raises(ImportError, match=r"pip install 'smoltolk\[align\]'"):
        PocketsphinxAligner()


@pytest.mark.parametrize(
    ("word", "phones"),
    [
        ("knight", "N AY T"),
        ("station", "S T EY SH AH N"),
        ("cake", "K EY K"),
        ("wanted", "W AA N T AH D"),
        ("boxes", "B AA K S AH Z"),
        ("cat's", "K AE T Z"),
        ("ft", "EH F T IY"),
    ],
)
def test_spelling_rules(word, phones):
    assert pronounce(word) == phones


@settings(max_examples=200, deadline=None)
@given(st.text("abcdefghijklmnopqrstuvwxyz'", min_size=1, max_size=12).filter(lambda word: word.strip("'")))
def test_every_word_of_letters_has_phones(word):
    assert pronounce(word)


@pytest.mark.parametrize("word", ["", "'", "Ab", "a1", "é"])
def test_only_words_of_small_letters_are_pronounced(word):
    with pytest.raises(ValueError, match="not made of the letters"):
        pronounce(word)


# The CTC lattice


def log_table(rows):
    return np.log(np.array(rows, dtype=np.float64))


def test_a_lattice_computed_by_hand():
    # Blank 0, a 1, b 2. The best path of "ab": a, blank, b, b.
    table = log_table([[0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.3, 0.1, 0.6], [0.2, 0.1, 0.7]])
    firsts, lasts, confidence = ctc_forced_alignment(table, np.array([1, 2]), blank=0)
    assert (firsts.tolist(), lasts.tolist()) == ([0, 2], [0, 3])
    assert confidence == pytest.approx(np.log([0.8, 0.6, 0.6, 0.7]).mean())


def test_equal_neighbours_need_a_blank_between_them():
    table = log_table([[0.1, 0.9]] * 3)
    firsts, lasts, confidence = ctc_forced_alignment(table, np.array([1, 1]), blank=0)
    assert (firsts.tolist(), lasts.tolist()) == ([0, 2], [0, 2])
    assert confidence == pytest.approx(np.log([0.9, 0.1, 0.9]).mean())
    with pytest.raises(AlignmentError, match="needs 3 frames, but the audio has 2"):
        ctc_forced_alignment(table[:2], np.array([1, 1]), blank=0)


def test_a_wildcard_takes_the_best_token_of_each_frame_and_does_not_count():
    table = log_table([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    firsts, lasts, confidence = ctc_forced_alignment(table, np.array([1, WILDCARD, 1]), blank=0)
    assert (firsts[0], lasts[0], firsts[2], lasts[2]) == (0, 0, 3, 3)
    assert firsts[1] == 1
    assert confidence == pytest.approx(np.log(0.8))


def test_a_path_without_probability_is_refused():
    table = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    with pytest.raises(AlignmentError, match="no path"):
        ctc_forced_alignment(table, np.array([1]), blank=0)


def collapse(path, blank):
    return [token for token, _ in itertools.groupby(path) if token != blank]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_viterbi_finds_the_best_of_all_paths(data):
    vocab, frames = data.draw(st.integers(2, 3)), data.draw(st.integers(1, 6))
    blank = data.draw(st.integers(0, vocab - 1))
    letters = [token for token in range(vocab) if token != blank]
    tokens = data.draw(st.lists(st.sampled_from(letters), min_size=1, max_size=3))
    table = np.array(
        data.draw(
            st.lists(st.lists(st.floats(-9, 0), min_size=vocab, max_size=vocab), min_size=frames, max_size=frames)
        )
    )
    scores = [
        table[range(frames), path].sum()
        for path in itertools.product(range(vocab), repeat=frames)
        if collapse(path, blank) == tokens
    ]
    if not scores:
        with pytest.raises(AlignmentError, match="frames"):
            ctc_forced_alignment(table, np.array(tokens), blank=blank)
        return
    firsts, lasts, confidence = ctc_forced_alignment(table, np.array(tokens), blank=blank)
    assert confidence * frames == pytest.approx(max(scores))
    path = np.full(frames, blank)
    for token, first, last in zip(tokens, firsts, lasts, strict=True):
        path[first : last + 1] = token
    assert collapse(path, blank) == tokens
    assert table[range(frames), path].sum() == pytest.approx(max(scores))


# The CTC aligner

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ'"


def save_model(folder, letters=LETTERS, delimiter="|", **changes):
    """A tiny random model in the real format."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", delimiter, *letters])}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), word_delimiter_token=delimiter).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
        **changes,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("ctc") / "model")


@pytest.fixture
def ctc(ctc_folder):
    return CtcAligner(str(ctc_folder))


def scripted(aligner, script, monkeypatch):
    """Let the model be sure of one character in each frame: `_` for the blank."""
    vocabulary = {"_": 0, "|": 4} | {letter: 5 + i for i, letter in enumerate(LETTERS)}
    table = np.full((len(script), len(LETTERS) + 5), 1e-4)
    table[range(len(script)), [vocabulary[c] for c in script]] = 0.9
    monkeypatch.setattr(aligner, "log_probabilities", lambda audio: np.log(table))
    return np.ones(len(script) * 320 + 80, np.float32)


def test_words_are_timed_by_the_frames_of_their_characters(ctc, monkeypatch):
    audio = scripted(ctc, "__IT||_IS__|_S_OO_O__", monkeypatch)
    alignment = ctc.align(audio, "It is Soo!")
    edge = 40 / RATE_HZ  # half of what a frame hears beyond its stride
    assert alignment.word_starts_s == pytest.approx(np.array([2, 7, 13]) * 0.02 + edge)
    assert alignment.word_ends_s == pytest.approx(np.array([4, 9, 19]) * 0.02 + edge)
    assert alignment.confidence == pytest.approx(np.log(0.9), rel=1e-5)


def test_what_the_vocabulary_lacks_becomes_a_wildcard_but_punctuation_is_left_out(ctc, monkeypatch):
    audio = scripted(ctc, "_CAFE_|_TEN_|_WEL_L|KNOWN_", monkeypatch)
    alignment = ctc.align(audio, "“Café” — 10 well-known…")
    assert alignment.word_ends_s[0] == alignment.word_ends_s[1] == pytest.approx(5 * 0.02 + 0.0025)
    assert alignment.word_ends_s[3] == pytest.approx(25 * 0.02 + 0.0025)
    assert alignment.word_starts_s[3] == pytest.approx(14 * 0.02 + 0.0025)
    assert alignment.confidence == pytest.approx(np.log(0.9), rel=1e-5)


def test_a_text_that_is_not_said_has_less_confidence(ctc, monkeypatch):
    audio = scripted(ctc, "__IT__|_IS_", monkeypatch)
    assert ctc.align(audio, "no is").confidence < ctc.align(audio, "it is").confidence - 1
    ctc.min_confidence = -1.0
    with pytest.raises(AlignmentError, match="is below -1"):
        ctc.align(audio, "no is")


@pytest.mark.parametrize(
    ("text", "reason"), [("бабушка 7", "no letters of the model's"), ("it is " * 9, "needs 53 frames")]
)
def test_a_text_that_the_model_cannot_align_says_why(ctc, monkeypatch, text, reason):
    with pytest.raises(AlignmentError, match=reason):
        ctc.align(scripted(ctc, "__IT__|_IS_", monkeypatch), text)


def test_a_lattice_that_would_not_fit_is_refused(ctc, monkeypatch):
    monkeypatch.setattr(ctc, "_MAX_LATTICE_BYTES", 20)
    with pytest.raises(AlignmentError, match="cut the recording"):
        ctc.align(scripted(ctc, "__IT__|_IS_", monkeypatch), "it is")


def test_the_models_own_emissions_are_log_probabilities_and_align(ctc):
    audio = np.random.default_rng(0).normal(0, 0.1, RATE_HZ).astype(np.float32)
    table = ctc.log_probabilities(audio)
    assert table.shape == (49, len(LETTERS) + 5)
    assert np.exp(table).sum(axis=1) == pytest.approx(np.ones(49), rel=1e-5)
    model, inputs = (
        Wav2Vec2ForCTC.from_pretrained(ctc.model).eval(),
        Wav2Vec2FeatureExtractor()(audio, sampling_rate=RATE_HZ),
    )
    with torch.inference_mode():
        expected = model(torch.tensor(np.array(inputs.input_values))).logits[0].log_softmax(-1).numpy()
    assert table == pytest.approx(expected, abs=1e-4)
    alignment = ctc.align(audio, "it is")
    assert 0 < alignment.word_ends_s[0] < alignment.word_ends_s[1] <= 1


def test_long_audio_goes_through_the_model_in_windows(ctc, monkeypatch):
    audio = np.random.default_rng(0).normal(0, 0.1, 3 * RATE_HZ + 123).astype(np.float32)
    lengths = []
    model = ctc._loaded_model()

    class Recorder:
        def to(self, device):
            return self

        def __call__(self, inputs):
            lengths.append(inputs.shape[1])
            return model(inputs)

    monkeypatch.setattr(ctc, "_model", Recorder())
    whole = ctc.log_probabilities(audio)
    monkeypatch.setattr(ctc, "_WINDOW_S", 1.0)
    monkeypatch.setattr(ctc, "_CONTEXT_S", 0.2)
    windowed = ctc.log_probabilities(audio)
    assert whole.shape == windowed.shape == (150, len(LETTERS) + 5)
    assert lengths[0] == len(audio)
    assert max(lengths[1:]) <= 1.4 * RATE_HZ + 400
    assert len(lengths) == 4
    with pytest.raises(AlignmentError, match="shorter than one frame"):
        ctc.log_probabilities(audio[:399])


def test_lower_case_vocabularies_get_lower_case_words(tmp_path):
    aligner = CtcAligner(str(save_model(tmp_path / "model", letters="aeiouß")))
    tokens, words = aligner._tokenize(["AÉ", "ẞ"])
    assert [aligner._tokens.get("a"), aligner._tokens.get("e"), 4, aligner._tokens.get("ß")] == tokens.tolist()
    assert words.tolist() == [0, 0, -1, 1]


def test_a_model_that_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no letters"):
        CtcAligner(str(save_model(tmp_path / "digits", letters="123")))
    with pytest.raises(ValueError, match="adapter that changes its frame rate"):
        CtcAligner(str(save_model(tmp_path / "adapter", add_adapter=True)))
    folder = save_model(tmp_path / "mel")
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    with pytest.raises(ValueError, match="does not take waveforms"):
        CtcAligner(str(folder))
    with pytest.raises(OSError, match="missing"):
        CtcAligner(str(tmp_path / "missing"))


def test_a_fingerprint_follows_weights_and_settings(ctc_folder, tmp_path):
    ctc = CtcAligner(str(ctc_folder))
    same = pickle.loads(pickle.dumps(ctc))  # noqa: S301
    assert same._model is None
    assert same.fingerprint == ctc.fingerprint
    assert CtcAligner(str(ctc_folder), min_confidence=-3).fingerprint != ctc.fingerprint
    other = save_model(tmp_path / "other")
    model = Wav2Vec2ForCTC.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.bias += 1
    model.save_pretrained(other)
    assert CtcAligner(str(other)).fingerprint != ctc.fingerprint
    assert PocketsphinxAligner().fingerprint != PocketsphinxAligner(-9).fingerprint


def test_the_model_runs_on_the_device_that_is_given_and_is_hashed_on_the_cpu(ctc_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ctc = make_aligner("ctc", str(ctc_folder))
    ctc.log_probabilities(np.ones(RATE_HZ, np.float32))
    assert ctc._model.device.type == "cpu"
    elsewhere = make_aligner("ctc", str(ctc_folder), device="meta")  # a device that computes shapes alone
    assert elsewhere.fingerprint == ctc.fingerprint
    assert elsewhere._model.device.type == "cpu"
    with pytest.raises(NotImplementedError, match="meta"):
        elsewhere.log_probabilities(np.ones(RATE_HZ, np.float32))
    assert elsewhere._model.device.type == "meta"
    with pytest.raises(ValueError, match="device is 'nowhere'"):
        make_aligner("ctc", str(ctc_folder), device="nowhere")


def test_aligners_are_made_by_kind(ctc_folder):
    assert make_aligner("pocketsphinx", None, -9.0).min_confidence == -9.0
    assert make_aligner("ctc", str(ctc_folder)).sample_rate_hz == RATE_HZ
    for arguments, message in [
        (("pocketsphinx", "model"), "has its own"),
        (("ctc",), "model is missing"),
        (("mfa",), "choose pocketsphinx or ctc"),
        (("pocketsphinx", None, float("nan")), "min_confidence is nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_aligner(*arguments)


# Timed words to a text


def timed(text):
    """Words of a second each."""
    return [TimedWord(word, float(i), i + 1.0) for i, word in enumerate(text.split("|"))]


@pytest.mark.parametrize(
    ("words", "text", "ends_s"),
    [
        ("the|cat|sat", "The cat sat.", [1, 2, 3]),
        ("the|cat", None, [1, 2]),
        (" New York| is", None, [3 / 7, 1, 2]),
        ("can|not|go", "cannot go", [2, 3]),
        ("cannot|go", "can not go", [0.5, 1, 2]),
        ("well|known", "well-known", [2]),
        ("it’s|café", "It's CAFÉ", [1, 2]),
        ("in|1984|—|he", "In 1984 he", [1, 2, 4]),
        ("so|on", "— so … on —", [0, 1, 1, 2, 2]),
        ("a|b c|d", "ab cd", [1.5, 3]),
    ],
)
def test_timed_words_are_put_to_the_text(words, text, ends_s):
    ends = align_words(timed(words), text)
    assert ends.dtype == np.float32
    assert ends == pytest.approx(ends_s)


@pytest.mark.parametrize(
    ("words", "text", "reason"),
    [
        ("the|dog|sat", "the cat sat", r"word 'cat' \(number 1\) of the text differs from 'dog'"),
        ("the|cat", "the cat sat", r"word 'sat' \(number 2\) of the text differs from the end"),
        ("the|cat|sat", "the cat", "ends after 'cat', but 'sat' of the timed words follows"),
        ("in|1984", "in nineteen eighty-four", r"'nineteen' \(number 1\) of the text differs from '1984'"),
        ("the", " ", "no words"),
        ("", None, "no words"),
    ],
)
def test_a_text_that_differs_names_the_first_word(words, text, reason):
    with pytest.raises(AlignmentError, match=reason):
        align_words(timed(words), text)


def test_the_text_of_timed_words_is_them_joined():
    assert joined_text(timed(" The| cat |sat.")) == "The cat sat."
