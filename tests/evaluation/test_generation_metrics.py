"""Continuations of prompts: known metrics, a run from files to files with tiny random models, every refusal."""

import csv
import json
from collections.abc import Callable
from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import tiny_lm_config, tiny_text_tokenizer
from tests.speech.conftest import RATE_HZ, syllables
from tests.speech.recognisers import save_ctc
from transformers import LlamaForCausalLM

from smoltolk import SmolTolkConfig, SmolTolkForCausalLM, SmolTolkPipeline, cli
from smoltolk.evaluation.generation import (
    Prompt,
    Sampling,
    TextScorer,
    estimate,
    evaluate_generation,
    load_prompts,
    measure,
)
from smoltolk.evaluation.tasks import ClozeItem, save_cloze
from smoltolk.speech.audio import load_audio, save_wav
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.mel_vocoder import MelVocoder
from smoltolk.speech.units import Units

SPEECH = Sampling(to="speech", max_new_tokens=12, temperature=1.0)
TEXT = Sampling(to="text", max_new_tokens=8, temperature=1.0)
PROMPTS = [Prompt("one", "w1 w2"), Prompt("two", "w3"), Prompt("three", "w4 w5", reference="a b c")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with "model" (tokenizers and vocoder inside), "asr", "lm" and a prompt "p.wav"."""
    folder = tmp_path_factory.mktemp("world")
    audio = syllables(0)[: 3 * RATE_HZ]
    save_wav(folder / "p.wav", audio[: RATE_HZ // 2], RATE_HZ)
    tokenizer = MelTokenizer.fit([audio], num_units=12)
    torch.manual_seed(0)
    config = SmolTolkConfig(lm_config=tiny_lm_config(), num_units=12, speech_tokenizer=tokenizer.card())
    SmolTolkForCausalLM(config).save_pretrained(folder / "model")
    tiny_text_tokenizer().save_pretrained(folder / "model")
    tokenizer.save(folder / "model" / "speech_tokenizer")
    MelVocoder.fit([(tokenizer.encode(audio), audio)], tokenizer, steps=1).save(folder / "model" / "vocoder")
    save_ctc(folder / "asr")
    LlamaForCausalLM(tiny_lm_config(max_position_embeddings=16)).save_pretrained(folder / "lm")
    tiny_text_tokenizer().save_pretrained(folder / "lm")
    return folder


@pytest.fixture(scope="module")
def pipeline(world: Path) -> SmolTolkPipeline:
    return SmolTolkPipeline.from_pretrained(world / "model")


def hear(audio: np.ndarray, sample_rate_hz: int) -> str:
    """A recogniser that hears one word for each tenth of a second."""
    assert len(audio) >= sample_rate_hz // 10
    return " ".join("ab"[i % 2] for i in range(len(audio) * 10 // sample_rate_hz))


def file(prompt: str, text: str | None, **settings: Any) -> dict[str, Any]:
    kept = {"prompt": prompt, "text": text, "units": None, "seconds": None, "has_ended": True, "reference": None}
    return kept | settings


def test_estimates_resample_prompts() -> None:
    found = estimate([1.0, 2.0, 6.0], ["a", "b", "c"])
    assert (found["n"], found["mean"]) == (3, 3)
    assert found["standard_error"] == pytest.approx(np.std([1, 2, 6], ddof=1) / sqrt(3))
    low, high = found["interval"]
    assert 1 <= low < 3 < high <= 6
    # Copies within a prompt tell nothing new.
    twice = estimate([1.0, 1.0, 2.0, 2.0, 6.0, 6.0], ["a", "a", "b", "b", "c", "c"])
    assert twice["standard_error"] == pytest.approx(found["standard_error"])
    assert twice["interval"] == pytest.approx(found["interval"])
    assert estimate([4.0, 5.0], ["a", "a"]) == {"n": 2, "mean": 4.5, "standard_error": None, "interval": None}
    assert estimate([], []) == {"n": 0, "mean": None, "standard_error": None, "interval": None}


def test_perplexity_is_exp_of_the_mean_over_files_and_counts_what_is_left_out() -> None:
    scores = {"a": log(2), "b": log(8), "c": None, "d": None}
    reasons = {"a": None, "b": None, "c": "empty", "d": "empty"}
    found = measure([file(p, p, nll=scores[p], not_scored=reasons[p]) for p in scores])["generative_perplexity"]
    assert found["perplexity"] == pytest.approx(4)  # and not the mean of 2 and 8
    assert found["interval"] == pytest.approx([exp(end) for end in found["nll"]["interval"]])
    assert found["interval"] == pytest.approx([2, 8])
    assert (found["nll"]["n"], found["left_out"]) == (2, {"empty": 2})
    nothing = measure([file("a", "", nll=None, not_scored="empty")])["generative_perplexity"]
    assert (nothing["perplexity"], nothing["interval"], nothing["left_out"]) == (None, None, {"empty": 1})


def test_shares_and_rates_of_known_speech() -> None:
    found = measure(
        [
            file("a", "one two", units=[1, 2, 1, 2], seconds=2.0, reference="One, three."),
            file("b", "one two one two", units=[1] * 3, seconds=1.0, has_ended=False),
            file("c", "", units=[], reference="four"),
        ]
    )
    assert found["continuations"] == 3
    assert found["empty"]["mean"] == found["never_ending"]["mean"] == pytest.approx(1 / 3)
    assert (found["units_per_second"]["mean"], found["units_per_second"]["n"]) == (2.5, 2)
    assert found["words_per_second"]["mean"] == 2.5
    assert (found["word_error_rate"]["rate"], found["word_error_rate"]["num_words"]) == (pytest.approx(2 / 3), 3)
    diversity = found["diversity"]
    assert diversity["without_words"] == 1
    assert diversity["auto_bleu_2"]["mean"] == pytest.approx((0 + 2 / 3) / 2)
    assert diversity["auto_bleu_2_fairseq_geometric"]["mean"] == pytest.approx(sqrt(2 / 3) / 2)
    assert diversity["self_bleu_2_geometric"]["mean"] == pytest.approx((1 + sqrt(2 / 4 * 1 / 3)) / 2)
    squared = diversity["self_bleu_2_geometric"]["mean"] * diversity["auto_bleu_2_fairseq_geometric"]["mean"]
    assert diversity["vert"]["value"] == pytest.approx(sqrt(squared))
    assert diversity["vert"]["interval"][0] == 0  # the first alone repeats nothing
    assert found["generative_perplexity"] is None
    assert json.loads(json.dumps(found)) == found


def test_nothing_is_said_about_words_that_nobody_heard() -> None:
    found = measure([file("a", None, units=[1, 2]), file("b", None, units=[])])
    assert [found[name] for name in ("words_per_second", "word_error_rate", "diversity", "units_per_second")] == [
        None
    ] * 4
    assert found["empty"]["mean"] == 0.5
    silent = measure([file("a", "", units=[]), file("b", "", units=[])])
    assert silent["empty"]["mean"] == 1
    assert silent["diversity"]["without_words"] == 2
    assert (silent["diversity"]["auto_bleu_2"]["mean"], silent["diversity"]["vert"]) == (None, None)


def test_the_scorer_is_the_mean_over_the_tokens_after_the_first(world: Path) -> None:
    scorer = TextScorer(world / "lm")
    model = LlamaForCausalLM.from_pretrained(world / "lm")
    ids = tiny_text_tokenizer()("w3 w1 w4", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    expected = -(logits[0, ids[0, 1]] + logits[1, ids[0, 2]]) / 2
    assert scorer("w3 w1 w4") == pytest.approx(float(expected), abs=1e-5)
    assert [scorer(text) for text in (" ", "w1", "w1 " * 17)] == ["empty", "one token", "too long"]


def test_continuations_are_kept_and_gone_on_with(
    pipeline: SmolTolkPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: Path, prompts: list[Prompt] = PROMPTS, sampling: Sampling = SPEECH, **settings: Any) -> Any:
        return evaluate_generation(pipeline, prompts, output, sampling, transcriber=hear, **settings)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", progress=stop)
    (first,) = (tmp_path / "stopped" / "continuations").glob("*.json")
    before = first.stat().st_mtime_ns
    assert run(tmp_path / "stopped", PROMPTS[::-1]) | {"diversity": 0} == whole | {"diversity": 0}  # in any order
    assert first.stat().st_mtime_ns == before
    kept = {p.name: p.read_bytes() for p in (tmp_path / "whole" / "continuations").iterdir()}
    assert kept == {p.name: p.read_bytes() for p in (tmp_path / "stopped" / "continuations").iterdir()}
    assert json.loads((tmp_path / "whole" / "result.json").read_bytes()) == whole
    assert whole["sampling"] == {
        "to": "speech", "max_new_tokens": 12, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "samples": 1
    }  # fmt: skip

    for path in (tmp_path / "whole" / "continuations").glob("*.json"):
        said = json.loads(path.read_bytes())
        again = pipeline(said["prompt_text"], to="speech", max_new_tokens=12, temperature=1.0, seed=said["seed"])
        assert said["units"] == again.units.tolist()
        assert said["has_ended"] == (len(said["units"]) < 12)
        assert path.with_suffix(".wav").is_file() == bool(said["units"])
        if said["units"]:
            audio = load_audio(path.with_suffix(".wav"), sample_rate_hz=again.sample_rate_hz)
            np.testing.assert_allclose(audio, again.audio, atol=1e-4)
            assert said["seconds"] == len(again.audio) / again.sample_rate_hz

    with pytest.raises(ValueError, match=r"made with other settings .*'seed': 1.*give another output"):
        run(tmp_path / "whole", sampling=Sampling(to="speech", max_new_tokens=12, temperature=1.0, seed=1))
    with pytest.raises(ValueError, match="continues another prompt than one is now"):
        run(tmp_path / "whole", [Prompt("one", "w9")])


def test_samples_of_a_prompt_differ_and_text_is_scored(pipeline: SmolTolkPipeline, tmp_path: Path) -> None:
    sampling = Sampling(to="text", max_new_tokens=8, temperature=1.0, samples=3)
    result = evaluate_generation(pipeline, PROMPTS, tmp_path, sampling, scorer=lambda text: len(text) or "empty")
    files = [json.loads(path.read_bytes()) for path in (tmp_path / "continuations").glob("*.json")]
    assert result["continuations"] == len(files) == 9
    assert len({f["seed"] for f in files}) == 9
    assert len({f["text"] for f in files if f["prompt"] == "one"}) > 1
    scores = [f["nll"] for f in files if f["nll"] is not None]
    assert result["generative_perplexity"]["perplexity"] == pytest.approx(exp(np.mean(scores)))
    assert result["units_per_second"] is None
    assert result["word_error_rate"]["num_words"] == 9  # "a b c" three times


def test_very_short_speech_is_heard_with_silence_after_it(pipeline: SmolTolkPipeline, tmp_path: Path) -> None:
    sampling = Sampling(to="speech", max_new_tokens=1, temperature=1.0)
    result = evaluate_generation(pipeline, PROMPTS, tmp_path, sampling, transcriber=hear, keep_audio=False)
    assert result["never_ending"]["mean"] + result["empty"]["mean"] == 1
    assert not list(tmp_path.rglob("*.wav"))


def write_manifest(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_come_from_manifests_and_cloze_items(world: Path, pipeline: SmolTolkPipeline, tmp_path: Path) -> None:
    with (tmp_path / "p.csv").open("w") as table:
        writer = csv.writer(table)
        writer.writerows([["id", "text", "audio", "reference"], ["a", "w1", "", "w2 w3"], ["b", "", "x/b.wav", ""]])
    first, second = load_prompts(tmp_path / "p.csv")
    assert (first.part, first.reference) == ("w1", "w2 w3")
    assert (second.part, second.reference) == (tmp_path / "x" / "b.wav", None)
    both = write_manifest(tmp_path / "both.jsonl", [{"id": "a", "prompt_text": "w1", "prompt_audio": "a.wav"}])
    assert load_prompts(both, modality="text")[0].part == "w1"
    assert load_prompts(both, modality="speech")[0].part == tmp_path / "a.wav"

    items = [ClozeItem("i", "k", "i", prompt_text="w1", prompt_units=np.array([3, 4, 3]))]
    save_cloze(tmp_path / "items.parquet", items, pipeline.speech_tokenizer.fingerprint)
    (prompt,) = load_prompts(tmp_path / "items.parquet", pipeline.speech_tokenizer, modality="speech")
    assert isinstance(prompt.part, Units)
    offset = pipeline.model.ids.speech_offset
    assert pipeline.prompt_ids(prompt.part, to="speech") == [3 + offset, 4 + offset, 3 + offset]
    result = evaluate_generation(pipeline, [prompt, Prompt("wav", world / "p.wav")], tmp_path / "out", TEXT)
    assert (result["prompts"], result["is_transcribed"]) == (2, False)


@pytest.mark.parametrize(
    ("rows", "modality", "message"),
    [
        ([], None, "holds no prompts"),
        ([{"text": "w1"}], None, "row 1: the column id is missing"),
        ([{"id": "a", "text": " "}], None, "row 1: the prompt is empty: give it text or audio"),
        ([{"id": "a", "text": "w1", "audio": "a.wav"}], None, "the prompt has text and speech: say which"),
        ([{"id": "a", "text": "w1"}], "speech", "the prompt has no speech: add it"),
        ([{"id": "a", "text": "w1"}], "song", "modality is 'song'"),
    ],
)
def test_manifests_that_cannot_be_used(
    tmp_path: Path, rows: list[dict[str, str]], modality: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_prompts(write_manifest(tmp_path / "p.jsonl", rows), modality=modality)
    with pytest.raises(ValueError, match="is not a file"):
        load_prompts(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("prompts", "sampling", "settings", "message"),
    [
        ([], TEXT, {}, "prompts is empty"),
        ([PROMPTS[0], PROMPTS[0]], TEXT, {}, "the prompt 'one' is there twice"),
        (PROMPTS, TEXT, {"transcriber": hear}, "a recogniser is given, but to is 'text'"),
        (PROMPTS, SPEECH, {"scorer": len}, "a text LM is given, but no recogniser"),
        ([Prompt("a", Path("none.wav"))], TEXT, {}, r"1 audio files of prompts are missing: none\.wav"),
        ([Prompt("long", "w1 " * 300)], TEXT, {}, "prompt long: the prompt has 300 tokens"),
        ([Prompt("empty", "")], TEXT, {}, "prompt empty: the prompt's part '' is empty"),
    ],
)
def test_what_cannot_be_evaluated(
    pipeline: SmolTolkPipeline,
    tmp_path: Path,
    prompts: list[Prompt],
    sampling: Sampling,
    settings: dict[str, Callable[..., Any]],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_generation(pipeline, prompts, tmp_path, sampling, **settings)


def test_a_model_without_vocoder_or_speech_tokenizer(pipeline: SmolTolkPipeline, world: Path, tmp_path: Path) -> None:
    bare = SmolTolkPipeline(pipeline.model, pipeline.text_tokenizer)
    with pytest.raises(ValueError, match="kept without a vocoder: there is no audio to hear"):
        evaluate_generation(bare, PROMPTS, tmp_path, SPEECH, transcriber=hear)
    with pytest.raises(ValueError, match="the prompt 'wav' is audio, but the model has no speech tokenizer"):
        evaluate_generation(bare, [Prompt("wav", world / "p.wav")], tmp_path, SPEECH)
    result = evaluate_generation(bare, PROMPTS, tmp_path, SPEECH)  # units alone
    assert (result["continuations"], result["units_per_second"], result["diversity"]) == (3, None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "song"}, "to is 'song'"),
        ({"to": "text", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"to": "text", "samples": 0}, "samples is 0"),
        ({"to": "text", "samples": 2, "temperature": 0}, "with temperature 0 all are the same"),
    ],
)
def test_sampling_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_the_command_from_files_to_files(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "t", "text": "w1 w2", "reference": "a b"}, {"id": "s", "audio": "p.wav"}]
    prompts = write_manifest(world / "prompts.jsonl", rows)
    command = ["evaluate-generation", str(world / "model"), str(prompts), "--to", "speech", "--output", str(tmp_path)]
    judges = ["--asr", str(world / "asr"), "--lm", str(world / "lm")]
    assert cli.main([*command, *judges, "--max-new-tokens", "40", "--samples", "2"]) == 0
    printed = capsys.readouterr().out
    assert "never_ending" in printed
    assert str(tmp_path / "result.json") in printed.replace("\n", "")
    result = json.loads((tmp_path / "result.json").read_bytes())
    assert (result["prompts"], result["continuations"], result["asr"]) == (2, 4, str(world / "asr"))
    assert result["word_error_rate"]["num_words"] == 4
    perplexity = result["generative_perplexity"]
    assert perplexity["nll"]["n"] + sum(perplexity["left_out"].values()) == 4
    assert cli.main([*command, *judges, "--max-new-tokens", "41", "--samples", "2"]) == 1
    assert "made with other settings" in capsys.readouterr().err
    assert cli.main([*command, "--language", "en"]) == 1
    assert "language is 'en', but there is no recogniser" in capsys.readouterr().err
