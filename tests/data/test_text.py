"""Tokens by word, on tokenizers that the tests train themselves."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from smoltolk.data.text import encode_words, tokenizer_fingerprint

TEXTS = ["the cat sat on the mat.", "a dog, a cow and the cat!", "tschüss  naïve words"]


def byte_level(seed_texts=TEXTS):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(seed_texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")  # noqa: S106


def word_level(normalizer=None):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "cat": 2}, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106


def metaspace():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106


BYTE_LEVEL = byte_level()


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, metaspace()])
@pytest.mark.parametrize("text", TEXTS)
def test_the_tokens_of_each_word_spell_the_word(tokenizer, text):
    ids, counts = encode_words(tokenizer, text)
    assert ids.dtype == np.uint32
    assert counts.dtype == np.uint8
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    spelled = [tokenizer.decode(part).replace("▁", " ").split() for part in np.split(ids, np.cumsum(counts)[:-1])]
    assert ["".join(part).replace(" ", "") for part in spelled] == text.split()


@settings(max_examples=80, deadline=None)
@given(st.text(min_size=1).filter(lambda text: text.split()))
def test_any_text_has_its_tokens_once_and_a_token_for_every_word(text):
    ids, counts = encode_words(BYTE_LEVEL, text)
    assert counts.sum() == len(ids)
    assert len(counts) == len(text.split())
    assert counts.min() >= 1


def test_a_token_of_spaces_belongs_to_the_next_word():
    ids, counts = encode_words(BYTE_LEVEL, "the   cat ")
    assert len(counts) == 2
    first_word = BYTE_LEVEL("the", add_special_tokens=False)["input_ids"]
    assert ids[: counts[0]].tolist() == first_word


@pytest.mark.parametrize("text", ["", "  \n"])
def test_a_text_without_words_is_refused(text):
    with pytest.raises(ValueError, match="has no words"):
        encode_words(BYTE_LEVEL, text)


def test_a_word_without_tokens_is_refused_by_name():
    with pytest.raises(ValueError, match="word '!!' \\(number 1\\) of the text has 0 tokens"):
        encode_words(word_level(normalizers.Replace("!", "")), "the !! cat")


def test_a_word_of_too_many_tokens_is_refused():
    with pytest.raises(ValueError, match="has 600 tokens"):
        encode_words(BYTE_LEVEL, "\x00" * 600)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow, which gives no offsets"):
        encode_words(Slow(), "text")
    with pytest.raises(ValueError, match="fast version"):
        tokenizer_fingerprint(Slow())


def test_the_fingerprint_names_the_tokenizer_and_not_its_last_call():
    tokenizer = byte_level()
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer_fingerprint(byte_level(["other words"])) != fingerprint
