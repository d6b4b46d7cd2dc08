"""The summary: counts, reasons and histograms, in JSON and as a picture."""

import json
import sys

import pytest
from tests.data.conftest import mixed_manifest

from smoltolk.data.prepare import prepare
from smoltolk.data.summary import BINS, PICTURE, draw, kind_of_reason, read_summary


def test_the_summary_is_kept_with_the_store(tmp_path, tokenizers):
    summary = prepare(mixed_manifest(tmp_path / "in"), tmp_path / "out", **tokenizers)
    assert read_summary(tmp_path / "out") == summary
    assert summary.share_quarantined == pytest.approx(0.2)
    assert summary.reasons == {
        "it cannot be read (No such file or directory)": 1,
        "word_ends_s runs backwards at word N (N s after N s)": 1,
    }
    assert sum(summary.histograms["seconds per utterance"]) == 7
    assert sum(summary.histograms["units per second"]) == 7
    words = summary.histograms["words per second"]
    assert (sum(words), words[list(BINS["words per second"]).index(4.0)]) == (6, 6)  # two words in half a second
    assert sum(summary.histograms["confidence of the alignment"]) == 0
    content = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert content["hours"] == pytest.approx(7 * 0.5 / 3600)
    for name, counts in content["histograms"].items():
        assert len(content["bins"][name]) == len(counts) + 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("a/b 1.wav is silent (peak 1.0e-05): leave it out", "it is silent (peak N)"),
        ("a/b 1.wav is truncated (17 bytes are missing): copy it", "it is truncated (N bytes are missing)"),
        ("utterance 'x: y': seconds is -0.5: give", "seconds is N"),
        (
            "text has the character '\\x00' at 3, which no text has: correct",
            "text has the character … at N, which no text has",
        ),
    ],
)
def test_reasons_are_counted_by_their_kind(reason, kind):
    assert kind_of_reason(reason, "a/b 1.wav") == kind


def test_the_picture_is_the_same_each_time(tmp_path, tokenizers):
    summary = prepare(mixed_manifest(tmp_path / "in"), tmp_path / "out", **tokenizers)
    draw(summary, tmp_path / "a.png")
    draw(read_summary(tmp_path / "out"), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / PICTURE).exists()


def test_without_matplotlib_there_is_no_picture(tmp_path, tokenizers, monkeypatch):
    summary = prepare(mixed_manifest(tmp_path / "in"), tmp_path / "out", **tokenizers)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'smoltolk\[demo\]'"):
        draw(summary, tmp_path / "a.png")
