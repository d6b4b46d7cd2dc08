"""The benchmark of word times reports what it says."""

from benchmarks import alignment
from benchmarks.english_sentences import sentences


def test_the_sentences_are_the_same_for_the_same_seed_and_have_no_open_slots():
    drawn = list(sentences(50, seed=3))
    assert drawn == list(sentences(50, seed=3)) != list(sentences(50, seed=4))
    assert not any("{" in sentence for sentence in drawn)


def test_the_alignment_benchmark_reports_errors_and_wrong_texts(capsys, monkeypatch):
    short = ("Two dogs slept.", "My sister walked home.")  # sentences of the real length would take long
    monkeypatch.setattr(alignment, "sentences", lambda count, seed: short)
    monkeypatch.setattr(alignment, "VOICES", ("en-us",))
    alignment.main(["--sentences", "2", "--wrong", "2"])
    text = capsys.readouterr().out
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" (")[0] for row in rows[1:4]] == ["all", "en-us", "last words"]
    assert "right text" in rows
    assert rows[-1] == "second half left out"
