"""The benchmark of the scorer reports what it says."""

import torch
from benchmarks import score


def test_the_scoring_benchmark_has_equal_scores_and_a_row_for_each_way(capsys, monkeypatch):
    monkeypatch.setattr(score, "LENGTHS", {"T": ((18, 20), (2, 4)), "S": ((20, 24), (3, 6))})
    options = ["--items", "2", "--memory-items", "1", "2", "--repeats", "1", "--protocols", "salmon"]
    with torch.random.fork_rng():
        score.main(["--size", "tiny", "--device", "cpu", *options])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[1].strip() for row in rows] == ["protocol", "salmon", "salmon", "items", "1", "2"]
    assert [row[4].strip() for row in rows[1:3]] == ["no", "yes"]
