"""Benchmarks as they lie on disk: averages by hand, official files, and every way not to be whole."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tests.conftest import NUM_UNITS, tiny_lm_config, tiny_model, tiny_text_tokenizer
from tests.data.conftest import RATE_HZ, sound

from smoltolk import cli
from smoltolk.evaluation import pairs
from smoltolk.evaluation.benchmarks import reading
from smoltolk.evaluation.benchmarks.benchmark import BenchmarkError
from smoltolk.evaluation.benchmarks.numbered import SALMON_PARTS
from smoltolk.evaluation.benchmarks.reading import check_benchmarks, open_benchmark
from smoltolk.evaluation.pairs import score_task
from smoltolk.evaluation.scoring import ScoringSettings
from smoltolk.generation.pipeline import SmolTolkPipeline
from smoltolk.speech.audio import save_wav
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.units import Units

WORDS = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
SENTENCES = ("filename", "id", "voice", "type", "subtype", "correct", "transcription")


def write_wavs(folder, *stems, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number, stem in enumerate(stems):
        save_wav(folder / f"{stem}.wav", sound(seed + number, seconds=0.2), RATE_HZ)


def write_gold(folder, columns, rows, *, wavs=True):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gold.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    if wavs:
        write_wavs(folder, *(row[0] for row in rows))
    return folder


def words(folder, **options):
    """Ids 1 and 2 in vocabulary, 3 not; id 1 in two voices."""
    rows = []
    for word, voice, frequency in (("1", "A", 7), ("1", "B", 7), ("2", "A", 1), ("3", "A", 0)):
        stem = f"{voice}{word}"
        rows.append((f"{stem}n", word, voice, "", f"w{word} w9", "x", 3, 0))  # non-words have no frequency
        rows.append((f"{stem}w", word, voice, frequency, f"w{word}", "x", 3, 1))
    return write_gold(folder, WORDS, rows, **options)


def sentences(folder):
    """Type a has two items (the first in two voices), type b one, with an id that type a has too."""
    rows = []
    for kind, subtype, item, voice in (("a", "x", 1, "A"), ("a", "x", 1, "B"), ("a", "y", 1, "A"), ("b", "x", 1, "A")):
        stem = f"{kind}{subtype}{item}{voice}"
        rows.append((f"{stem}-good", item, voice, kind, subtype, 1, "w1 w2"))
        rows.append((f"{stem}-bad", item, voice, kind, subtype, 0, "w2 w1"))
    return write_gold(folder, SENTENCES, rows)


class Encoder:
    """A speech tokenizer that needs no time."""

    sample_rate_hz = RATE_HZ

    def encode_batch(self, audios):
        return [Units(np.arange(3), np.ones(3, dtype=int)) for _ in audios]


@pytest.fixture
def score(model, monkeypatch):
    """Scores a benchmark with given credits: 1 for a right pair, 0 for a wrong one, 0.5 for a tie, in its order."""

    def run(benchmark, credits, **options):
        left = list(credits)

        def fake(model, candidates, protocol, settings, progress):
            return np.array([score for _ in candidates[::2] for score in (2.0 * left.pop(0), 1.0)])

        monkeypatch.setattr(pairs, "score_candidates", fake)
        pipeline = SimpleNamespace(model=model, speech_tokenizer=Encoder(), text_ids=lambda text: [len(text)] * 3)
        task = benchmark.task(pipeline, protocol=benchmark.protocol, **options)
        result = score_task(model, task, protocol=benchmark.protocol)
        assert not left
        return result

    return run


def numbers(result):
    return {
        group: {name: (accuracy.n, pytest.approx(accuracy.accuracy)) for name, accuracy in names.items()}
        for group, names in result.summary().items()
    }


def faults_of(folder, task="auto", **options):
    with pytest.raises(BenchmarkError) as caught:
        open_benchmark(folder, task, **options)
    return sorted(str(fault).removeprefix(f"{folder}/") for fault in caught.value.faults)


def test_swuggy_is_averaged_over_voices_then_ids_all_and_in_vocabulary(tmp_path, score):
    words(tmp_path / "lexical" / "dev")
    benchmark = open_benchmark(tmp_path)
    result = score(benchmark, [1, 0, 0.5, 1])  # id 1: two voices, id 2: a tie, id 3: out of vocabulary
    assert (result.task, result.split, result.protocol.name) == ("swuggy", "dev", "authors")
    assert numbers(result) == {"sWUGGY": {"all": (3, (0.5 + 0.5 + 1) / 3), "in-vocab": (2, 0.5)}}


def test_sblimp_has_the_official_micro_and_the_authors_macro_average(tmp_path, score):
    sentences(tmp_path / "syntactic" / "test")
    result = score(open_benchmark(tmp_path, "sblimp", split="test"), [1, 0, 1, 0])
    # a/x/1: 0.5 over its voices, a/y/1: 1, b/x/1: 0
    assert numbers(result) == {
        "sBLIMP": {"micro": (3, (0.5 + 1 + 0) / 3), "macro": (3, ((0.5 + 1) / 2 + 0) / 2)},
        "sBLIMP types": {"a": (2, 0.75), "b": (1, 0.0)},
    }


def test_items_are_known_by_their_files_whatever_the_tokenizer(tmp_path, score, monkeypatch):
    benchmark = open_benchmark(words(tmp_path / "dev"))
    before = score(benchmark, [1, 1, 1, 1])
    monkeypatch.setattr(Encoder, "encode_batch", lambda self, audios: [Units(np.arange(5), np.ones(5))] * len(audios))
    after = score(benchmark, [1, 1, 1, 1])
    assert before.items_fingerprint == after.items_fingerprint
    assert before.tokens_fingerprint != after.tokens_fingerprint
    write_wavs(tmp_path / "dev", "A1w", seed=9)
    assert score(benchmark, [1, 1, 1, 1]).items_fingerprint != before.items_fingerprint


def test_prosaudit_is_reported_by_type(tmp_path, score):
    rows = [(f"{i}{c}", i, "lexical" if i < 2 else "protosyntax", c) for i in range(3) for c in (0, 1)]
    folder = write_gold(tmp_path / "english" / "dev", ("filename", "id", "type", "correct"), rows)
    benchmark = open_benchmark(tmp_path)
    result = score(benchmark, [1, 0, 0.5])
    assert (benchmark.folder, benchmark.submission) == (folder, "english_dev.txt")
    assert numbers(result) == {"prosAudit": {"lexical": (2, 0.5), "protosyntax": (1, 0.5)}}
    with pytest.raises(ValueError, match="prosaudit has no texts"):
        open_benchmark(tmp_path, modality="text")


def test_submissions_have_a_line_for_each_stimulus(tmp_path, score):
    words(tmp_path / "lexical" / "dev")
    benchmark = open_benchmark(tmp_path)
    path = benchmark.write_submission(tmp_path / "out", score(benchmark, [1, 0, 0.5, 1]))
    assert path == tmp_path / "out" / "lexical" / "dev.txt"
    lines = dict(line.split(" ") for line in path.read_text().splitlines())
    assert {name: float(value) for name, value in lines.items()} == {
        **{"A1w": 2, "B1w": 0, "A2w": 1, "A3w": 2},
        **{"A1n": 1, "B1n": 1, "A2n": 1, "A3n": 1},
    }
    other = sentences(tmp_path / "syntactic" / "dev")
    with pytest.raises(ValueError, match="the result of swuggy holds other items"):
        open_benchmark(other).write_submission(tmp_path, score(benchmark, [1, 0, 0.5, 1]))


def test_text_twins_need_no_audio(tmp_path, score):
    words(tmp_path / "lexical" / "dev", wavs=False)
    benchmark = open_benchmark(tmp_path, modality="text")
    assert benchmark.pairs[0].positive.content == "w1"
    result = score(benchmark, [1, 1, 1, 0])
    assert (result.task, result.accuracy(benchmark.averages[0]).accuracy) == ("swuggy-text", pytest.approx(2 / 3))
    assert all(average.anchor is None for average in benchmark.averages)


def test_every_fault_of_a_gold_file_is_listed_with_its_line(tmp_path):
    folder = words(tmp_path / "lexical" / "dev")
    lines = (folder / "gold.csv").read_text().splitlines()
    (folder / "A1w.wav").unlink()
    write_wavs(folder, "stray", "x", "y")
    more = ["x,9,A,3,w4,x,3,1", "x,8,A,3,w4,x,3,1", "y,7,A,,w4,x,3,1", "z,1,A"]
    (folder / "gold.csv").write_text("\n".join([*lines[:7], *more]))
    found = faults_of(folder)
    assert any(fault.startswith("gold.csv:3: ") and "A1w.wav is missing" in fault for fault in found)
    assert "stray.wav: no good row of gold.csv names it" in found
    assert "A3n.wav: no good row of gold.csv names it" in found
    assert "gold.csv:8: has no partner: no row with correct=0 of id 9, voice A" in found
    assert "gold.csv:9: filename 'x' is there twice" in found
    assert "gold.csv:10: frequency is '': a word needs a number to be in or out of vocabulary" in found
    assert "gold.csv:11: does not have the 8 cells of the header" in found


def test_gold_files_of_other_columns_encodings_and_values_are_refused(tmp_path):
    folder = write_gold(tmp_path / "lexical" / "dev", ("filename", "id", "frequency", "right"), [("a", 1, 3, 1)])
    assert "gold.csv: lacks the columns voice, correct; it has filename, id, frequency, right" in faults_of(folder)
    (folder / "gold.csv").write_bytes(",".join(WORDS).encode() + b"\na,1,A,3,caf\xe9,x,3,1\n")
    assert any("gold.csv: is not UTF-8 (byte" in fault for fault in faults_of(folder))
    rows = [("a", 1, "A", 3, "w", "x", 1, 2), ("b", "", "A", 3, "w", "x", 1, 1), ("c", 1, "A", 3, " ", "x", 1, 1)]
    write_gold(folder, WORDS, rows)
    found = faults_of(folder, modality="text")
    assert "gold.csv:2: correct is '2': give 0 or 1" in found
    assert "gold.csv:3: id is empty" in found
    assert "gold.csv:4: word is empty, there is no text to score" in found
    rows = [("a", 1, "A", 3, "w", "x", 1, 1), ("b", 1, "A", 3, "w", "x", 1, 1)]
    write_gold(folder, WORDS, rows)
    assert "gold.csv:3: is correct=1 of id 1, voice A, which line 2 is already" in faults_of(folder)


def test_renamed_files_alternate_between_right_and_wrong(tmp_path, score):
    write_wavs(tmp_path / "w", *(f"{i}_w{i}" for i in range(4)))
    write_wavs(tmp_path / "s", *(f"{i}+some_words" for i in range(12)))
    result = score(open_benchmark(tmp_path / "w"), [1, 0])
    assert (result.task, numbers(result)) == ("swuggy", {"sWUGGY": {"pairs": (2, 0.5)}})
    benchmark = open_benchmark(tmp_path / "s")
    assert [pair.negative.name for pair in benchmark.pairs][-1] == "11+some_words"  # by number, not by letters
    (tmp_path / "s" / "5+some_words.wav").unlink()
    assert faults_of(tmp_path / "s") == [
        f"{tmp_path / 's'}: the wav with number 5, the partner of 4+some_words.wav, is missing"
    ]


def test_spoken_stories_are_pairs_of_neighbours(tmp_path, score):
    for first in (0, 1):
        folder = tmp_path / str(first)
        ends = ("correct", "incorrect")
        write_wavs(folder, *(f"{first + i}_story-{i // 2}_{ends[i % 2]}" for i in range(6)))
        benchmark = open_benchmark(folder, "tstorycloze")
        result = score(benchmark, [1, 0.5, 0.5])
        assert numbers(result) == {"StoryCloze": {"tstorycloze": (3, 1 / 3)}}  # the authors' ties are wrong here
        assert [average.anchor for average in benchmark.averages] == ["tSC"]
    assert open_benchmark(folder).name == "storycloze"
    (folder / "4_story-1_incorrect.wav").rename(folder / "4_story-7_incorrect.wav")
    (folder / "5_story-2_correct.wav").unlink()
    write_wavs(folder, "notes")
    found = faults_of(folder)
    assert (
        "3_story-1_correct.wav: should be followed by 4_story-1_incorrect.wav, not by 4_story-7_incorrect.wav" in found
    )
    assert "notes.wav: is no item: names are <number>_<story>_correct.wav or …_incorrect.wav" in found
    assert any("the wav with number 5, the partner of 6_story-2_incorrect.wav, is missing" in fault for fault in found)


def test_salmon_has_eight_parts(tmp_path, score):
    for number, part in enumerate(SALMON_PARTS):
        write_wavs(tmp_path / part, *(f"sample_{i}_{j}" for i in range(1 + (number == 0)) for j in (0, 1)))
    result = score(open_benchmark(tmp_path), [1, 0, *[1] * 7])
    assert (result.task, result.protocol.name, len(result.summary()["SALMon"])) == ("salmon", "salmon", 9)
    found = numbers(result)["SALMon"]
    assert found["bg_alignment"] == (2, 0.5)
    assert found["mean of parts"] == (9, (0.5 + 7) / 8)
    (tmp_path / "bg_alignment" / "sample_1_1.wav").unlink()
    (tmp_path / "rir_consistency").rename(tmp_path / "other")
    write_wavs(tmp_path / "gender_consistency", "sample_0_2")
    assert faults_of(tmp_path) == [
        "bg_alignment/sample_1_0.wav: has no partner: sample_1_1.wav is missing",
        "gender_consistency/sample_0_2.wav: is no sample: names are sample_<number>_0.wav and sample_<number>_1.wav",
        "rir_consistency: is missing: SALMon has eight parts",
    ]


def cross_modal(folder, count=2):
    folder.mkdir(parents=True)
    for i in range(count):
        for number, part in enumerate(("mutual", "correct", "incorrect")):
            write_wavs(folder, f"{i}_{part}", seed=3 * i + number)
            (folder / f"{i}_{part}.txt").write_text(f" w{i} w{number}\n")
    return folder


def test_cross_modal_stories_come_in_four_pairs(tmp_path, score):
    benchmark = open_benchmark(cross_modal(tmp_path / "tSC"))
    assert (benchmark.num_sequences(), benchmark.num_sequences(["S→T"])) == (16, 4)
    assert benchmark.stimuli[1].text == {"prompt": "w1 w0", "true": " w1 w1", "false": " w1 w2"}
    result = score(benchmark, [1, 1, 0, 0, 1, 0, 1, 0])  # of each item S→S, T→T, T→S, S→T
    accuracy = {pair: names["cloze"].accuracy for pair, names in result.summary().items()}
    assert accuracy == {"S→S": 1, "T→T": 0.5, "T→S": 0.5, "S→T": 0}
    assert list(open_benchmark(tmp_path).stimuli) != []
    assert {stimuli.kind for stimuli in open_benchmark(tmp_path).stimuli} == {"tSC"}


def test_cross_modal_stories_need_what_is_scored(tmp_path):
    folder = cross_modal(tmp_path / "stories")
    (folder / "0_mutual.wav").unlink()
    (folder / "1_correct.txt").write_text(" \n")
    (folder / "1_incorrect.txt").write_bytes(b"caf\xe9")
    write_wavs(folder, "1_false")
    assert faults_of(folder) == [
        "0_mutual.wav: is missing",
        "1_correct.txt: is empty, there is no text to score",
        "1_false.wav: is no part: names are <base>_mutual.wav, _correct.wav, _incorrect.wav",
        "1_incorrect.txt: is not UTF-8 (byte 3): convert it",
    ]
    (folder / "1_false.wav").unlink()
    assert len(open_benchmark(folder, pairs=["T→S"]).stimuli) == 2


def test_cross_modal_names_and_pairs_that_do_not_exist_are_refused(tmp_path):
    folder = cross_modal(tmp_path / "stories")
    with pytest.raises(ValueError, match="pair is 'speech': choose from S→S, T→T, T→S, S→T"):
        open_benchmark(folder, pairs=["S→S", "speech"])


def test_a_model_without_a_speech_tokenizer_scores_texts_only(tmp_path, model):
    pipeline = SmolTolkPipeline(model, tiny_text_tokenizer())
    benchmark = open_benchmark(words(tmp_path / "dev"))
    with pytest.raises(ValueError, match="swuggy is audio, but the model was kept without a speech tokenizer"):
        benchmark.task(pipeline, protocol=benchmark.protocol)
    stories = open_benchmark(cross_modal(tmp_path / "stories"))
    with pytest.raises(ValueError, match="cross-modal-storycloze is audio, but the model was kept without"):
        stories.task(pipeline, protocol=stories.protocol)
    assert len(list(stories.task(pipeline, protocol=stories.protocol, pairs=["T→T"]).items)) == 2
    twin = open_benchmark(tmp_path / "dev", modality="text")
    assert len(list(twin.task(pipeline, protocol=twin.protocol).items)) == 4


def test_audio_that_is_longer_than_the_context_is_named_not_cut(tmp_path):
    tokenizer = MelTokenizer.fit([sound(seed) for seed in range(3)], num_units=NUM_UNITS)
    model = tiny_model(lm_config=tiny_lm_config(max_position_embeddings=4))
    pipeline = SmolTolkPipeline(model, tiny_text_tokenizer(), tokenizer)
    benchmark = open_benchmark(words(tmp_path / "dev"))
    for settings in (None, ScoringSettings(truncates_prompts=True)):  # there is no prompt to cut
        task = benchmark.task(pipeline, protocol=benchmark.protocol)
        with pytest.raises(ValueError, match=r"item 1 \(A, in\) has \d+ tokens, more than the model's 4 positions"):
            score_task(model, task, protocol=benchmark.protocol, settings=settings)


def test_audio_is_counted_as_it_is_tokenized(tmp_path, model):
    counts = []
    pipeline = SimpleNamespace(model=model, speech_tokenizer=Encoder(), text_ids=lambda text: [len(text)] * 3)
    for benchmark in (open_benchmark(words(tmp_path / "dev")), open_benchmark(cross_modal(tmp_path / "stories"))):
        task = benchmark.task(pipeline, protocol=benchmark.protocol, tokenized=counts.append)
        assert len(list(task.items)) == 4 * (1 + (benchmark.name != "swuggy"))
        assert sum(counts) == len(benchmark.audio_files())
        counts.clear()


def test_checks_note_texts_that_cannot_be_scored_and_parts_of_published_sets(tmp_path):
    folder = words(tmp_path / "lexical" / "dev")
    lines = (folder / "gold.csv").read_text().splitlines()
    (folder / "gold.csv").write_text("\n".join([*lines[:2], lines[2].replace("w1", " "), *lines[3:]]))
    write_gold(tmp_path / "syntactic" / "dev", SENTENCES[:-1], [])
    (tmp_path / "syntactic" / "dev" / "gold.csv").write_text(",".join(SENTENCES[:-1]) + "\nx,1,A,a,b,1\ny,1,A,a,b,0\n")
    write_wavs(tmp_path / "syntactic" / "dev", "x", "y")
    found = {checked.found.task: checked for checked in check_benchmarks(tmp_path)}
    assert [checked.faults for checked in found.values()] == [(), ()]
    assert [str(note) for note in found["swuggy"].notes] == [
        f"{folder}/gold.csv:3: word is empty, there is no text to score"
    ]
    lacks = f"{tmp_path}/syntactic/dev/gold.csv: lacks the column transcription: there are no texts to score"
    assert [str(note) for note in found["sblimp"].notes] == [lacks]
    write_wavs(tmp_path / "sSC", "0_a_correct", "1_a_incorrect")
    (checked,) = check_benchmarks(tmp_path / "sSC")
    assert [str(note) for note in checked.notes] == [f"{tmp_path}/sSC: holds 1 of the 1,871 pairs of the published set"]
    cross_modal(tmp_path / "stories" / "tSC")
    (checked,) = check_benchmarks(tmp_path / "stories")
    assert [str(note) for note in checked.notes] == [
        f"{tmp_path}/stories/tSC: holds 2 of the 1,871 pairs of the published set"
    ]


def test_checks_note_how_many_samples_a_part_of_salmon_has(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "NUM_SALMON_SAMPLES", 2)
    counts = dict.fromkeys(SALMON_PARTS, 2) | {"bg_alignment": 1, "rir_consistency": 3}
    for part, count in counts.items():  # numbers with gaps, as the published ones have
        write_wavs(tmp_path / part, *(f"sample_{5 * i}_{j}" for i in range(count) for j in (0, 1)))
    (checked,) = check_benchmarks(tmp_path)
    assert checked.faults == ()
    assert [str(note).removeprefix(f"{tmp_path}/") for note in checked.notes] == [
        "bg_alignment: holds 1 of the 2 samples of the published set",
        "rir_consistency: holds 3 samples, more than the 2 samples of the published set",
    ]


def test_what_a_folder_holds_is_said_where_it_is_not_clear(tmp_path):
    words(tmp_path / "lexical" / "dev")
    words(tmp_path / "lexical" / "test")
    sentences(tmp_path / "syntactic" / "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds swuggy dev, swuggy test, sblimp dev: choose one by --task and --split"):
        open_benchmark(tmp_path)
    assert open_benchmark(tmp_path, "swuggy", split="test").folder == tmp_path / "lexical" / "test"
    with pytest.raises(ValueError, match="holds no sblimp test, but swuggy dev, swuggy test, sblimp dev"):
        open_benchmark(tmp_path, "sblimp", split="test")
    with pytest.raises(ValueError, match="holds no benchmark, but nothing of a known layout"):
        open_benchmark(tmp_path / "empty")
    for options, message in (({"task": "best"}, "task is 'best'"), ({"modality": "song"}, "modality is 'song'")):
        with pytest.raises(ValueError, match=message):
            open_benchmark(tmp_path, **options)
    with pytest.raises(ValueError, match="is not a folder"):
        open_benchmark(tmp_path / "none")


def test_settings_without_effect_are_refused(tmp_path, score):
    words(tmp_path)
    with pytest.raises(ValueError, match="swuggy has no prompts: leave --pairs out"):
        score(open_benchmark(tmp_path), [], pairs=["S→T"])
    write_wavs(tmp_path / "renamed", "0_a", "1_b")
    with pytest.raises(ValueError, match="swuggy in this layout has no text column"):
        open_benchmark(tmp_path / "renamed", modality="text")


@pytest.fixture
def command(tmp_path):
    """A model with a mel tokenizer, a benchmark, and the command that scores it."""
    tokenizer = MelTokenizer.fit([sound(seed) for seed in range(3)], num_units=NUM_UNITS)
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_text_tokenizer().save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "speech_tokenizer")
    words(tmp_path / "data" / "lexical" / "dev")
    return ["evaluate", str(tmp_path / "model"), str(tmp_path / "data"), "--output", str(tmp_path / "out")]


def test_the_command_scores_a_benchmark_and_writes_its_submission(command, tmp_path, capsys):
    assert cli.main([*command, "--task", "swuggy"]) == 0
    output = capsys.readouterr().out
    assert "swuggy dev: authors" in output
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["num_items"], record["accuracy"]["sWUGGY"]["all"]["n"]) == (4, 3)
    assert len((tmp_path / "out" / "submission" / "lexical" / "dev.txt").read_text().splitlines()) == 8
    before = (tmp_path / "out" / "result.json").read_bytes()
    assert cli.main([*command, "--task", "auto", "--protocol", "authors"]) == 0
    assert (tmp_path / "out" / "result.json").read_bytes() == before
    command[-1] = str(tmp_path / "text")
    assert cli.main([*command, "--modality", "text", "--protocol", "zrc"]) == 0
    assert json.loads((tmp_path / "text" / "result.json").read_text())["task"] == "swuggy-text"


def test_data_check_lists_what_is_wrong_and_where(command, tmp_path, capsys):
    data = tmp_path / "data"
    assert cli.main(["data", "check", str(data)]) == 0
    assert "swuggy dev, 8 sequences, 0 faults" in capsys.readouterr().out
    here = data / "lexical" / "dev"
    (here / "A1w.wav").unlink()
    (here / "A2n.wav").write_bytes((here / "A2n.wav").read_bytes()[:2000])
    assert cli.main(["data", "check", str(data)]) == 1
    output = capsys.readouterr()
    assert f"{here}/A1w.wav is missing" in output.out
    assert f"{here}/A2n.wav: " in output.out
    assert "has faults: swuggy dev (2)" in output.err
    assert cli.main(["data", "check", str(data), "--json"]) == 1
    (record,) = json.loads(capsys.readouterr().out)
    assert (len(record["faults"]), record["notes"]) == (2, [])
    assert cli.main(command) == 1
    assert f"{here}/A1w.wav is missing" in capsys.readouterr().err
