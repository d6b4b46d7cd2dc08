"""Paired differences and published numbers."""

import json

import numpy as np
import pytest
from scipy import stats
from tests.evaluation.test_pairs import result_of

from smoltolk import cli
from smoltolk.evaluation.comparison import compare, paired_test
from smoltolk.evaluation.leaderboard import UNKNOWN, make_leaderboard, published
from smoltolk.evaluation.results import Average

ALL = (Average("S→S", "story"),)


def save(folder, right, changes=None, averages=ALL, checkpoint="c" * 64, **labels):
    """A result with these right and wrong answers."""
    right = np.array(right, float)
    result_of(right, 0.5 + 0 * right, averages, **labels).save(folder, items="i", checkpoint=checkpoint)
    if changes:
        path = folder / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_the_difference_of_paired_answers_has_an_interval_and_an_exact_p_value(tmp_path):
    ours, theirs = [1] * 12 + [0] * 8, [0] * 9 + [1] * 4 + [0] * 7
    comparison = compare(save(tmp_path / "a", ours), save(tmp_path / "b", theirs))
    (found,) = comparison.differences
    assert (found.ours, found.theirs, found.mean) == (0.6, 0.2, pytest.approx(0.4))
    assert (found.num_items, found.num_couples, found.test) == (20, 20, "sign")
    assert found.p_value == pytest.approx(stats.binomtest(9, 10).pvalue)  # McNemar's: 9 against 1 discordant pairs
    assert 0 < found.low < 0.4 < found.high < 0.8
    assert comparison.notes == []
    (same,) = compare(tmp_path / "a", tmp_path / "a").differences
    assert (same.mean, same.p_value) == (0, 1)


def test_couples_are_the_unit_of_the_test():
    assert paired_test(np.array([1.0] * 6)) == (2 * 0.5**6, "sign")
    p_value, test = paired_test(np.array([1.0, 2.0, 3.0]))
    assert (p_value, test) == (0.25, "permutation")  # 2 of 8 signs are as extreme
    p_value, test = paired_test(np.random.default_rng(0).normal(0, 1, 500))
    assert test == "permutation"
    assert 0.05 < p_value < 1


def test_four_voices_of_one_word_are_one_observation(tmp_path):
    couple = [str(i // 4) for i in range(20)]
    ours = save(tmp_path / "a", [1] * 20, couple=couple)
    (found,) = compare(ours, save(tmp_path / "b", [0] * 20, couple=couple)).differences
    assert (found.num_items, found.num_couples) == (20, 5)
    assert found.p_value == pytest.approx(2 * 0.5**5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "swuggy"}, "different tasks: task is 'made' in one and 'swuggy' in the other"),
        ({"split": "test"}, "different tasks: split is None in one and 'test' in the other"),
        ({"knobs": {"length_norm": "sum"}}, "different protocols: span is 'continuation' in one and None"),
        ({"truncates_prompts": True}, "different protocols: truncates_prompts is False in one and True"),
        ({"items_fingerprint": "j"}, "hold different items"),
    ],
)
def test_results_that_are_not_alike_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compare(save(tmp_path / "a", [1, 0]), save(tmp_path / "b", [1, 1], changes))


def test_the_knob_that_differs_is_named(tmp_path):
    a = save(tmp_path / "a", [1, 0])
    knobs = json.loads((a / "result.json").read_text())["knobs"]
    with pytest.raises(ValueError, match="length_norm is 'mean' in one and 'sum' in the other"):
        compare(a, save(tmp_path / "b", [1, 1], {"knobs": knobs | {"length_norm": "sum"}}))


def test_items_in_another_order_or_with_other_ids_are_refused(tmp_path):
    a = save(tmp_path / "a", [1, 0], id=["x", "y"])
    with pytest.raises(ValueError, match="hold different items"):
        compare(a, save(tmp_path / "b", [1, 1], id=["y", "x"]))


def test_what_else_differs_is_noted(tmp_path):
    changes = {"precision": "bfloat16", "tokens_fingerprint": "u", "num_truncated": 3}
    notes = compare(save(tmp_path / "a", [1, 0]), save(tmp_path / "b", [1, 1], changes)).notes
    assert notes[0] == "precision differs: float32 and bfloat16"
    assert notes[1] == "the models read the items as different tokens"
    assert notes[2] == f"{tmp_path / 'b'}: 3 prompts were cut"


def test_published_numbers_have_all_columns_and_none_is_made_up():
    columns, rows = published()
    by_model = {row.model: row for row in rows}
    assert columns[:4] == ["sWUGGY", "sBLIMP", "sSC", "tSC"]
    assert by_model["SpiRit-LM Base"].scores["S→T tSC"] == "88.6"
    assert by_model["SpiRit-LM Base"].source == "arXiv 2402.05755"
    assert by_model["SmolTolk (best row)"].scores["sWUGGY"] == UNKNOWN
    assert all(set(row.scores) == set(columns) for row in rows)


def test_results_stand_beside_published_numbers_in_their_columns(tmp_path):
    averages = (Average("sBLIMP", "micro", anchor="sBLIMP"), Average("sBLIMP", "macro"))
    a = save(tmp_path / "a", [1, 1, 1, 0], averages=averages)
    b = save(tmp_path / "b", [1, 0], averages=(Average("tSC", "all", anchor="tSC"),))
    board = make_leaderboard([a, b])
    ours = board.rows[-1]
    assert ours.scores == {"sBLIMP": "75.0 ± 21.7", "tSC": "50.0 ± 35.4"}
    assert ours.protocol == "continuation-mean, float32"
    assert [row[1:4] for row in board.others] == [("made", "sBLIMP", "macro")]
    with pytest.raises(ValueError, match="both are of one checkpoint and protocol"):
        make_leaderboard([b, save(tmp_path / "c", [1, 1], averages=(Average("tSC", "all", anchor="tSC"),))])
    other = save(tmp_path / "d", [1, 1], averages=averages, checkpoint="d" * 64)
    assert len(make_leaderboard([a, other]).rows) == len(board.rows) + 1


def test_both_commands_print_and_say_what_is_wrong_in_one_line(tmp_path, capsys):
    a, b = save(tmp_path / "a", [1] * 9 + [0]), save(tmp_path / "b", [0] * 9 + [0])
    assert cli.main(["compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "+90.0" in printed
    assert "0.0039" in printed
    assert cli.main(["leaderboard", str(a)]) == 0
    printed = capsys.readouterr().out
    assert "arXiv 2402.05755" in printed
    assert "90.0 ± 9.5" in printed
    bracketed = save(tmp_path / "c", [1, 0], averages=(Average("[a] pairs", "[red]s"),))
    for command in (["compare", str(bracketed), str(bracketed)], ["leaderboard", str(bracketed)]):
        assert cli.main(command) == 0
        printed = capsys.readouterr().out
        assert "[a] pairs" in printed
        assert "[red]s" in printed
    assert cli.main(["compare", str(a), str(tmp_path / "none")]) == 1
    assert "result.json cannot be read" in capsys.readouterr().err
