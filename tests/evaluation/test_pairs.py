"""Tasks of pairs: averages by hand, chunks that are resumed, results byte for byte."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.conftest import NUM_UNITS, TEXT_VOCAB, tiny_lm_config, tiny_model

from smoltolk.evaluation import pairs
from smoltolk.evaluation.pairs import PairItem, PairTask, score_task
from smoltolk.evaluation.protocols import AUTHORS, CONTINUATION, SALMON, Candidate
from smoltolk.evaluation.results import Average, TaskResult, bootstrap, load_result, read_result
from smoltolk.evaluation.scoring import ScoringSettings

NOTHING = np.zeros(0, dtype=np.int64)
AVERAGES = (Average("sWUGGY", "all", over=("id",)), Average("sWUGGY", "in-vocab", {"vocabulary": "in"}, ("id",)))


def words(ids, count=10, seed=0):
    """Promptless pairs of units, two voices of each id."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        for voice in "AB":
            both = [
                Candidate(NOTHING, rng.integers(NUM_UNITS, size=rng.integers(3, 9)) + ids.speech_offset) for _ in "+-"
            ]
            yield PairItem(str(i), *both, {"voice": voice, "vocabulary": "in" if i % 2 else "out"}, couple=str(i))


def word_task(model, **settings):
    return PairTask("swuggy", words(model.ids, **settings), AVERAGES, split="dev")


def result_of(positive, negative, averages=(), tie_credit=0.5, **labels):
    table = pa.table(
        {**labels, "positive_score": np.array(positive, float), "negative_score": np.array(negative, float)}
    )
    for name in ("id", "couple"):
        if name not in table.column_names:
            table = table.append_column(name, pa.array([str(i) for i in range(len(table))]))
    protocol = CONTINUATION if tie_credit == 0.5 else AUTHORS.for_task(is_cloze=True)
    return TaskResult("made", None, protocol, "float32", False, 0, "i", "t", tuple(averages), table)


def test_accuracy_counts_wins_ties_and_losses():
    positive, negative = [-1.0, -2.0, -3.0, -1.0], [-2.0, -2.0, -1.0, -4.0]
    kinds = ["story", "story", "topic", "topic"]
    result = result_of(positive, negative, kind=kinds, couple=["1", "1", "2", "2"])
    accuracy = result.accuracy()
    assert (accuracy.n, accuracy.accuracy, accuracy.num_ties) == (4, 0.625, 1)
    assert accuracy.standard_error == pytest.approx((0.625 * 0.375 / 4) ** 0.5)
    assert result.accuracy(kind="story").accuracy == 0.75
    assert result.accuracy(kind="topic").accuracy == 0.5
    assert result_of(positive, negative, tie_credit=0.0).accuracy().accuracy == 0.5


def test_averages_are_means_of_means():
    # Type a: id 1 with credits 1, 0 and id 2 with 1. Type b: id 3 with 0, 0, 1.
    labels = {"type": list("aaabbb"), "id": list("112333")}
    result = result_of([1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0], **labels)
    plain, by_id, by_type = (result.accuracy(Average("g", "n", over=over)) for over in ((), ("id",), ("type", "id")))
    assert (plain.accuracy, plain.n) == (0.5, 6)
    assert by_id.accuracy == pytest.approx((0.5 + 1 + 1 / 3) / 3)
    assert by_type.accuracy == pytest.approx(((0.5 + 1) / 2 + 1 / 3) / 2)
    assert (by_type.n, by_type.num_items) == (3, 6)
    of_type = result.accuracy(Average("g", "n", {"type": "a"}, ("id",)))
    assert (of_type.accuracy, of_type.n, of_type.num_items) == (0.75, 2, 3)


def test_averages_of_what_is_not_there_are_refused():
    result = result_of([1], [0], type=["a"])
    with pytest.raises(ValueError, match="the average g n needs voice, which items do not have"):
        result.accuracy(Average("g", "n", over=("voice",)))
    with pytest.raises(ValueError, match=r"the average g n has no items: \{'type': 'b'\}"):
        result.accuracy(Average("g", "n", {"type": "b"}))


