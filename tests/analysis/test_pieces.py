"""The same words in speech and in text."""

import numpy as np
import pytest
from tests.conftest import SPEECH_CARD, tiny_text_tokenizer, tiny_utterances

from smoltolk.analysis.pieces import draw_pieces, most_frequent, plain, word_ends
from smoltolk.data.store import write_store
from smoltolk.data.utterance import Utterance


def make_store(path, utterances):
    return write_store(path, utterances, text_tokenizer_fingerprint="text", speech_tokenizer=SPEECH_CARD)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    return make_store(folder / "store", tiny_utterances(tiny_text_tokenizer(), count=100))


def test_pieces_of_an_utterance_are_the_utterance(store):
    whole = {piece.utterance: piece for piece in draw_pieces(store, 22)}
    assert len(whole) == 22
    cut = draw_pieces(store, 22, words_per_piece=3)
    assert min(len(piece.words) for piece in cut) == 3
    for name, piece in whole.items():
        parts = [part for part in cut if part.utterance == name]
        assert len(parts) == len(piece.words) // 3
        assert [word for part in parts for word in part.words] == piece.words
        for field in ("text_ids", "units"):
            assert np.concatenate([getattr(part, field) for part in parts]).tolist() == getattr(piece, field).tolist()
        assert all(part.text_ends[-1] == len(part.text_ids) for part in parts)
        assert all(part.unit_ends[-1] == len(part.units) > 0 for part in parts)
        assert {part.group for part in parts} == {piece.group}


def test_the_seed_decides_which_utterances(store):
    def drawn(seed):
        return [piece.utterance for piece in draw_pieces(store, 20, seed=seed)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {store[int(i)].id for i in store.ids_of_split("validation")} >= set(drawn(0))


def test_no_piece_is_without_units(tmp_path):
    utterances = [
        Utterance(
            id=f"u{i}",
            text="a b c d",
            text_ids=np.arange(4),
            units=np.array([1, 2]),
            unit_durations=np.array([10, 10]),
            word_ends_s=np.array([0.0, 0.05, 0.15, 0.2], dtype=np.float32),  # units begin at 0 and 0.1 s
            word_token_counts=np.ones(4, dtype=int),
            seconds=0.2,
            split="validation",
        )
        for i in range(20)
    ]
    store = make_store(tmp_path / "store", utterances)
    pieces = draw_pieces(store, 20, words_per_piece=1)
    assert all(len(piece.units) for piece in pieces)
    assert [word for piece in pieces for word in piece.words] == ["a", "b", "c", "d"] * 20


def test_word_ends_know_the_word_and_what_follows(store):
    pieces = draw_pieces(store, 20)
    words = word_ends(pieces, 10_000)
    last = words.select(words.following < 0)
    assert len(last.piece) <= 20
    for n in range(0, len(words.piece), 7):
        piece, w = pieces[words.piece[n]], words.word[n]
        assert words.label[n] == piece.words[w]
        assert words.said[n] == piece.text_ids[w]
        assert words.following[n] == (piece.text_ids[w + 1] if w + 1 < len(piece.words) else -1)
    chosen = word_ends(pieces, 50)
    assert len(chosen.piece) == 50
    assert (np.diff(chosen.piece) >= 0).all()


def test_a_context_is_new_once(store):
    piece = draw_pieces(store, 20)[0]
    twice = word_ends([piece, piece], 10_000)
    half = len(twice.piece) // 2
    assert twice.is_new.tolist() == [True] * half + [False] * half


def test_words_are_plain():
    assert [plain(word) for word in ("“Don't!”", "Straße,", "–", "3rd")] == ["don't", "strasse", "–", "3rd"]
    assert most_frequent(["b", "a", "b", "a", "c"], 2, fewest=2) == ["a", "b"]


def test_bad_input_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match=r"has 25 utterances with text, speech and word times .* give --utterances 25"):
        draw_pieces(store, 30)
    with pytest.raises(ValueError, match="utterances is 19: give 20 or more"):
        draw_pieces(store, 19)
    with pytest.raises(ValueError, match="words_per_piece is 0"):
        draw_pieces(store, 20, words_per_piece=0)
    with pytest.raises(ValueError, match=r"in the split 'test' .* give another store"):
        draw_pieces(store, 20, split="test")
    speech = {"units": np.array([1, 2]), "unit_durations": np.array([1, 1]), "seconds": 0.02, "split": "validation"}
    text = {"text": "a", "text_ids": np.array([1]), "word_token_counts": np.array([1])}
    for name, more, with_text in (("no-text", {}, 0), ("no-times", text, 30)):
        store = make_store(tmp_path / name, [Utterance(id=f"u{i}", **speech, **more) for i in range(30)])
        with pytest.raises(
            ValueError, match=rf"has 0 utterances .* \(of 30, {with_text} of them with text\).* an aligner"
        ):
            draw_pieces(store, 20)
