"""Alignment of a source: what is written, what is quarantined, and that a killed run goes on to the same files."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from smoltolk import cli
from smoltolk.data import align as align_module
from smoltolk.data.align import align_source, confidence_path, quarantine_path
from smoltolk.data.sources import read_rows
from smoltolk.data.store import lock
from smoltolk.speech.alignment import Aligner, Alignment, AlignmentError
from smoltolk.speech.synthesis import EspeakSynthesizer

RATE_HZ = 16_000


class EvenAligner(Aligner):
    """Gives every word the same time; refuses texts that say so."""

    kind = "even"
    sample_rate_hz = RATE_HZ

    def settings(self):
        return {"kind": self.kind, "min_confidence": self.min_confidence}

    def _align(self, audio, words):
        if "impossible" in words:
            raise AlignmentError("the text is impossible")
        edges_s = np.linspace(0, len(audio) / RATE_HZ, len(words) + 1)
        return Alignment(edges_s[:-1], edges_s[1:], -float(len(words)))


def write_source(folder, count=6):
    (folder / "audio").mkdir(parents=True)
    rows = []
    for number in range(count):
        samples = np.random.default_rng(number).normal(0, 0.1, RATE_HZ // 2)
        soundfile.write(folder / "audio" / f"{number}.wav", samples, RATE_HZ)
        rows.append({"audio": f"audio/{number}.wav", "text": f"row number {number}", "speaker": "ann"})
    rows[1]["text"] = "impossible"
    rows[2] = {"text": "text alone", "id": "text", "split": "test"}
    rows[3]["word_ends_s"] = [0.1, 0.2, 0.3]
    rows[4]["audio"] = "audio/missing.wav"
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_rows_get_their_times_in_order_and_bad_ones_are_quarantined(tmp_path):
    source, output = write_source(tmp_path / "in"), tmp_path / "out" / "aligned.jsonl"
    summary = align_source(source, output, EvenAligner(), progress=False)
    assert (summary.aligned, summary.kept, summary.quarantined) == (2, 2, 2)
    assert summary.confidence_quantiles == (-3.0, -3.0, -3.0)
    rows = lines(output)
    assert [row["id"] for row in rows] == ["audio/0.wav", "text", "audio/3.wav", "audio/5.wav"]
    assert rows[0] == {
        "id": "audio/0.wav",
        "audio": "../in/audio/0.wav",
        "text": "row number 0",
        "word_ends_s": [0.1667, 0.3333, 0.5],
        "speaker": "ann",
    }
    assert rows[1] == {"id": "text", "text": "text alone", "split": "test"}
    assert rows[2]["word_ends_s"] == [0.1, 0.2, 0.3]
    assert lines(confidence_path(output)) == [
        {"id": "audio/0.wav", "alignment_confidence": -3.0},
        {"id": "audio/5.wav", "alignment_confidence": -3.0},
    ]
    bad = lines(quarantine_path(output))
    assert bad[0] == {"id": "audio/1.wav", "source": "audio/1.wav", "reason": "the text is impossible"}
    assert "missing.wav cannot be read" in bad[1]["reason"]
    assert sorted(contents(output.parent)) == ["aligned.confidence.jsonl", "aligned.jsonl", "aligned.quarantine.jsonl"]
    assert all((output.parent / row.audio).exists() for row in read_rows(output) if row.audio)


def test_a_folder_is_aligned_too(tmp_path):
    source = write_source(tmp_path / "in").parent / "audio"
    (source / "0.txt").write_text("some words")
    (source / "1.txt").write_bytes(b"\xff")
    align_source(source, tmp_path / "out.jsonl", EvenAligner(), progress=False)
    rows = {row["id"]: row for row in lines(tmp_path / "out.jsonl")}
    assert rows["0.wav"]["word_ends_s"] == [0.25, 0.5]
    assert rows["0.wav"]["audio"] == "in/audio/0.wav"
    assert "text" not in rows["2.wav"]
    assert "not UTF-8" in lines(quarantine_path(tmp_path / "out.jsonl"))[0]["reason"]


def test_several_processes_write_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(align_module, "ROWS_PER_BLOCK", 2)
    source = write_source(tmp_path / "in")
    for folder, workers in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        align_source(source, tmp_path / folder / "out.jsonl", EvenAligner(), workers=workers, progress=False)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_killed_run_goes_on_to_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(align_module, "ROWS_PER_BLOCK", 2)
    source = write_source(tmp_path / "in")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    align_source(source, tmp_path / "whole" / "out.jsonl", EvenAligner(), progress=False)
    code = """
