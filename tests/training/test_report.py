"""Runs side by side in one page."""

import json
import re

import pytest

from smoltolk import cli
from smoltolk.training import report
from smoltolk.training.report import PICTURES, read_run, run_names, smoothed, write_report


def make_run(folder, steps=30, **changes):
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "stage": 1,
            "loss": 3 / step,
            "text_loss": None,
            "speech_loss": 3 / step,
            "tokens": 100 * step,
        }
        line |= {
            "flops": 1000 * step,
            "seconds": 0.5,
            "skipped_steps": 0,
            "learning_rate": 1e-3,
            "speech_grad_norm": 1.0,
            "mfu": 0.4,
        }
        if step % 10 == 0:
            line |= {"validation_text_loss": 2.0, "text_forgetting": 0.125, "selector_entropy": 0.5}
            line |= {"layer_weights": [0.25, 0.75]}
        lines.append(line | changes)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_page_holds_the_curves_and_the_table_of_all_runs(tmp_path, capsys):
    runs = [make_run(tmp_path / "a" / "<smoltolk>"), make_run(tmp_path / "early", steps=12)]
    assert cli.main(["report", *map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "&lt;smoltolk&gt;" in page  # names are no markup
    assert "<smoltolk>" not in page
    cells = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", page)
    assert [re.findall("<td>(.*?)</td>", row)[:3] for _, row in cells] == [
        ["30", "3e+03", "3e+04"],
        ["12", "1.2e+03", "1.2e+04"],
    ]
    assert "0.1250" in page
    drawn = [title for title in PICTURES if f"<h2>{title}</h2>" in page]
    assert drawn == list(PICTURES)
    assert page.count("data:image/png;base64,") == len(PICTURES) + 1  # and the levels
    assert "http" not in page


def test_what_no_run_measured_is_left_out(tmp_path):
    run = make_run(tmp_path / "run", steps=5)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "<h2>Validation loss</h2>" not in page
    assert "<h2>Training loss</h2>" in page


def test_runs_without_some_curves_are_named_and_one_that_never_was_finite_is_shown(tmp_path, monkeypatch):
    speech = make_run(tmp_path / "speech", validation_speech_loss=1.5)
    text = make_run(tmp_path / "text", validation_text_loss=2.5)
    lost = make_run(tmp_path / "lost", loss=None, speech_loss=None, speech_grad_norm=None)
    figures = []
    monkeypatch.setattr(report, "data_uri", lambda figure: figures.append(figure) or "data:,")
    page = write_report([speech, text, lost], tmp_path / "page.html").read_text()
    validation = figures[list(PICTURES).index("Validation loss")]
    assert [name.get_text() for name in validation.axes[0].get_legend().get_texts()] == ["speech", "text", "lost"]
    assert "<td>lost</td>" in page
    write_report([lost], tmp_path / "page.html")  # no curve to draw in some pictures


def test_tokens_per_second_and_smoothing(tmp_path):
    assert {line["tokens_per_s"] for line in read_run(make_run(tmp_path / "old"))} == {200.0}
    assert {line["tokens_per_s"] for line in read_run(make_run(tmp_path / "run", tokens_per_s=150.0))} == {150.0}
    assert smoothed([2.0, 4.0]) == [2.0, 4.0]  # short curves stay as they are
    long = smoothed([0.0] + [1.0] * 399)
    assert long[1] == pytest.approx(0.1)
    assert long[-1] == pytest.approx(1, abs=1e-6)


def test_runs_of_one_name_are_told_apart_and_a_folder_without_a_run_is_refused(tmp_path):
    assert run_names([tmp_path / "a" / "run", tmp_path / "b" / "run"]) == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="is given twice"):
        run_names([tmp_path, tmp_path])
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl: give the output folder"):
        write_report([tmp_path], tmp_path / "page.html")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="is empty: wait until"):
        write_report([tmp_path], tmp_path / "page.html")
