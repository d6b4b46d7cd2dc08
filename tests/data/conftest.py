"""Tiny sounds, tokenizers and manifests for the tests of preparation."""

import json

import numpy as np
import pytest
import soundfile
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smoltolk.speech.mel import MelTokenizer

RATE_HZ = 16_000
WORDS = ("one", "two", "three", "four")


def sound(seed, seconds=0.5):
    """Tones of changing pitch: several units, never silent."""
    rng = np.random.default_rng(seed)
    pitches = np.repeat(rng.choice([200, 400, 800, 1600, 3200], 5), int(seconds * RATE_HZ / 5))
    return (0.4 * np.sin(2 * np.pi * np.cumsum(pitches) / RATE_HZ)).astype(np.float32)


@pytest.fixture(scope="session")
def speech_tokenizer():
    return MelTokenizer.fit([sound(seed) for seed in range(8)], num_units=8)


@pytest.fixture(scope="session")
def text_tokenizer():
    vocabulary = {"<unk>": 0} | {word: number for number, word in enumerate(WORDS, start=1)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")  # noqa: S106


@pytest.fixture
def tokenizers(speech_tokenizer, text_tokenizer):
    return {"speech_tokenizer": speech_tokenizer, "text_tokenizer": text_tokenizer, "progress": False}


def write_manifest(folder, rows):
    folder.mkdir(exist_ok=True)
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spoken_row(folder, number, **changes):
    folder.mkdir(exist_ok=True)
    name = f"{number}.wav"
    soundfile.write(folder / name, sound(number), RATE_HZ)
    return {"audio": name, "text": "one two", "word_ends_s": [0.2, 0.45]} | changes


def mixed_manifest(folder, count=10):
    """Good rows of all kinds with bad ones between them."""
    rows = [spoken_row(folder, number, split="train") for number in range(count)]
    rows[2] = {"text": "three four", "id": "text-only"}
    rows[4] = {"audio": "4.wav", "speaker": "ann", "split": "test"}
    rows[5] = {"audio": "missing.wav"}
    rows[7] = spoken_row(folder, 7, word_ends_s=[0.3, 0.2])
    return write_manifest(folder, rows)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def quarantine(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
