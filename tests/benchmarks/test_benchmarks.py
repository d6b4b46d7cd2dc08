import argparse

import pytest
import torch
from benchmarks import batches, generate, kill_training, prepare, profile_step, soak, tokenize_speech, train_step
from benchmarks.reference import ReferenceModel
from benchmarks.workload import EARLY_FUSION, interleaved_rows
from tests.conftest import mixed_ids, tiny_model

TINY = ["--size", "tiny", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _keeps_random_state():
    with torch.random.fork_rng():
        yield


def table_rows(text):
    """First cells of the rows of all tables."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]


def test_the_training_benchmark_reports_equal_losses_and_a_row_for_each_shape_and_precision(capsys):
    train_step.main([*TINY, "--shapes", "2x96", "1x160", "--repeats", "1", "--measure", "speed", "--optimizer"])
    text = capsys.readouterr().out
    assert text.count("losses equal the reference's in fp32 within 1e-4") == 2
    assert table_rows(text) == ["shape", "2x96", "2x96", "1x160", "1x160"]


def test_peak_memory_of_a_variant_is_measured_above_the_built_model():
    options = argparse.Namespace(size="tiny", device="cpu", threads=None, attention="sdpa", compile=False)
    peaks = [train_step.peak_memory(name, options, 4, 512, "fp32") for name in ("early fusion", "reference")]
    assert all(peak >= 0 for peak in peaks)


def test_the_generation_benchmark_reports_equal_tokens_and_a_row_for_each_context(capsys):
    lengths = ["--prompt-tokens", "40", "--new-tokens", "6", "--contexts", "32", "64", "--timed-tokens", "2"]
    generate.main([*TINY, "--repeats", "1", "--batches", "1", "2", *lengths])
    text = capsys.readouterr().out
    assert text.count("the same 6 tokens with and without a cache") == 2
    assert table_rows(text) == ["batch", "1", "2", "batch", "1", "1", "batch", "2", "2"]


def test_the_profile_gives_every_part_of_the_model_a_share(capsys):
    profile_step.main([*TINY, "--shape", "2x96", "--dtype", "fp32"])
    rows = table_rows(capsys.readouterr().out)
    assert {"backbone", "input adapter", "layer mix", "output adapter", "optimizer"} <= set(rows)
    assert {"text head, cross-entropy", "unit head, embeddings, rest"} <= set(rows)


def test_the_benchmark_of_tokenizers_has_a_row_for_each_window_batch_and_file(capsys):
    lengths = ["--windows-s", "2", "3", "--batch-sizes", "1", "2", "--files-s", "1"]
    tokenize_speech.main(["--size", "tiny", "--device", "cpu", "--layer", "2", "--repeats", "1", *lengths])
    text = capsys.readouterr().out
    windows = ["windows of 2 s"] * 2 + ["windows of 3 s"] * 2
    loads = ["load_audio, WAV, 16 kHz", "load_audio, FLAC, 44.1 kHz"]
    assert table_rows(text) == ["audio", *windows, "files of 1 s", "what", "mel tokenizer", *loads]
    assert text.count("0.00 %") == 4


def test_the_reference_has_the_losses_and_gradients_of_the_model():
    model = tiny_model().train()
    input_ids = mixed_ids(ids=model.ids)
    gradients = []
    for variant in (model, ReferenceModel(model)):
        model.zero_grad()
        output = variant(input_ids, labels=input_ids)
        output.loss.backward()
        gradients.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-4)


def test_the_reference_refuses_other_settings():
    with pytest.raises(ValueError, match="layer_mixing is 'last'"):
        ReferenceModel(tiny_model(**EARLY_FUSION))


def test_rows_hold_as_much_text_as_speech_and_predict_no_switch():
    ids = tiny_model().ids
    input_ids, labels = interleaved_rows(ids, 16, 512)
    share = (input_ids >= ids.speech_offset).float().mean()
    assert 0.4 < share < 0.6
    assert torch.equal(labels == -100, input_ids == ids.switch_id)


def test_a_shape_of_another_form_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_step.main([*TINY, "--shapes", "512"])
    assert "'512' is not of the form 2x512" in capsys.readouterr().err


def test_the_benchmark_of_batches_reports_a_row_for_each_size_task_and_length(capsys, tmp_path):
    small = ["--utterances", "30", "4096", "--lengths", "64", "--rows", "4", "--repeats", "1", "--start", "fork"]
    batches.main([*small, "--folder", str(tmp_path)])
    rows = table_rows(capsys.readouterr().out)
    assert rows[:4] == ["utterances", "30", "4,096", "rows"]
    assert rows[4:] == ["alternate", "poisson", "coin", "sentence", "speech", "text", "transcription", "synthesis"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("copy", [False, True])
def test_a_simulated_store_has_as_many_utterances_as_it_should(tmp_path, copy):
    base = batches.write_store(
        tmp_path / "base",
        (batches.random_utterance(number) for number in range(20)),
        text_tokenizer_fingerprint="t",
        speech_tokenizer=batches.CARD,
    )
    batches.simulate_store(base, tmp_path / "many", 100, copy=copy)
    store = batches.Store(tmp_path / "many")
    assert len(store) == 100
    assert store[63].units.tolist() == base[3].units.tolist()
    store.verify()


def test_the_benchmark_of_prepare_has_a_row_for_each_length_and_rate(capsys):
    prepare.main(
        ["--lengths", "1", "2", "--rates", "16000", "22050", "--total", "4", "--num-units", "8", "--repeats", "1"]
    )
    text = capsys.readouterr().out
    assert table_rows(text) == [*("file", "1 s", "2 s", "1 s", "2 s")] * 2
    assert "× real time per core" in text


def test_the_soak_reports_the_memory_of_both_kinds_of_processes(capsys, tmp_path):
    soak.main(["--minutes", "0.01", "--sample-s", "0", "--every", "3", "--folder", str(tmp_path)])
    assert table_rows(capsys.readouterr().out) == ["process", "trainer", "loader processes"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_benchmark_of_kills_finds_the_run_without_kills(capsys, tmp_path):
    kill_training.main(["--kills", "2", "--export-kills", "1", "--steps", "30", "--folder", str(tmp_path)])
    text = capsys.readouterr().out
    assert "curve and weights are those of the run without kills, to the last bit" in text
    assert table_rows(text)[0] == "killed while"
