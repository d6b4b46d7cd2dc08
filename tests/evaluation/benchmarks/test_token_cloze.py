"""The authors' cross-modal layout: the very tokens are scored, and nothing is guessed."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from tests.conftest import NUM_UNITS, TEXT_VOCAB, tiny_lm_config, tiny_model, tiny_text_tokenizer

from smoltolk import cli
from smoltolk.evaluation.benchmarks.benchmark import BenchmarkError
from smoltolk.evaluation.benchmarks.reading import open_benchmark
from smoltolk.generation.pipeline import SmolTolkPipeline

HEADER = "pair_id,type,correctness"
# Rows of items are not together, and their order tells nothing.
ROWS = ("7,continuation,incorrect", "7,prompt,-", "8,prompt,-", "8,continuation,correct", "8,continuation,incorrect")
ROWS = (*ROWS, "7,continuation,correct")
UNITS = ([3, 4], [1, 2, 1], [5, 6, 7], [8], [9, 10], [NUM_UNITS - 1])
TEXT = ([11], [12, 13], [14], [15, 16], [17, 18, 19], [TEXT_VOCAB - 1])


def write_tokens(folder, samples, end, bin_type="uint16", len_type="uint16"):
    folder.mkdir(parents=True, exist_ok=True)
    whole = [[*sample, end] for sample in samples]
    (folder / "test.bin").write_bytes(np.concatenate(whole).astype(bin_type).tobytes())
    (folder / "test.len").write_bytes(np.array([len(sample) for sample in whole], dtype=len_type).tobytes())


def write_dataset(folder, rows=ROWS, *, units=UNITS, text=TEXT, units_end=NUM_UNITS, text_end=0):
    write_tokens(folder / "mhubert25hzl11", units, units_end)
    write_tokens(folder / "smollm", text, text_end, len_type="uint64")
    (folder / "cross-modal_manifest.csv").write_text("\n".join((HEADER, *rows)) + "\n")
    return folder


def pipeline(**lm_settings):
    return SmolTolkPipeline(tiny_model(lm_config=tiny_lm_config(**lm_settings)), tiny_text_tokenizer())


def task_of(folder, model=None, **options):
    benchmark = open_benchmark(folder, **({"pairs": options["pairs"]} if "pairs" in options else {}))
    return benchmark.task(model or pipeline(), protocol=benchmark.protocol, **options)


def faults_of(folder):
    with pytest.raises(BenchmarkError) as caught:
        open_benchmark(folder)
    return sorted(str(fault).removeprefix(f"{folder}/") for fault in caught.value.faults)


def test_rows_of_the_manifest_are_samples_of_both_folders(tmp_path):
    benchmark = open_benchmark(write_dataset(tmp_path))
    assert (benchmark.name, benchmark.protocol.name) == ("cross-modal-storycloze", "authors-cross-modal")
    assert (benchmark.num_sequences(), benchmark.num_sequences(["S→S"])) == (16, 4)
    model = pipeline()
    offset = model.model.ids.speech_offset
    items = {(item.id, item.labels["pair"]): item for item in benchmark.task(model, protocol=benchmark.protocol).items}
    assert len(items) == 8
    prompt, true, false = ({"S": np.add(UNITS[row], offset), "T": TEXT[row]} for row in (1, 5, 0))
    for pair in ("S→S", "T→T", "T→S", "S→T"):
        item = items["7", pair]
        for candidate, ending in ((item.positive, true), (item.negative, false)):
            np.testing.assert_array_equal(candidate.prompt, prompt[pair[0]])  # without their end tokens
            np.testing.assert_array_equal(candidate.continuation, ending[pair[2]])
    assert items["8", "S→T"].positive.continuation.tolist() == TEXT[3]
    assert json.loads(items["7", "S→T"].content) == ["w10 w11", "w47", "w9"]  # the texts, whatever the tokenizer


def test_the_prefix_is_the_end_of_another_items_text_tokens(tmp_path):
    benchmark = open_benchmark(write_dataset(tmp_path))
    task = benchmark.task(pipeline(), pairs=["S→T"], protocol=replace(benchmark.protocol, num_prefix_tokens=2))
    first = next(iter(task.items))
    assert first.positive.prompt[:2].tolist() in ([16, 0], [19, 0])  # of item 8
    np.testing.assert_array_equal(first.positive.prompt, first.negative.prompt)


def test_only_the_folder_that_is_needed_must_be_there(tmp_path):
    folder = write_dataset(tmp_path)
    (folder / "smollm" / "test.bin").unlink()
    assert len(list(task_of(folder, pairs=["S→S"]).items)) == 2
    with pytest.raises(ValueError, match=r"has no folder with text tokens of the model, which has 50 and .* 0; the"):
        task_of(folder, pairs=["S→T"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"units_end": 500},
            r"no folder with units of the model, which has 20 .* 20; there is mhubert25hzl11 with",
        ),
        ({"units": [[NUM_UNITS + 1], *UNITS[1:]]}, "no folder with units of the model"),
        ({"text_end": 2}, r"no folder with text tokens of the model.*smollm with tokens up to 49 and 2 at the end"),
        ({"text": [[TEXT_VOCAB], *TEXT[1:]]}, "no folder with text tokens of the model"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        task_of(write_dataset(tmp_path, **changes))


def test_what_cannot_be_told_is_not_guessed(tmp_path):
    folder = write_dataset(tmp_path)
    write_tokens(folder / "other", UNITS, NUM_UNITS)
    with pytest.raises(ValueError, match="has 2 folders with units of the model"):
        task_of(folder)
    (folder / "other" / "test.bin").unlink()
    (folder / "smollm" / "test.bin").unlink()
    with pytest.raises(ValueError, match="ends its samples with 20, which ends units and text of the model"):
        task_of(folder, pipeline(eos_token_id=NUM_UNITS))


def test_every_item_has_one_prompt_and_two_endings(tmp_path):
    rows = ["7,prompt,-", "7,prompt,-", "7,continuation,correct", "7,continuation,maybe", "8,story,-", ",prompt,-"]
    remedy = ": give an id, and a prompt or a correct or incorrect continuation"
    assert faults_of(write_dataset(tmp_path, rows)) == [
        "cross-modal_manifest.csv: pair_id 7 needs one incorrect continuation, and has 0 (none)",
        "cross-modal_manifest.csv: pair_id 7 needs one prompt, and has 2 (lines 2, 3)",
        f"cross-modal_manifest.csv:5: pair_id is '7', type 'continuation', correctness 'maybe'{remedy}",
        f"cross-modal_manifest.csv:6: pair_id is '8', type 'story', correctness '-'{remedy}",
        f"cross-modal_manifest.csv:7: pair_id is '', type 'prompt', correctness '-'{remedy}",
    ]


def test_manifests_of_other_columns_or_encodings_are_refused(tmp_path):
    folder = write_dataset(tmp_path)
    (folder / "cross-modal_manifest.csv").write_text("pair_id,kind\n7,prompt\n")
    assert "cross-modal_manifest.csv: lacks the columns type, correctness; it has pair_id, kind" in faults_of(folder)
    (folder / "cross-modal_manifest.csv").write_bytes(HEADER.encode() + b"\ncaf\xe9,prompt,-\n")
    assert any("cross-modal_manifest.csv: is not UTF-8 (byte" in fault for fault in faults_of(folder))
    (folder / "cross-modal_manifest.csv").write_text(HEADER)
    assert "cross-modal_manifest.csv: holds no rows" in faults_of(folder)


def test_folders_that_do_not_belong_to_the_manifest_are_refused(tmp_path):
    folder = write_dataset(tmp_path, units=UNITS[:5], text=[[], [12, 0, 13], *TEXT[2:]])
    (folder / "smollm" / "meta.pkl").write_bytes(pickle.dumps({"eos": 2, "n_q": 8}))
    write_tokens(folder / "broken", UNITS, NUM_UNITS)
    (folder / "broken" / "test.len").write_bytes(np.array([4, 4], dtype="uint16").tobytes())
    found = faults_of(folder)
    assert "mhubert25hzl11: has 5 samples, but the manifest 6 rows: they do not belong together" in found
    assert "smollm: has n_q 8: models have units of one codebook" in found
    assert "smollm: meta.pkl says eos 2, but samples end with 0" in found
    assert "smollm: sample 0 is empty but for its end token" in found
    assert "smollm: sample 1 has the end token 0 inside" in found
    assert any(fault.startswith("broken: ") and "no width gives lengths that add up" in fault for fault in found)
    for name in ("broken", "mhubert25hzl11", "smollm"):
        (folder / name / "test.bin").unlink()
    assert any("has no folder of tokens that can be used, with test.bin and test.len" in f for f in faults_of(folder))


def test_the_commands_check_and_score_a_model_without_a_speech_tokenizer(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_text_tokenizer().save_pretrained(tmp_path / "model")
    folder = write_dataset(tmp_path / "data")
    assert cli.main(["data", "check", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "cross-modal-storycloze, 16 sequences, 0 faults" in output
    assert f"note: {folder}: holds 2 of the 1,871 pairs of the published set" in output
    command = ["evaluate", str(tmp_path / "model"), str(folder), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (record["protocol"], record["num_items"]) == ("authors-cross-modal", 8)
    assert set(record["accuracy"]) == {"S→S", "T→T", "T→S", "S→T"}
    assert cli.main([*command, "--pairs", "S-X"]) == 1
    assert "pair is 'S→X': choose from S→S, T→T, T→S, S→T" in capsys.readouterr().err
