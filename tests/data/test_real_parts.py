"""Preparation with real tokenizers and a real aligner, on synthetic speech."""

import json

import numpy as np
import pytest
from tests.speech.models import tiny_hubert_tokenizer, tiny_mimi_tokenizer
from transformers.models.mimi import modeling_mimi

from smoltolk import cli
from smoltolk.data.check import check_store
from smoltolk.data.prepare import prepare
from smoltolk.data.store import Store
from smoltolk.speech.audio import load_audio, save_wav
from smoltolk.speech.kinds import make_aligner
from smoltolk.speech.synthesis import EspeakSynthesizer

TEXTS = ("the dog ran home to eat.", "one morning we went to the market.")
MAKERS = [tiny_hubert_tokenizer]
if hasattr(modeling_mimi, "MimiDecoderModel"):
    MAKERS.append(tiny_mimi_tokenizer)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Spoken texts with the true ends of their words; a third has another text than it says."""
    folder = tmp_path_factory.mktemp("recordings")
    synthesizer = EspeakSynthesizer()
    rows, ends_s = [], []
    for number, text in enumerate((*TEXTS, TEXTS[0])):
        speech = synthesizer.speak(text)
        save_wav(folder / f"{number}.wav", speech.audio, speech.sample_rate_hz)
        rows.append({"audio": f"{number}.wav", "text": text})
        ends_s.append(speech.word_ends_s)
    rows[2]["text"] = "12 % of it, quite another thing altogether"
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, ends_s


@pytest.mark.parametrize("make", MAKERS)
def test_words_are_found_and_a_wrong_text_is_quarantined(recordings, tmp_path, text_tokenizer, make):
    folder, ends_s = recordings
    tokenizer = make()
    settings = {"speech_tokenizer": tokenizer, "text_tokenizer": text_tokenizer, "progress": False}
    summary = prepare(folder / "manifest.jsonl", tmp_path / "store", aligner=make_aligner("pocketsphinx"), **settings)
    assert (summary.utterances, summary.quarantined, summary.unaligned) == (2, 1, 0)
    store = Store(tmp_path / "store")
    for utterance, expected in zip(store, ends_s, strict=False):
        # The synthesiser counts pauses to the word before; the aligner does not.
        assert np.abs(utterance.word_ends_s[:-1] - np.asarray(expected)[:-1]).max() < 0.15
        audio = load_audio(folder / utterance.source, sample_rate_hz=tokenizer.sample_rate_hz)
        assert utterance.units.tolist() == tokenizer.encode(audio).units.tolist()
    report = check_store(tmp_path / "store", speech_fingerprint=tokenizer.fingerprint, progress=False)
    assert not [finding for finding in report.findings if finding.is_fault]


def test_the_command_aligns_too(recordings, tmp_path, text_tokenizer, speech_tokenizer, capsys):
    folder, _ = recordings
    speech_tokenizer.save(tmp_path / "speech")
    text_tokenizer.save_pretrained(tmp_path / "text")
    tokenizers = ["--speech-tokenizer", str(tmp_path / "speech"), "--text-tokenizer", str(tmp_path / "text")]
    command = ["prepare", str(folder / "manifest.jsonl"), str(tmp_path / "store"), *tokenizers]
    assert cli.main([*command, "--aligner", "pocketsphinx"]) == 0
    assert "2 utterances" in capsys.readouterr().out
    assert all(utterance.is_aligned for utterance in Store(tmp_path / "store"))
    assert cli.main([*command, "--min-confidence", "-3"]) == 1
    assert "belong to an aligner" in capsys.readouterr().err
