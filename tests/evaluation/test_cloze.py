"""Cloze items, and their task in all modality pairs."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.conftest import NUM_UNITS, SPEECH_CARD, TEXT_VOCAB, tiny_lm_config, tiny_model, tiny_text_tokenizer

from smoltolk import cli
from smoltolk.evaluation import pairs
from smoltolk.evaluation.protocols import AUTHORS_CROSS_MODAL
from smoltolk.evaluation.tasks import PAIRS, ClozeItem, cloze_task, evaluate_cloze, load_cloze, save_cloze
from smoltolk.model.fingerprint import checkpoint_fingerprint
from smoltolk.speech.audio import AudioError, save_wav
from smoltolk.speech.units import Units


def encode_text(text):
    return [int(word) for word in text.split()]


def items(count=6, seed=0):
    rng = np.random.default_rng(seed)

    def text():
        return " ".join(map(str, rng.integers(TEXT_VOCAB, size=rng.integers(2, 9))))

    def units():
        return rng.integers(NUM_UNITS, size=rng.integers(3, 15))

    return [
        ClozeItem(
            f"i{i}", "story" if i % 2 else "topic", f"c{i // 2}", text(), text(), text(), units(), units(), units()
        )
        for i in range(count)
    ]


def test_a_result_is_written_with_protocol_checkpoint_and_every_item(model, tmp_path):
    chosen = items()
    result = evaluate_cloze(model, chosen, encode_text, protocol=AUTHORS_CROSS_MODAL)
    path = result.save(tmp_path, items="x.parquet", checkpoint="abc")
    record = json.loads(path.read_text())
    assert (record["protocol"], record["checkpoint"]) == ("authors-cross-modal", "abc")
    table = pq.read_table(tmp_path / "items.parquet").to_pydict()
    for pair in PAIRS:
        for kind in ("story", "topic"):
            credit = [
                c
                for c, p, k in zip(table["credit"], table["pair"], table["kind"], strict=True)
                if (p, k) == (pair, kind)
            ]
            assert record["accuracy"][pair][kind]["n"] == len(credit) == 3
            assert record["accuracy"][pair][kind]["accuracy"] == pytest.approx(np.mean(credit))


def test_all_pairs_of_an_item_share_its_two_prompts(model, monkeypatch):
    rng = np.random.default_rng(0)
    texts, units = (
        [" ".join(map(str, rng.integers(1, TEXT_VOCAB, 20))) for _ in "ptf"],
        rng.integers(NUM_UNITS, size=20),
    )
    item = ClozeItem("a", "story", "a", *texts, units, units[:5], units[5:9])
    rows = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *a, **k: rows.append(tuple(ids.shape)) or forward(ids, *a, **k))
    evaluate_cloze(model, [item], encode_text)
    assert rows == [(2, 20), (8, 22)]  # two prompts; eight endings after their last token and a switch


def test_text_before_speech_prompts_is_in_s_to_t_alone_and_the_same_for_both_endings(model):
    some = items()
    protocol = replace(AUTHORS_CROSS_MODAL, num_prefix_tokens=3)
    plain = list(cloze_task(model, some, encode_text).items)
    changed = list(cloze_task(model, some, encode_text, protocol=protocol).items)
    for before, after in zip(plain, changed, strict=True):
        for ours, theirs in ((after.positive, before.positive), (after.negative, before.negative)):
            added = len(ours.prompt) - len(theirs.prompt)
            assert added == (3 if before.labels["pair"] == "S→T" else 0)
            np.testing.assert_array_equal(ours.prompt[added:], theirs.prompt)
            np.testing.assert_array_equal(ours.continuation, theirs.continuation)
        np.testing.assert_array_equal(after.positive.prompt, after.negative.prompt)
        if before.labels["pair"] == "S→T":
            assert after.positive.prompt[2] == model.ids.end_of_text_id
            endings = [text for item in some if item.id != before.id for text in (item.true_text, item.false_text)]
            assert any(encode_text(text)[-2:] == after.positive.prompt[:2].tolist() for text in endings)
    seeds = [
        [item.positive.prompt.tolist() for item in cloze_task(model, some, encode_text, protocol=p).items]
        for p in (protocol, protocol, replace(protocol, prefix_seed=1))
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    with pytest.raises(ValueError, match="there is only one"):
        list(cloze_task(model, some[:1], encode_text, protocol=protocol).items)


def test_the_prefix_and_its_seed_are_in_the_result(model, tmp_path):
    protocol = replace(AUTHORS_CROSS_MODAL, num_prefix_tokens=10, prefix_seed=4)
    result = evaluate_cloze(model, items(), encode_text, protocol=protocol)
    record = json.loads(result.save(tmp_path, items="i", checkpoint="c").read_text())
    assert (record["knobs"]["num_prefix_tokens"], record["knobs"]["prefix_seed"]) == (10, 4)


@pytest.mark.parametrize("part", ["prompt_text", "true_text"])
def test_an_empty_text_is_named(model, part):
    some = items()
    some[1] = replace(some[1], **{part: ""})
    with pytest.raises(ValueError, match=r"item i1: its prompt or (true|false) ending is empty in T→T"):
        evaluate_cloze(model, some, encode_text, pairs=["T→T"])


def test_items_are_the_same_whatever_the_tokenizer(model):
    plain = evaluate_cloze(model, items(), encode_text)
    other = evaluate_cloze(model, items(), lambda text: [1, *encode_text(text)])
    changed = evaluate_cloze(model, items(seed=1), encode_text)
    assert plain.items_fingerprint == other.items_fingerprint != changed.items_fingerprint
    assert plain.tokens_fingerprint != other.tokens_fingerprint


def test_a_model_that_does_not_know_the_units_is_refused():
    model = tiny_model()
    item = ClozeItem("a", "story", "a", "1", "2", "3", *[np.array([NUM_UNITS + 5])] * 3)
    with pytest.raises(ValueError, match=r"item a \(S→S, story\) has the ids .* does not know this modality"):
        evaluate_cloze(model, [item], encode_text, pairs=["S→S"])


def test_items_round_trip_through_parquet(tmp_path):
    path = tmp_path / "items.parquet"
    save_cloze(path, items(), "speech-0")
    for before, after in zip(items(), load_cloze(path), strict=True):
        assert before.id == after.id
        assert before.true_text == after.true_text
        assert list(before.prompt_units) == list(after.prompt_units)


class FakeTokenizer:
    fingerprint = SPEECH_CARD["fingerprint"]
    sample_rate_hz = 16000


def test_units_of_another_tokenizer_are_refused(tmp_path):
    save_cloze(tmp_path / "items.parquet", items(), "speech-1")
    with pytest.raises(ValueError, match=r"units of the tokenizer speech-1, but the model's is speech-0"):
        load_cloze(tmp_path / "items.parquet", FakeTokenizer())


def test_a_manifest_may_hold_text_alone(tmp_path, model):
    path = tmp_path / "items.jsonl"
    rows = [{"id": str(i), "prompt_text": "1 2", "true_text": "3 4", "false_text": "5 6"} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_cloze(path)
    assert list(evaluate_cloze(model, loaded, encode_text).summary()) == ["T→T"]
    with pytest.raises(ValueError, match="3 items lack text or units for S→T: 0, 1, 2"):
        evaluate_cloze(model, loaded, encode_text, pairs=["S→T"])


def test_a_silent_recording_in_a_manifest_is_named(tmp_path):
    save_wav(tmp_path / "quiet.wav", np.zeros(16000, np.float32), 16000)
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt_audio": "quiet.wav"}))
    with pytest.raises(AudioError, match=r"quiet\.wav is silent"):
        load_cloze(path, FakeTokenizer())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no items"),
        ('{"prompt_text": "1"}', "row 1: the column id is missing"),
        ('{"id": "a"}\n{"id": "a"}', "holds an id twice"),
        ('{"id": "a", "prompt_audio": "a.wav"}', "name audio, but the model has no speech tokenizer"),
    ],
)
def test_items_that_cannot_be_used_are_refused(tmp_path, content, message):
    path = tmp_path / "items.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_cloze(path)


def test_ids_of_text_take_the_place_of_texts_and_have_no_place_in_files(tmp_path, model):
    given = items(count=2)
    ids = {part: np.array(encode_text(getattr(given[0], f"{part}_text"))) for part in ("prompt", "true", "false")}
    same = replace(given[0], prompt_text=None, true_text="1", text_ids=ids)
    assert same.has("S→T")
    plain, other = (list(cloze_task(model, [item, given[1]], encode_text).items) for item in (given[0], same))
    for before, after in zip(plain, other, strict=True):
        np.testing.assert_array_equal(before.positive.prompt, after.positive.prompt)
        np.testing.assert_array_equal(before.positive.continuation, after.positive.continuation)
    with pytest.raises(ValueError, match="item i0 has text_ids"):
        save_cloze(tmp_path / "items.parquet", [same], None)


def test_a_manifest_says_how_much_audio_is_tokenized(tmp_path):
    class Encoder(FakeTokenizer):
        def encode(self, audio):
            return Units(np.arange(2), np.ones(2, dtype=int))

    for name in "ab":
        save_wav(tmp_path / f"{name}.wav", np.sin(np.arange(8000)).astype(np.float32), 16000)
    (tmp_path / "items.jsonl").write_text(json.dumps({"id": "1", "prompt_audio": "a.wav", "true_audio": "b.wav"}))
    counts = []
    (item,) = load_cloze(tmp_path / "items.jsonl", Encoder(), tokenized=counts.append)
    assert counts == [1, 1]
    assert item.true_units.tolist() == [0, 1]


def test_a_missing_file_and_an_unknown_pair_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="is not a file"):
        load_cloze(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="pair is 'T→X'"):
        evaluate_cloze(model, items(), encode_text, pairs=["T→X"])


def test_an_item_longer_than_the_models_positions_is_refused_not_cut():
    model = tiny_model(lm_config=tiny_lm_config(max_position_embeddings=12))
    item = ClozeItem("long", "story", "c", "1 " * 10, "2 3 4", "5 6 7")
    with pytest.raises(ValueError, match=r"item long \(T→T, story\) has 13 tokens, more than the model's 12 positions"):
        evaluate_cloze(model, [item], encode_text)


def test_the_checkpoint_fingerprint_changes_with_the_weights(tmp_path):
    tiny_model(seed=0).save_pretrained(tmp_path / "a")
    tiny_model(seed=0).save_pretrained(tmp_path / "b")
    tiny_model(seed=1).save_pretrained(tmp_path / "c")
    a, b, c = (checkpoint_fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c


def test_the_command_line_goes_on_where_it_was_stopped_and_guards_what_is_there(tmp_path, capsys, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_text_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": str(i), "prompt_text": "w1 w2", "true_text": f"w{i}", "false_text": "w5 w6"} for i in range(3)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "scores"
    command = ["evaluate", *(str(tmp_path / name) for name in ("model", "items.jsonl")), "--output", str(output)]

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "score_candidates", stop)
        assert cli.main(command) == 130
    assert "run the same command to go on" in capsys.readouterr().err
    assert cli.main([*command, "--protocol", "authors"]) == 1
    assert "scores with protocol 'continuation-mean', not 'authors'" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert str(output / "result.json") in capsys.readouterr().out
    before = (output / "result.json").read_bytes()
    assert cli.main(command) == 0
    assert (output / "result.json").read_bytes() == before
    capsys.readouterr()
    assert cli.main([*command, "--pairs", "S-T"]) == 1
    assert "3 items lack text or units for S→T" in capsys.readouterr().err
    assert cli.main([*command, "--autocast"]) == 1
    assert "holds the result with precision 'float32'" in capsys.readouterr().err
    command[-1] = str(tmp_path / "more")
    assert cli.main([*command, "--prefix-tokens", "-1"]) == 1
    assert "num_prefix_tokens is -1" in capsys.readouterr().err
