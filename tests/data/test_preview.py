"""The preview: it shows the rows that training draws, escapes what it shows, and plays what was said."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile
import yaml
from tests.conftest import (
    NUM_UNITS,
    SPEECH_CARD,
    TEXT_VOCAB,
    tiny_recipe,
    tiny_text_tokenizer,
    tiny_utterances,
)

from smoltolk import cli
from smoltolk.data.dataset import TASKS, BatchSource, TaskMixture
from smoltolk.data.policies import SentencePolicy, SpanPolicy
from smoltolk.data.preview import preview
from smoltolk.data.store import Store, write_store
from smoltolk.data.text import tokenizer_fingerprint
from smoltolk.model.configuration_smoltolk import IdSpace
from smoltolk.speech.audio import save_wav

TOKENIZER = tiny_text_tokenizer()
TOKENIZERS = {"text_tokenizer_fingerprint": tokenizer_fingerprint(TOKENIZER), "speech_tokenizer": SPEECH_CARD}
ROWS = list(tiny_utterances(TOKENIZER, count=12))
POLICY = SpanPolicy(text_words=(2, 4), speech_words=(2, 4))
CONTROLS = {"switch": "switch_id", "end of text": "end_of_text_id", "end of speech": "end_of_speech_id"}
CONTROLS |= {"begin of prompt": "bop_id", "end of prompt": "eop_id"}
VOID = {"meta", "audio", "br", "link"}


class Tone:
    """A vocoder that speaks each unit as a tone of its own."""

    tokenizer_fingerprint = "speech-0"
    sample_rate_hz = 8_000

    def decode(self, units, durations=None):
        frames = np.repeat(units, durations * 80)
        return np.sin(np.arange(len(frames)) * (units[0] + 1) / 20).astype(np.float32) / 2


class Checker(HTMLParser):
    """Checks that tags are closed, and collects what can be seen and followed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], set(), [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def make_store(path, rows=ROWS, **settings):
    return write_store(path, rows, **(TOKENIZERS | settings))


def positions(row):
    return [token for span in row.spans for word in span.words for token in word.tokens]


@pytest.mark.parametrize("task", TASKS)
def test_the_rows_are_those_of_training(tmp_path, task):
    store = make_store(tmp_path / "store")
    mixture = TaskMixture(**(dict.fromkeys(TASKS, 0.0) | {task: 1.0}))
    settings = {"mixture": mixture, "row_tokens": 64, "policy": POLICY, "predict_switch": task == "interleaved"}
    shown = preview(store, tmp_path / "p.html", rows=6, seed=3, text_tokenizer=TOKENIZER, **settings)
    ids = IdSpace(TEXT_VOCAB, NUM_UNITS, end_of_text_id=0)
    source = BatchSource({t: [(store, 1.0)] for t in TASKS}, ids=ids, **settings)
    batch = source.batch(3, 0, rows=6)
    names = source.sample_ids(batch)
    assert [row.task for row in shown] == batch.tasks
    for row, input_ids, labels, drawn in zip(shown, batch.input_ids, batch.labels, names, strict=True):
        found = []
        for span in row.spans:
            for token in [token for word in span.words for token in word.tokens]:
                if span.kind == "control":
                    found.append(getattr(ids, CONTROLS[token.label]))
                elif span.kind == "speech":
                    found.append(int(token.label) + ids.speech_offset)
                else:
                    found.append(TOKENIZER.convert_tokens_to_ids(token.label))
        assert found == input_ids.tolist()
        has_loss = [token.is_target for token in positions(row)]
        assert has_loss == [False, *(labels[1:] != -100).tolist()]
        assert sum(row.num_targets.values()) == sum(has_loss)
        assert sum(row.num_tokens.values()) == 64
        assert set(row.utterance_ids) <= set(drawn)
        assert row.utterance_ids[0] == drawn[0]


def test_each_span_says_which_words_of_which_utterance_it_is(tmp_path):
    store = make_store(tmp_path / "store")
    by_id = {utterance.id: utterance for utterance in ROWS}
    mixture = TaskMixture(interleaved=1, speech=0, text=0)
    for row in preview(store, tmp_path / "p.html", rows=8, row_tokens=96, policy=POLICY, mixture=mixture):
        read = ""
        for span in row.spans:
            if span.kind == "control":
                continue
            texts = by_id[span.utterance_id].text.split()
            if span.kind == "text":
                words = [word.tokens[0].label for word in span.words]
                assert [word.text for word in span.words] == [None] * len(words)
            else:
                words = [word.text for word in span.words]
            read += " ".join(words) + " "
            assert " ".join(words) in " ".join(texts)  # in order, none left out: here every word has units
        order = " ".join(by_id[name].text for name in row.utterance_ids)
        assert read.strip() in order


def test_without_word_times_speech_has_no_words_and_only_possible_tasks_are_drawn(tmp_path):
    halves = ("text", "text_ids", "word_token_counts", "word_ends_s")
    speech = make_store(tmp_path / "speech", [replace(row, **dict.fromkeys(halves)) for row in ROWS])
    shown = preview(speech, tmp_path / "s.html", rows=3, row_tokens=32)
    assert {row.task for row in shown} == {"speech"}
    assert all(word.text is None for row in shown for span in row.spans for word in span.words)
    halves = ("units", "unit_durations", "seconds", "word_ends_s")
    rows = [replace(row, **dict.fromkeys(halves)) for row in ROWS]
    text = make_store(tmp_path / "text", rows, speech_tokenizer=None)
    assert {row.task for row in preview(text, tmp_path / "t.html", rows=3, row_tokens=32)} == {"text"}
    with pytest.raises(ValueError, match="no utterance for speech rows in the split 'train'"):
        preview(text, tmp_path / "u.html", mixture=TaskMixture(interleaved=0, speech=1, text=0))
    with pytest.raises(ValueError, match="in the split 'test'"):
        preview(text, tmp_path / "u.html", split="test")
    assert not (tmp_path / "u.html").exists()


def test_policies_that_read_the_text_are_previewed_too(tmp_path):
    store = make_store(tmp_path / "store", [replace(row, text=row.text.replace(" ", ". ", 2)) for row in ROWS[:3]])
    shown = preview(
        store,
        tmp_path / "p.html",
        rows=4,
        row_tokens=48,
        policy=SentencePolicy(),
        mixture=TaskMixture(speech=0, text=0),
    )
    assert all(row.num_tokens["speech"] and row.num_tokens["text"] for row in shown)


def test_what_texts_and_ids_say_is_shown_and_never_run(tmp_path):
    evil = "<script>alert(1)</script> \"'><img/src=x/onerror=alert(2)> &amp; {{7*7}} \u202egnirts \ud7ff ok"
    count = len(evil.split())
    change = {"text": evil, "text_ids": np.arange(count), "word_token_counts": np.ones(count, int)}
    change |= {"units": np.arange(count) % NUM_UNITS, "unit_durations": np.full(count, 10), "seconds": count / 10}
    change |= {"word_ends_s": np.arange(1, count + 1) / 10, "id": '"><script>alert(3)</script>', "source": "<b>x"}
    store = make_store(tmp_path / "store", [replace(ROWS[0], **change)])
    preview(store, tmp_path / "p.html", rows=4, row_tokens=30, policy=POLICY, audio_folder=tmp_path)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    seen = Checker(page)
    assert not seen.tags & {"script", "img", "b"}
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in seen.text
    assert "{{7*7}}" in seen.text
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


def sounds(path):
    uris = [value for name, value in Checker(path.read_text()).attributes if name == "src"]
    return [soundfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in uris]


def test_a_vocoder_speaks_each_span_of_speech(tmp_path):
    store = make_store(tmp_path / "store")
    shown = preview(store, tmp_path / "p.html", rows=3, row_tokens=64, policy=POLICY, vocoder=Tone())
    spans = [span for row in shown for span in row.spans if span.kind == "speech"]
    played = sounds(tmp_path / "p.html")
    assert len(played) == len(spans) > 0
    for span, (audio, rate_hz) in zip(spans, played, strict=True):
        milliseconds = sum(int(token.title.split()[-2]) for word in span.words for token in word.tokens)
        assert rate_hz == 8_000
        assert len(audio) == milliseconds * 8
        assert span.note == "units, spoken by the vocoder"


def test_recordings_are_cut_at_the_spans(tmp_path):
    rows = [replace(row, source=f"{row.id}.wav") for row in ROWS]
    folder = tmp_path / "audio"
    folder.mkdir()
    rng = np.random.default_rng(0)
    recorded = {}
    for row in rows:
        recorded[row.id] = rng.uniform(-0.5, 0.5, round(row.seconds * 16_000)).astype(np.float32)
        save_wav(folder / row.source, recorded[row.id], 16_000)
    (folder / "u1.wav").unlink()
    save_wav(folder / "u2.wav", np.tile(recorded["u2"], 2), 16_000)
    rows[4] = replace(rows[4], source="../audio2/u4.wav")
    rows[5] = replace(rows[5], source=None)
    store = make_store(tmp_path / "store", rows)
    mixture = TaskMixture(interleaved=1, speech=1, text=0)
    shown = preview(store, tmp_path / "p.html", rows=12, policy=POLICY, audio_folder=folder, mixture=mixture)
    spans = [span for row in shown for span in row.spans if span.kind == "speech"]
    played = iter(sounds(tmp_path / "p.html"))
    notes = {}
    for span in spans:
        notes[span.utterance_id] = span.note
        if span.sound is None:
            continue
        audio, _ = next(played)
        start, end = (round(float(time) * 16_000) for time in re.findall(r"(\d+\.\d\d)", span.note))
        expected = recorded[span.utterance_id][start:end]
        np.testing.assert_allclose(audio[: len(expected)], expected[: len(audio)], atol=1e-3)
        units = sum(int(token.title.split()[-2]) for word in span.words for token in word.tokens)
        assert len(audio) == pytest.approx(units * 16, abs=2)
    assert "cannot be read" in notes["u1"]
    assert "does not say which part of it" in notes["u2"]
    assert "lies outside of the audio folder" in notes["u4"]
    assert "does not name its recording" in notes["u5"]
    assert notes["u0"].startswith("u0.wav, ")


def test_the_sound_of_a_page_is_bounded_and_says_so(tmp_path):
    store = make_store(tmp_path / "store")
    settings = {"rows": 6, "policy": POLICY, "vocoder": Tone()}
    preview(store, tmp_path / "all.html", **settings)
    shown = preview(store, tmp_path / "some.html", **settings, max_audio_bytes=20_000)
    notes = [span.note for row in shown for span in row.spans if span.kind == "speech"]
    assert notes[0] == "units, spoken by the vocoder"
    assert notes[-1].startswith("no sound: the page has")
    assert len((tmp_path / "some.html").read_bytes()) < len((tmp_path / "all.html").read_bytes())


def test_without_recordings_and_vocoder_there_is_no_sound_and_nothing_is_said_of_it(tmp_path):
    shown = preview(make_store(tmp_path / "store"), tmp_path / "p.html", rows=2)
    assert {span.note for row in shown for span in row.spans} == {""}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"row_tokens": 1}, "row_tokens is 1"),
        ({"text_tokenizer": TOKENIZER}, "made with the text tokenizer text-9"),
        (
            {"vocoder": type("Other", (Tone,), {"tokenizer_fingerprint": "speech-1"})()},
            "made with the speech tokenizer",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, settings, message):
    store = make_store(tmp_path / "store", text_tokenizer_fingerprint="text-9")
    with pytest.raises(ValueError, match=message):
        preview(store, tmp_path / "p.html", **settings)
    assert not (tmp_path / "p.html").exists()


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    store = make_store(tmp_path / "store")
    monkeypatch.setattr(Store, "tokens", lambda *_, **__: pytest.fail("a row was drawn"))
    with pytest.raises(ValueError, match=r"lies in .*missing, which is not a folder: give a path in a folder"):
        preview(store, tmp_path / "missing" / "p.html")
    with pytest.raises(ValueError, match="is a folder: give the name of a file"):
        preview(store, tmp_path)


def test_the_command_draws_as_a_recipe_does(tiny_world, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tiny_world, tmp_path / "run")))
    page = tmp_path / "p.html"
    command = ["data", "preview", str(tiny_world / "store"), "--output", str(page), "--rows", "3"]
    assert cli.main([*command, "--recipe", str(path), "--stage", "1"]) == 0
    assert f"{page}: 3 rows" in capsys.readouterr().out
    seen = Checker(page.read_text()).text
    assert "3 interleaved" in seen
    assert "32 tokens a row" in seen
    assert "text_words=(2, 4)" in seen
    assert cli.main([*command, "--text-tokenizer", str(tiny_world / "backbone"), "--row-tokens", "40"]) == 0
    assert "40 tokens a row" in Checker(page.read_text()).text
    capsys.readouterr()
    assert cli.main([*command, "--recipe", str(path), "--stage", "3"]) == 1
    assert "--stage is 3" in capsys.readouterr().err
    assert cli.main([*command, "--stage", "1"]) == 1
    assert "give --recipe too" in capsys.readouterr().err
