"""Spoken cross-modal benchmarks from texts: what is spoken, kept, refused, and scored at once."""

import json
import shlex
import sys

import numpy as np
import pytest
from tests.conftest import NUM_UNITS, tiny_model, tiny_text_tokenizer
from tests.data.conftest import sound

from smoltolk import cli
from smoltolk.evaluation.benchmarks import spoken_cloze
from smoltolk.evaluation.benchmarks.benchmark import BenchmarkError
from smoltolk.evaluation.benchmarks.reading import open_benchmark
from smoltolk.evaluation.benchmarks.spoken_cloze import read_cloze_texts, speak_cloze
from smoltolk.speech.audio import AudioError, load_native_audio
from smoltolk.speech.mel import MelTokenizer

PARTS = {"prompt": "mutual", "true": "correct", "false": "incorrect"}
STORY = {
    "InputStoryid": "b9f0-2c",
    "InputSentence1": "Ann ran.",
    "InputSentence2": "It rained. ",
    "InputSentence3": "She fell.",
    "InputSentence4": "It hurt.",
    "RandomFifthSentenceQuiz1": "She laughed.",
    "RandomFifthSentenceQuiz2": "She cried.",
    "AnswerRightEnding": "2",
}


def write_texts(path, count=2, **changes):
    rows = [{"id": f"i{i}", "prompt_text": f"w{i}", "true_text": "w5 w6", "false_text": "w7"} for i in range(count)]
    rows[0] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Speaker:
    """A command synthesizer that needs no time: 0.2 s of tones for each letter."""

    takes_voice = False

    def __init__(self, command, bad=()):
        self.spoken, self.bad = [], bad

    def speak(self, text, voice=None):
        if text in self.bad:
            raise AudioError("failed with status 3: no such word")
        self.spoken.append((text, voice))
        return sound(len(text), seconds=0.2 * len(text)), 16_000


@pytest.fixture
def speaker(monkeypatch):
    speaker = Speaker("")
    monkeypatch.setattr(spoken_cloze, "CommandSynthesizer", lambda command: speaker)
    return speaker


def speak(path, folder, **options):
    return speak_cloze(read_cloze_texts(path), folder, **({"tts": "say {output}", "progress": False} | options))


def test_stories_as_they_are_distributed_become_a_prompt_and_two_endings(tmp_path):
    path = tmp_path / "stories.csv"
    other = STORY | {"InputStoryid": "a", "AnswerRightEnding": "1"}
    lines = [STORY.keys(), STORY.values(), other.values()]
    path.write_text("\n".join(",".join(line) for line in lines))
    first, second = read_cloze_texts(path)
    prompt = "Ann ran. It rained. She fell. It hurt."
    assert (first.id, first.texts) == ("b9f0-2c", {"prompt": prompt, "true": "She cried.", "false": "She laughed."})
    assert second.texts == {"prompt": prompt, "true": "She laughed.", "false": "She cried."}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"true_text": "  "}, "row 1: true_text is empty or missing"),
        ({"id": "../a"}, r"row 1: id is '\.\./a', but it names files"),
        ({"id": "i1"}, "row 2: id 'i1' is there twice"),
        (STORY | {"AnswerRightEnding": 3}, "row 1: AnswerRightEnding is '3': give 1 or 2"),
    ],
)
def test_texts_that_cannot_be_used_are_listed(tmp_path, changes, message):
    with pytest.raises(BenchmarkError, match=message):
        read_cloze_texts(write_texts(tmp_path / "texts.jsonl", **changes))


