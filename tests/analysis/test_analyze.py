"""Models side by side, from folders to the page."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import EARLY_FUSION, SPEECH_CARD, tiny_lm_config, tiny_model, tiny_text_tokenizer, tiny_utterances

from smoltolk import SmolTolkForCausalLM, cli
from smoltolk.analysis.analyze import AnalysisSettings, Subject, analyze_model, compare
from smoltolk.analysis.logit_lens import logit_lens
from smoltolk.analysis.page import MAPS, SECTIONS
from smoltolk.analysis.pieces import draw_pieces, word_ends
from smoltolk.analysis.states import read_states
from smoltolk.data.store import Store, write_store

SETTINGS = AnalysisSettings(
    utterances=24, dimensions=4, probe_words=10, rows=20, row_tokens=64, text_words=(2, 4), speech_words=(2, 4)
)
OPTIONS = ["--utterances", "24", "--dimensions", "4", "--probe-words", "10", "--no-progress"]
OPTIONS += ["--text-words", "2", "4", "--speech-words", "2", "4"]


def save(folder, seed=0, **settings):
    settings = {"lm_config": tiny_lm_config(max_position_embeddings=64, num_hidden_layers=2)} | settings  # quick
    model = tiny_model(seed, speech_tokenizer=SPEECH_CARD, text_tokenizer_fingerprint="text", **settings)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    write_store(
        folder / "store",
        tiny_utterances(tiny_text_tokenizer(), count=120),
        text_tokenizer_fingerprint="text",
        speech_tokenizer=SPEECH_CARD,
    )
    for seed in (0, 1):
        save(folder / "late" / f"seed={seed}" / "model", seed)
        save(folder / "early" / f"seed={seed}" / "model", seed, **EARLY_FUSION)
    return folder


@pytest.fixture(scope="module")
def pieces(world):
    return draw_pieces(Store(world / "store"), 20)


def test_states_are_those_of_each_piece_alone(model, pieces):
    words = word_ends(pieces, 60)
    for is_speech in (True, False):
        states = read_states(model, pieces, words, is_speech=is_speech, batch_size=7)
        for i in (0, 13):
            piece = pieces[i]
            tokens = piece.units + model.ids.speech_offset if is_speech else piece.text_ids
            row = torch.tensor([[model.ids.end_id(is_speech), *tokens]])
            with torch.no_grad():
                levels = torch.stack(model(row, output_hidden_states=True).hidden_states)[:, 0].numpy()
            np.testing.assert_allclose(states.pooled[:, i], levels[:, 1:].mean(1), atol=1e-5)
            ends = piece.unit_ends if is_speech else piece.text_ends
            for n in np.flatnonzero(words.piece == i):
                np.testing.assert_allclose(states.at_words[:, n], levels[:, ends[words.word[n]]], atol=1e-5)


def test_the_lens_at_the_last_level_is_what_the_model_says(model, pieces):
    words = word_ends(pieces, 10_000)
    states = read_states(model, pieces, words, is_speech=False)
    lens = logit_lens(model, states.at_words, words.said)
    piece, n = pieces[3], np.flatnonzero(words.piece == 3)
    row = torch.tensor([[model.ids.end_of_text_id, *piece.text_ids]])
    with torch.no_grad():
        output = model(row, output_hidden_states=True)
        scores = output.logits[0, :, : model.ids.text_vocab_size].log_softmax(-1)[piece.text_ends[words.word[n]]]
        first = model.lm.lm_head(model.body.norm(output.hidden_states[1]))[0, piece.text_ends[words.word[n]]]
    assert lens.best[-1, n].tolist() == scores.argmax(-1).tolist()
    np.testing.assert_allclose(lens.log_probability[-1, n], scores[range(len(n)), words.said[n]], atol=1e-4)
    assert lens.best[1, n].tolist() == first.argmax(-1).tolist()
    assert lens.log_probability.shape == (4, len(words.said))


def test_states_that_are_not_numbers_and_pieces_that_are_too_long_are_refused(model, pieces):
    words = word_ends(pieces, 60)
    model.body.layers[1].mlp.down_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"level 2 is not finite for utterance 'u\d+': the model has diverged"):
        read_states(model, pieces, words, is_speech=True)
    model.config.lm_config.max_position_embeddings = 20
    with pytest.raises(
        ValueError, match=r"has \d+ tokens as speech, more than .* of 20: cut utterances with words_per"
    ):
        read_states(model, pieces, words, is_speech=True)


def test_the_command_compares_seeds_and_goes_on_where_it_was(world, tmp_path, capsys, monkeypatch):
    late, early = ([f"{name}={world / name}/seed={seed}/model" for seed in (0, 1)] for name in ("late", "early"))
    page = tmp_path / "page.html"
    command = ["analyze", *late, *early, "--store", str(world / "store"), "--output", str(page), *OPTIONS]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == str(page)
    written = page.read_text()
    assert written.count("data:image/png;base64,") == len(SECTIONS) + len(MAPS)
    assert "early − late" in written
    found = json.loads((tmp_path / "page.json").read_bytes())
    assert set(found["means"]["late"]) == {quantity for quantities in SECTIONS.values() for quantity in quantities}
    assert found["means"]["early"]["selector"]["value"] == [0, 1]
    for quantity, mean in found["means"]["late"].items():
        assert mean["num_seeds"] == 2
        one, other = (np.array(m["curves"][quantity]["value"], float) for m in found["models"]["late"])
        np.testing.assert_allclose(np.array(mean["value"], float), (one + other) / 2)
        np.testing.assert_allclose(np.array(mean["standard_error"], float), abs(one - other) / 2, atol=1e-12)
    assert list(found["differences"]["early"]) == list(found["means"]["early"])
    assert found["differences"]["late"] == {}

    monkeypatch.setattr(SmolTolkForCausalLM, "from_pretrained", None)  # nothing is computed again
    subjects = [Subject.parse(model, world / "store") for model in (*late, *early)]
    settings = replace(SETTINGS, rows=AnalysisSettings.rows, row_tokens=AnalysisSettings.row_tokens)
    again = compare(subjects, settings, tmp_path / "page.models", progress=False)
    assert json.loads(json.dumps(again.to_json())) == found


def test_results_depend_on_nothing_but_model_store_and_settings(world, tmp_path):
    subject = Subject("late", world / "late/seed=0/model", world / "store")
    settings = replace(SETTINGS, words_per_piece=3)
    one = analyze_model(subject, settings).to_json()
    assert one == analyze_model(subject, settings).to_json()
    assert one["counts"]["pieces"] > one["counts"]["utterances"] == 24


def test_models_are_named_and_have_stores_of_their_own(world):
    folder, other = world / "late/seed=0/model", world / "late/seed=1/model"
    store = world / "store"
    assert Subject.parse(f"a={folder}", store) == Subject("a", folder, store)
    assert Subject.parse(str(folder), store) == Subject("seed=0", folder, store)  # the = is the folder's own
    assert Subject.parse(f"{other}@there", store).store.name == "there"
    assert Subject.parse(f"a={other}@there", None) == Subject("a", other, type(store)("there"))
    with pytest.raises(ValueError, match="names no store: give --store for all models"):
        Subject.parse(str(folder), None)
    with pytest.raises(ValueError, match=r"nowhere holds no model \(no config.json\)"):
        Subject.parse("nowhere", store)


def test_what_does_not_fit_together_is_refused(world, tmp_path):
    folder, store = world / "late/seed=0/model", world / "store"
    subject = Subject("late", folder, store)
    with pytest.raises(ValueError, match="is given twice"):
        compare([subject, subject], SETTINGS, tmp_path)
    with pytest.raises(ValueError, match=r"is not a store \(no manifest.json\)"):
        compare([Subject("late", folder, tmp_path / "none")], SETTINGS, tmp_path, progress=False)
    other = tmp_path / "other"
    tiny_model(speech_tokenizer=SPEECH_CARD | {"fingerprint": "speech-1"}).save_pretrained(other)
    with pytest.raises(ValueError, match=r"do not fit together: .* speech tokenizer speech-0, speech-1 is needed"):
        analyze_model(Subject("other", other, store), SETTINGS)
    tiny_model(text_tokenizer_fingerprint="another").save_pretrained(other)
    with pytest.raises(ValueError, match=r"do not fit together: .* text tokenizer text, another is needed"):
        analyze_model(Subject("other", other, store), SETTINGS)
    narrow = tiny_lm_config(hidden_size=4)
    tiny_model(lm_config=narrow).save_pretrained(other)
    with pytest.raises(ValueError, match=r"dimensions is 4, but the levels of .* have 4: give fewer"):
        analyze_model(Subject("other", other, store), SETTINGS)
    shallow = save(tmp_path / "shallow", lm_config=tiny_lm_config(num_hidden_layers=1))
    with pytest.raises(ValueError, match="of the name 'late' have 2 and 3 levels and are no seeds of one variant"):
        compare([subject, Subject("late", shallow, store)], SETTINGS, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("utterances", 19, "utterances is 19: give 20 or more"),
        ("words_per_piece", 0, "words_per_piece is 0"),
        ("max_words", 5, "max_words is 5"),
        ("dimensions", 22, "dimensions is 22: give 1 to 21 with 24 utterances"),
        ("probe_words", 1, "probe_words is 1"),
        ("rows", 30, "rows is 30: give a multiple of 20"),
        ("row_tokens", 1, "row_tokens is 1"),
        ("text_words", (3, 2), r"text_words is \(3, 2\)"),
    ],
)
def test_settings_out_of_range_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **{field: value})