def test_the_bootstrap_keeps_couples_together():
    values = np.tile([0.0, 1.0], 50)  # every couple has exactly one right answer
    assert bootstrap(values, [str(i // 2) for i in range(100)]) == (0.5, 0.5)
    low, high = bootstrap(values, [str(i) for i in range(100)])
    assert 0.35 < low < 0.45
    assert 0.55 < high < 0.65


def test_the_bootstrap_weighs_items():
    values, weights = np.array([1.0, 0.0] * 20), np.array([3.0, 1.0] * 20)
    assert bootstrap(values, [str(i // 2) for i in range(40)], weights=weights) == (0.75, 0.75)


def test_a_result_says_all_that_makes_it_and_is_the_same_byte_for_byte(model, tmp_path):
    for name in "ab":
        settings = ScoringSettings(chunk_items=6)
        folder = tmp_path / name
        result = score_task(
            model, word_task(model), protocol=AUTHORS, settings=settings, folder=folder, checkpoint="abc"
        )
        result.save(folder, items="gold.csv", checkpoint="abc")
        assert sorted(path.name for path in folder.iterdir()) == ["items.parquet", "result.json"]
    for name in ("items.parquet", "result.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = json.loads((tmp_path / "a" / "result.json").read_text())
    assert (record["task"], record["split"], record["protocol"]) == ("swuggy", "dev", "authors")
    assert record["knobs"] == AUTHORS.for_task(is_cloze=False).knobs()
    assert record["knobs"]["tie_credit"] == 0.5
    assert (record["num_items"], record["precision"], record["checkpoint"]) == (20, "float32", "abc")
    assert record["accuracy"]["sWUGGY"]["all"]["n"] == 10
    stored = load_result(tmp_path / "a")
    in_vocab = stored.table.filter(pa.array([label == "in" for label in stored.table["vocabulary"].to_pylist()]))
    assert record["accuracy"]["sWUGGY"]["in-vocab"]["accuracy"] == pytest.approx(np.mean(in_vocab["credit"]))
    assert stored.averages == AVERAGES


def test_scoring_that_was_stopped_goes_on_where_it_was(model, tmp_path, monkeypatch):
    whole = score_task(model, word_task(model), protocol=SALMON, settings=ScoringSettings(chunk_items=4))
    kept = {"protocol": SALMON, "settings": ScoringSettings(chunk_items=4), "folder": tmp_path, "checkpoint": "abc"}
    scored = []
    score = pairs.score_candidates

    def stopping(model, candidates, *arguments):
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(len(candidates))
        return score(model, candidates, *arguments)

    monkeypatch.setattr(pairs, "score_candidates", stopping)
    with pytest.raises(KeyboardInterrupt):
        score_task(model, word_task(model), **kept)
    assert len(list((tmp_path / "chunks").glob("*.parquet"))) == 3
    del scored[:2]  # so that two chunks can be scored, which are all that is left
    done = []
    result = score_task(model, word_task(model), **kept, progress=done.append)
    assert len(scored) == 3
    assert sum(done) == 40
    assert result.table.equals(whole.table)
    assert (result.items_fingerprint, result.tokens_fingerprint) == (whole.items_fingerprint, whole.tokens_fingerprint)


def test_kept_scores_of_something_else_are_refused(model, tmp_path):
    kept = {"folder": tmp_path, "checkpoint": "abc", "protocol": SALMON}
    score_task(model, word_task(model), **kept)
    for change, message in (
        ({"checkpoint": "def"}, "scores with checkpoint 'abc', not 'def'"),
        ({"protocol": AUTHORS}, "scores with protocol 'salmon', not 'authors'"),
        ({"settings": ScoringSettings(batch_size=3)}, "scores with batch_size 48, not 3"),
        ({"settings": ScoringSettings(max_batch_tokens=99)}, "scores with max_batch_tokens 16384, not 99"),
        ({"settings": ScoringSettings(autocast=True)}, "scores with precision 'float32', not 'float32, autocast"),
    ):
        with pytest.raises(ValueError, match=message):
            score_task(model, word_task(model), **kept | change)
    with pytest.raises(ValueError, match="holds scores of other items"):
        score_task(model, word_task(model, seed=1), **kept)
    (tmp_path / "chunks" / "000000.parquet").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"000000\.parquet cannot be read: remove it"):
        score_task(model, word_task(model), **kept)
    with pytest.raises(ValueError, match="checkpoint is None"):
        score_task(model, word_task(model), folder=tmp_path)


def test_a_finished_result_is_not_written_over_by_another(model, tmp_path):
    kept = {"protocol": SALMON, "folder": tmp_path, "checkpoint": "abc"}
    path = score_task(model, word_task(model), **kept).save(tmp_path, items="i", checkpoint="abc")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds the result with checkpoint 'abc', not 'def'"):
        score_task(model, word_task(model), **kept | {"checkpoint": "def"})
    with pytest.raises(ValueError, match="holds the result with items_fingerprint"):
        score_task(model, word_task(model, seed=1), **kept).save(tmp_path, items="i", checkpoint="abc")
    assert path.read_bytes() == before


def test_items_are_made_a_chunk_at_a_time(model, monkeypatch):
    made, seen = [], []

    def items():
        for item in words(model.ids):
            made.append(item.id)
            yield item

    score = pairs.score_candidates
    monkeypatch.setattr(pairs, "score_candidates", lambda *a: seen.append(len(made)) or score(*a))
    score_task(model, PairTask("swuggy", items(), AVERAGES), protocol=AUTHORS, settings=ScoringSettings(chunk_items=5))
    assert seen == [5, 10, 15, 20]


def test_identical_sequences_tie():
    model = tiny_model()
    same = np.array([1, 2, 3])
    item = PairItem("a", Candidate(NOTHING, same), Candidate(NOTHING, same.copy()))
    for protocol, is_cloze, credit in ((AUTHORS, True, 0.0), (AUTHORS, False, 0.5)):
        result = score_task(model, PairTask("t", [item], [], is_cloze=is_cloze), protocol=protocol)
        accuracy = result.accuracy()
        assert (accuracy.accuracy, accuracy.num_ties) == (credit, 1)


def pair(prompt, positive, negative, **settings):
    parts = [np.array(part, dtype=np.int64) for part in (prompt, positive, negative)]
    return PairItem("long", Candidate(parts[0], parts[1]), Candidate(parts[0], parts[2]), **settings)


def test_prompts_are_cut_only_when_asked_for_and_counted(tmp_path):
    model = tiny_model(lm_config=tiny_lm_config(max_position_embeddings=12))
    items = [pair(range(1, 10), [1, 2, 3, 4], [5, 6]), pair([1, 2], [3, 4], [5, 6])]
    task = PairTask("t", items, [])
    with pytest.raises(ValueError, match=r"item long has 13 tokens, more than the model's 12 positions.*--truncate"):
        score_task(model, task)
    cuts = ScoringSettings(truncates_prompts=True)
    result = score_task(model, task, settings=cuts)
    assert result.num_truncated == 1
    shorter = score_task(model, PairTask("t", [pair(range(2, 10), [1, 2, 3, 4], [5, 6])], []))
    cut, expected = (found.table["negative_score"][0].as_py() for found in (result, shorter))
    assert cut == pytest.approx(expected, abs=1e-5)
    record = json.loads(result.save(tmp_path, items="i", checkpoint="c").read_text())
    assert (record["truncates_prompts"], record["num_truncated"]) == (True, 1)
    with pytest.raises(ValueError, match=r"item long has 15 tokens.* and a prompt of 2 to cut from"):
        score_task(model, PairTask("t", [pair([1, 2], range(1, 14), [5])], []), settings=cuts)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (pair([1, 2], [], [3]), "item long: the continuation is empty"),
        (pair([], [1, 2], [3, 4]), "item long: nothing comes before the first token"),
        (pair([1], [TEXT_VOCAB + 3 + NUM_UNITS], [3]), "20 units are 0 … 72: it was made with another tokenizer"),
        (pair([1], [2], [-3]), "item long has the ids -3 … 1"),
        (pair([1], [2], [3], labels={"credit": "1"}), "item long has the label credit, which is a column of results"),
    ],
)
def test_items_that_cannot_be_scored_are_named(model, item, message):
    with pytest.raises(ValueError, match=message):
        score_task(model, PairTask("t", [item], []))


def test_sets_that_cannot_be_scored_are_refused(model):
    with pytest.raises(ValueError, match="the task t holds no items"):
        score_task(model, PairTask("t", [], []))
    items = [pair([1], [2], [3], labels={"a": "x"}), pair([1], [2], [3], labels={"b": "x"})]
    with pytest.raises(ValueError, match="item long has other labels than item long"):
        score_task(model, PairTask("t", items, []))


def test_units_that_a_model_does_not_know_are_refused():
    model = tiny_model()
    other = model.ids.speech_offset + NUM_UNITS + 4
    with pytest.raises(
        ValueError, match="it was made with another tokenizer, or the model does not know this modality"
    ):
        score_task(model, PairTask("t", [pair([1], [other], [other])], []))


def test_results_that_cannot_be_read_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"result\.json cannot be read"):
        load_result(tmp_path)
    path = score_task(model, word_task(model), protocol=SALMON).save(tmp_path, items="i", checkpoint="c")
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"num_items": 3}))
    with pytest.raises(ValueError, match=r"holds 20 items, but result\.json says 3"):
        load_result(tmp_path)
    for lacking in ("knobs", "checkpoint", "precision"):
        path.write_text(json.dumps({key: value for key, value in record.items() if key != lacking}))
        with pytest.raises(ValueError, match=f"lacks {lacking}: evaluate the model again"):
            load_result(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds no table of keys"):
        read_result(path, "c")
    path.write_text(json.dumps(record))
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "items.parquet")
    with pytest.raises(ValueError, match="lacks the column couple"):
        load_result(tmp_path)
    (tmp_path / "items.parquet").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"items\.parquet cannot be read"):
        load_result(tmp_path)