def test_files_of_other_columns_or_without_items_are_refused(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_text("id,prompt\na,b\n")
    with pytest.raises(ValueError, match="lacks prompt_text, true_text, false_text; it has id, prompt: give"):
        read_cloze_texts(path)
    path.write_text("id,prompt_text,true_text,false_text\n")
    with pytest.raises(ValueError, match="holds no items"):
        read_cloze_texts(path)
    path.write_bytes(b"id,prompt_text\na,caf\xe9\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_cloze_texts(path)


def test_each_part_is_spoken_apart_into_the_layout_that_is_evaluated(tmp_path, speaker):
    folder = tmp_path / "out"
    made = speak(write_texts(tmp_path / "texts.jsonl"), folder)
    assert (made.items, made.num_spoken, made.num_kept) == (2, 6, 0)
    assert made.seconds == pytest.approx(0.2 * 2 * (2 + 5 + 2))
    assert speaker.spoken[:3] == [("w0", None), ("w5 w6", None), ("w7", None)]
    for part, name in PARTS.items():
        text = {"prompt": "w1", "true": "w5 w6", "false": "w7"}[part]
        assert (folder / f"i1_{name}.txt").read_text() == f"{text}\n"
        audio, rate = load_native_audio(folder / f"i1_{name}.wav")
        assert (len(audio), rate) == (3200 * len(text), 16_000)
    assert [stimuli.id for stimuli in open_benchmark(folder).stimuli] == ["i0", "i1"]


def test_what_is_done_is_kept_and_what_has_changed_is_spoken_again(tmp_path, speaker):
    folder = tmp_path / "out"
    speak(write_texts(tmp_path / "texts.jsonl"), folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("i*")}
    speaker.spoken.clear()
    assert speak(tmp_path / "texts.jsonl", folder).num_kept == 6
    assert speaker.spoken == []
    (folder / "i0_correct.txt").unlink()  # stopped before it was done
    made = speak(write_texts(tmp_path / "texts.jsonl", false_text="w8 w9"), folder, jobs=3)
    assert sorted(text for text, _ in speaker.spoken) == ["w5 w6", "w8 w9"]
    assert (made.num_spoken, made.num_kept) == (2, 4)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("i*")}
    assert sorted(name for name in after if after[name] != before[name]) == [
        *("i0_correct.txt", "i0_correct.wav", "i0_incorrect.txt", "i0_incorrect.wav")
    ]


def test_a_start_that_was_stopped_is_gone_on_with(tmp_path, speaker, monkeypatch):
    def stop(text, voice):
        if len(speaker.spoken) == 4:
            raise KeyboardInterrupt
        return Speaker.speak(speaker, text, voice)

    path = write_texts(tmp_path / "texts.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(speaker, "speak", stop)
        with pytest.raises(KeyboardInterrupt):
            speak(path, tmp_path / "out")
    assert speak(path, tmp_path / "out").num_spoken == 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.endswith(".part")]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_cannot_be_spoken_is_named_and_the_others_are_done(tmp_path, speaker, jobs):
    speaker.bad = ("w5 w6",)
    path = write_texts(tmp_path / "texts.jsonl")
    with pytest.raises(ValueError, match="2 of 6 texts could not be spoken") as caught:
        speak(path, tmp_path / "out", jobs=jobs)
    assert "i0, true: failed with status 3: no such word\ni1, true: failed" in str(caught.value)
    speaker.bad = ()
    speaker.spoken.clear()
    assert speak(path, tmp_path / "out", jobs=jobs).num_kept == 4
    assert speaker.spoken == [("w5 w6", None)] * 2


def test_a_command_that_never_works_is_not_tried_for_ever(tmp_path, speaker):
    speaker.bad = ("w5 w6", "w7", *(f"w{i}" for i in range(40)))
    with pytest.raises(ValueError, match="none of the first 20 texts could be spoken"):
        speak(write_texts(tmp_path / "texts.jsonl", count=40), tmp_path / "out")


def test_folders_of_other_origin_settings_or_items_are_refused(tmp_path, speaker):
    path = write_texts(tmp_path / "texts.jsonl")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "i0_mutual.wav").write_bytes(b"recorded with care")
    with pytest.raises(ValueError, match=r"holds 'i0_mutual\.wav' and was not made from texts"):
        speak(path, tmp_path / "mine")
    speak(path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"was spoken with .*'say \{output\}'.*, not with .*'cry \{output\}'"):
        speak(path, tmp_path / "out", tts="cry {output}")
    with pytest.raises(ValueError, match="holds 1 items that the texts do not have, first 'i1'"):
        speak(write_texts(path, count=1), tmp_path / "out")
    (tmp_path / "out" / "spoken.json").write_text("{")
    with pytest.raises(ValueError, match=r"spoken\.json cannot be read"):
        speak(path, tmp_path / "out")


