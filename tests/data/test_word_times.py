"""Word times that other programs have written, read by `prepare`."""

import json

import pytest
from tests.data.conftest import quarantine, spoken_row, write_manifest

from smoltolk.data import alignments
from smoltolk.data.corpora import libriheavy
from smoltolk.data.prepare import prepare
from smoltolk.data.store import Store

TEXTGRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
0.5
<exists>
1
"IntervalTier"
"words"
0
0.5
3
0
0.2
"one"
0.2
0.45
"two"
0.45
0.5
""
"""


def files(folder):
    """The same two words in each format, and files with faults."""
    ours = [{"text": "one", "start_s": 0, "end_s": 0.2}, {"text": "two", "start_s": 0.2, "end_s": 0.45}]
    whisper = {
        "segments": [{"words": [{"word": f" {w['text']}", "start": w["start_s"], "end": w["end_s"]} for w in ours]}]
    }
    contents = {
        "ours.json": json.dumps(ours),
        "whisper.json": json.dumps(whisper),
        "mfa.TextGrid": TEXTGRID,
        "all.ctm": "3 1 0.00 0.20 one\n3 1 0.20 0.25 two\nlate 1 0.00 0.20 one\nlate 1 0.20 9.00 two\n",
        "other.json": json.dumps([{**ours[0], "text": "three"}, ours[1]]),
        "missing.json": json.dumps([{"text": "one", "start_s": 0, "end_s": None}]),
        "backwards.json": json.dumps(ours[::-1]),
        "nan.json": json.dumps([{**ours[0], "end_s": "nan"}, ours[1]]),
    }
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content)


GOOD = ["ours.json", "whisper.json", "mfa.TextGrid", "all.ctm"]
BAD = {
    "other.json": "word 'one' (number 0) of the text differs from 'three'",
    "missing.json": "has no end",
    "backwards.json": "word",
    "nan.json": "finite",
    "none.json": "cannot be read",
    "odd.txt": "of no known kind",
}


def test_words_are_timed_by_a_file_of_any_format(tmp_path, tokenizers):
    files(tmp_path / "in")
    rows = [spoken_row(tmp_path / "in", n, word_ends_s=None, alignment=name, id=str(n)) for n, name in enumerate(GOOD)]
    rows[0]["text"] = None  # the words of the file are the text
    prepare(write_manifest(tmp_path / "in", rows), tmp_path / "out", **tokenizers)
    assert quarantine(tmp_path / "out") == []
    store = Store(tmp_path / "out")
    assert [utterance.text for utterance in store] == ["one two"] * len(GOOD)
    for utterance in store:
        assert utterance.word_ends_s.tolist() == pytest.approx([0.2, 0.45])


def test_word_times_that_cannot_be_used_are_quarantined_with_their_reason(tmp_path, tokenizers):
    files(tmp_path / "in")
    rows = [spoken_row(tmp_path / "in", n, word_ends_s=None, alignment=name) for n, name in enumerate(BAD)]
    rows.append(spoken_row(tmp_path / "in", 8, word_ends_s=None, alignment="all.ctm", id="late"))
    rows.append(spoken_row(tmp_path / "in", 9, word_ends_s=None, alignment="all.ctm", id="unknown"))
    rows.append(spoken_row(tmp_path / "in", 7))
    prepare(write_manifest(tmp_path / "in", rows), tmp_path / "out", **tokenizers)
    assert [utterance.id for utterance in Store(tmp_path / "out")] == ["7.wav"]
    reasons = [line["reason"] for line in quarantine(tmp_path / "out")]
    expected = [*BAD.values(), "past the 0.500 s of audio", "no words of 'unknown' or '9'"]
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason
        assert str(tmp_path) not in reason  # the same on every machine


def test_an_alignment_without_audio_beside_times_or_outside_the_folder_is_refused(tmp_path, tokenizers):
    files(tmp_path / "in")
    for changes, message in (
        ({"alignment": "ours.json"}, "beside word_ends_s"),
        ({"alignment": "ours.json", "word_ends_s": None, "audio": None}, "without audio"),
        ({"alignment": "../ours.json", "word_ends_s": None}, "ours.json"),
    ):
        source = write_manifest(tmp_path / "in", [spoken_row(tmp_path / "in", 0, **changes)])
        with pytest.raises(ValueError, match=message):
            prepare(source, tmp_path / "out", **tokenizers)


def test_a_file_of_many_utterances_is_read_once(tmp_path, tokenizers, monkeypatch):
    files(tmp_path / "in")
    lines = "".join(f"{n} 1 0.00 0.20 one\n{n} 1 0.20 0.25 two\n" for n in range(5))
    (tmp_path / "in" / "five.ctm").write_text(lines)
    read, read_ctm = [], alignments.read_ctm
    monkeypatch.setattr(
        alignments, "read_ctm", lambda path, **settings: read.append(path) or read_ctm(path, **settings)
    )
    rows = [spoken_row(tmp_path / "in", n, word_ends_s=None, alignment="five.ctm") for n in range(5)]
    assert prepare(write_manifest(tmp_path / "in", rows), tmp_path / "out", **tokenizers).unaligned == 0
    assert len(read) == 1


def test_cuts_of_libriheavy_may_hold_word_times(tmp_path):
    words = [["one", 0.0, 0.2], ["two", 0.2, 0.25]]
    lines = []
    for number, timed in enumerate((words, words[:1], None)):
        supervision = {"text": "ONE TWO", "alignment": {"word": timed}} if timed else {"text": "ONE TWO"}
        sources = [{"source": "a.flac"}]
        cut = {"id": f"a_{number}", "start": 1.0, "duration": 0.5, "supervisions": [supervision]}
        lines.append(json.dumps(cut | {"recording": {"sources": sources}}))
    (tmp_path / "libriheavy_cuts_small.jsonl").write_text("\n".join(lines))
    [piece] = libriheavy(tmp_path / "libriheavy_cuts_small.jsonl").pieces(10)
    timed, short, untimed = piece.rows()
    assert timed.word_ends_s == pytest.approx((0.2, 0.45))
    assert "word 'TWO' (number 1) of the text differs from the end" in short.error
    assert (untimed.word_ends_s, untimed.error) == (None, None)
