"""The text side of the data: tokens of a text by word, and the fingerprint of a text tokenizer."""

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_text_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a text LM.

    Args:
        name: a folder, or a name on the Hugging Face Hub.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text tokenizer {name} cannot be read ({str(error).splitlines()[0]}): give the folder of a text LM with "
            "its tokenizer, or the name of one that can be downloaded"
        ) from error


def encode_words(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a text, and say which tokens belong to which of its words.

    The text is tokenized as a whole, without special tokens. Words are those of `text.split()`. A token
    belongs to the word that holds its first character other than white space; a token of white space alone
    belongs to the word after it (at the end of the text: to the last word).

    Returns:
        Token ids (num_tokens,) uint32, and the number of tokens of each word (num_words,) uint8.

    Raises:
        ValueError: the text has no words, a word has no token of its own or more than 255, or the tokenizer
            is not a fast one.
    """
    _check_fast(tokenizer)
    words = list(re.finditer(r"\S+", text))
    if not words:
        raise ValueError(f"text {text!r} has no words: give a text with at least one word")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    word_ends = np.array([word.end() for word in words])
    first_characters = np.array(
        [end - len(text[start:end].lstrip()) for start, end in encoding["offset_mapping"]], dtype=np.int64
    )
    word_of_token = np.minimum(word_ends.searchsorted(first_characters, side="right"), len(words) - 1)
    counts = np.bincount(word_of_token, minlength=len(words))
    if counts.min() == 0 or counts.max() > 255:
        word = int(np.flatnonzero((counts == 0) | (counts > 255))[0])
        raise ValueError(
            f"word {words[word].group()!r} (number {word}) of the text has {counts[word]} tokens: "
            f"every word needs 1 to 255 of its own; change the text or the tokenizer"
        )
    return np.array(encoding["input_ids"], dtype=np.uint32), counts.astype(np.uint8)


def decode_tokens(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[np.ndarray]) -> list[str]:
    """The text of each piece of tokens (num_tokens,), special tokens kept and spaces as they are.

    Raises:
        ValueError: a token is not the tokenizer's, or the tokenizer is not a fast one.
    """
    _check_fast(tokenizer)
    largest = max((int(piece.max()) for piece in pieces if len(piece)), default=0)
    if largest >= len(tokenizer):
        raise ValueError(f"token {largest} is not one of the {len(tokenizer)} of the tokenizer: give another tokenizer")
    lists = [piece.tolist() for piece in pieces]
    return tokenizer.backend_tokenizer.decode_batch(lists, skip_special_tokens=False)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a fast tokenizer does to a text.

    Padding and truncation, which calls of the tokenizer switch on and off, are left out.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    _check_fast(tokenizer)
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings.update(padding=None, truncation=None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer is a {type(tokenizer).__name__}, which gives no offsets: "
            f"use the fast version (AutoTokenizer with use_fast=True)"
        )