def test_all_texts_of_an_item_have_one_of_the_voices(tmp_path, speaker):
    path = write_texts(tmp_path / "texts.jsonl", count=12)
    with pytest.raises(ValueError, match=r"has no \{voice\}, and voices are \['ann'\]: leave voices out"):
        speak(path, tmp_path / "out", voices=["ann"])
    speaker.takes_voice = True
    with pytest.raises(ValueError, match=r"has a \{voice\}, and voices are \[\]: name voices"):
        speak(path, tmp_path / "out")
    speak(path, tmp_path / "out", voices=["ann", "bob"])
    voices = [voice for _, voice in speaker.spoken]
    assert set(voices) == {"ann", "bob"}
    assert voices[0::3] == voices[1::3] == voices[2::3]
    with pytest.raises(ValueError, match="jobs is 0"):
        speak(path, tmp_path / "out", jobs=0)


def test_the_built_in_synthesizer_reads_numbers_and_signs(tmp_path):
    path = write_texts(tmp_path / "texts.jsonl", count=1, prompt_text="He owed $10 & left.", false_text="...")
    with pytest.raises(ValueError, match=r"1 of 3 texts could not be spoken.*\ni0, false: is silent"):
        speak(path, tmp_path / "out", tts=None)
    write_texts(path, count=1, prompt_text="He owed $10 & left.")
    assert speak(path, tmp_path / "out", tts=None).num_kept == 2
    assert json.loads((tmp_path / "out" / "spoken.json").read_text())["voices"] == ["en-us"]
    audio, _ = load_native_audio(tmp_path / "out" / "i0_mutual.wav")
    assert np.abs(audio).max() > 0.1
    with pytest.raises(ValueError, match="jobs is 2, but the built-in synthesizer speaks one text at a time"):
        speak(path, tmp_path / "other", tts=None, jobs=2)
    with pytest.raises(ValueError, match="voice 'klingon' has an unknown language"):
        speak(path, tmp_path / "other", tts=None, voices=["klingon"])


def test_the_command_makes_what_evaluate_scores(tmp_path, capsys):
    tokenizer = MelTokenizer.fit([sound(seed) for seed in range(3)], num_units=NUM_UNITS)
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_text_tokenizer().save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "speech_tokenizer")
    texts, spoken = write_texts(tmp_path / "texts.jsonl", count=1), tmp_path / "spoken"
    program = (
        "import sys, numpy, soundfile as s; n = 4000 * len(sys.argv[2]); "
        "s.write(sys.argv[1], numpy.sin(numpy.arange(n) / 9), 16000)"
    )
    tts = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {{output}} {{text}}"
    command = ["data", "speak-cloze", str(texts), "--output", str(spoken), "--tts", tts, "--jobs", "2"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{spoken}: 1 items, 3 texts spoken (0.0 min), 0 kept\n"
    assert "speak texts" in printed.err
    assert cli.main(["evaluate", str(tmp_path / "model"), str(spoken), "--output", str(tmp_path / "scores")]) == 0
    record = json.loads((tmp_path / "scores" / "result.json").read_text())
    assert [record["accuracy"][pair]["cloze"]["n"] for pair in ("S→S", "T→T", "T→S", "S→T")] == [1] * 4
    assert cli.main([*command, "--voice", "ann"]) == 1
    assert "has no {voice}" in capsys.readouterr().err