import sys, time
from smoltolk.data import align
from tests.data.test_align import EvenAligner
align.ROWS_PER_BLOCK = 2
class Slow(EvenAligner):
    def _align(self, audio, words):
        if words[-1] == "5":
            print("last block", flush=True)
            time.sleep(60)
        return super()._align(audio, words)
align.align_source(sys.argv[1], sys.argv[2], Slow(), progress=False)
"""
    output = tmp_path / "killed" / "out.jsonl"
    command = [sys.executable, "-c", code, str(source), str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout.readline() == b"last block\n"
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "out.jsonl.parts").glob("0*.json")}
    assert sorted(before) == ["000000.json", "000001.json"]
    aligned = []
    monkeypatch.setattr(
        align_module,
        "_align_row",
        lambda job, row, run=align_module._align_row: aligned.append(row.id) or run(job, row),
    )
    align_source(source, output, EvenAligner(), progress=False)
    assert aligned == ["audio/missing.wav", "audio/5.wav"]
    assert contents(tmp_path / "whole") == contents(tmp_path / "killed")


def test_a_run_that_was_begun_goes_on_with_the_same_settings_only(tmp_path, monkeypatch):
    source, output = write_source(tmp_path / "in"), tmp_path / "out.jsonl"

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(align_module, "_finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            align_source(source, output, EvenAligner(), progress=False)
    with pytest.raises(ValueError, match="begun with another source or other settings"):
        align_source(source, output, EvenAligner(-3.5), progress=False)
    assert align_source(source, output, EvenAligner(), progress=False).aligned == 2
    with pytest.raises(ValueError, match="is there already"):
        align_source(source, output, EvenAligner(), progress=False)


def test_bad_settings_are_refused_before_any_work(tmp_path):
    source, output = write_source(tmp_path / "in"), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="workers is 0"):
        align_source(source, output, EvenAligner(), workers=0)
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        align_source(source, tmp_path / "out.csv", EvenAligner())
    with lock(tmp_path / "out.jsonl.parts"), pytest.raises(ValueError, match="being written by another process"):
        align_source(source, output, EvenAligner(), progress=False)
    source.write_text('{"id": "a", "text": "a"}\n' * 2)
    with pytest.raises(ValueError, match="id 'a' twice"):
        align_source(source, output, EvenAligner())
    source.write_text("")
    with pytest.raises(ValueError, match="no rows"):
        align_source(source, output, EvenAligner())


def test_the_command_aligns_speech(tmp_path, capsys):
    rows = []
    for number, text in enumerate(("Two dogs walked home.", "The quiet river is deep.")):
        spoken = EspeakSynthesizer("en-us+f2", rate_wpm=160).speak(text)
        soundfile.write(tmp_path / f"{number}.wav", spoken.audio, spoken.sample_rate_hz)
        rows.append({"audio": f"{number}.wav", "text": text, "true": spoken.word_ends_s})
    rows.append({"audio": "0.wav", "text": "I walked 7 dogs", "id": "digits"})
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "true"}) + "\n" for row in rows))
    assert cli.main(["align", str(source), str(output), "--aligner", "pocketsphinx", "--min-confidence", "-20"]) == 0
    printed = capsys.readouterr().out
    assert "2 rows aligned, 0 kept as they were" in printed
    assert "confidence -" in printed
    assert "1 rows could not be aligned" in printed
    for row, result in zip(rows, lines(output), strict=False):
        assert result["word_ends_s"] == pytest.approx(row["true"], abs=0.12)
    assert "'7' as 'seven'" in lines(quarantine_path(output))[0]["reason"]
    assert cli.main(["align", str(source), str(output), "--aligner", "ctc"]) == 1
    assert "model is missing" in capsys.readouterr().err
