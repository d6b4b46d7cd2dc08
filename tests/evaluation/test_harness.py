"""Text tasks of the lm-evaluation-harness: its class beside ours, and reports before and after."""

import hashlib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tests.conftest import TEXT_VOCAB, tiny_model, tiny_text_tokenizer

from smoltolk import SmolTolkForCausalLM, cli
from smoltolk.evaluation import text_tasks
from smoltolk.evaluation.text_tasks import Change, Documents, TextTaskSettings, cells, evaluate_text_tasks

POSITIONS = 256  # of the tiny backbone


@dataclass
class Request:
    """What the harness hands to a model."""

    args: tuple


def words(count, seed=0):
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(TEXT_VOCAB - 2, size=count))


@pytest.fixture(scope="module")
def folders(tiny_world, tmp_path_factory):
    """The backbone, a model whose speech parts alone are other ones, and a model of other weights."""
    made = tmp_path_factory.mktemp("models")
    backbone = tiny_world / "backbone"
    SmolTolkForCausalLM.from_backbone(str(backbone), num_units=9).save_pretrained(made / "speech")
    tiny_model(7).save_pretrained(made / "other")
    for name in ("speech", "other"):
        tiny_text_tokenizer().save_pretrained(made / name)
    return [backbone, made / "speech", made / "other"]


@pytest.fixture(scope="module")
def lms(folders):
    from smoltolk.evaluation.harness import SmolTolkLM

    return [SmolTolkLM(folder, batch_size=3) for folder in folders[:2]]


@pytest.fixture(scope="module")
def hf(folders):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folders[0]), device="cpu", batch_size=2, max_length=POSITIONS - 1)


def test_log_likelihoods_are_those_of_the_harness_on_the_backbone(lms, hf):
    context = words(20)
    texts = [
        (context, " w3"),
        (context, " w4 w5 w6 w7"),
        (context + " ", "w4 w5"),
        (words(3, 1), " w9 w9"),
        ("", "w1 w2 w3"),
        (words(POSITIONS - 3, 2), " w1 w2 w3"),
        (words(300, 3), " w1 w2"),
    ]
    texts.append((context, " " + hf.generate_until([Request((context, {"max_gen_toks": 3}))], disable_tqdm=True)[0]))
    requests = [Request(pair) for pair in texts]
    expected = hf.loglikelihood(requests, disable_tqdm=True)
    assert {greedy for _, greedy in expected} == {True, False}
    for lm in lms:
        before = lm.num_truncated
        with pytest.warns(UserWarning, match="1 of 8 contexts were too long and lost their beginning"):
            found = lm.loglikelihood(requests, disable_tqdm=True)
        assert lm.num_truncated == before + 1
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], atol=1e-4, rtol=0)
    assert lms[0].loglikelihood(requests[:4], disable_tqdm=True) == lms[1].loglikelihood(
        requests[:4], disable_tqdm=True
    )


def test_whole_texts_are_scored_in_windows_as_by_the_harness(lms, hf):
    requests = [Request((text,)) for text in (words(5), words(POSITIONS - 1, 1), words(600, 2))]
    expected = hf.loglikelihood_rolling(requests, disable_tqdm=True)
    for lm in lms:
        np.testing.assert_allclose(lm.loglikelihood_rolling(requests, disable_tqdm=True), expected, rtol=1e-5)
    assert lms[0].loglikelihood_rolling([Request(("",))], disable_tqdm=True) == [0]


def test_texts_are_continued_as_by_the_harness_until_a_stop_string(lms, hf):
    contexts = [words(6), words(9, 1), words(4, 2)]
    how = {"until": ["never"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}
    requests = [Request((context, dict(how))) for context in contexts]
    expected = hf.generate_until([Request((c, {"until": ["never"], "max_gen_toks": 8})) for c in contexts], True)
    for lm in lms:
        assert lm.generate_until(requests, disable_tqdm=True) == expected
    stop = expected[0].split()[2]
    (found,) = lms[1].generate_until([Request((contexts[0], {"until": stop, "max_gen_toks": 8}))], disable_tqdm=True)
    assert found == expected[0][: expected[0].find(stop)]


def test_sampling_follows_the_seed_of_the_harness(lms):
    request = Request((words(6), {"do_sample": True, "top_k": 20, "max_new_tokens": 12}))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found += lms[1].generate_until([request], disable_tqdm=True)
    assert found[0] == found[1] != found[2]


def test_contexts_are_cut_for_what_is_to_come_and_counted(lms):
    before = lms[1].num_truncated
    long, short = words(300), " ".join(words(300).split()[-(POSITIONS - 1 - 10) :])
    with pytest.warns(UserWarning, match="1 of 2 contexts were too long"):
        found = lms[1].generate_until([Request((text, {"max_gen_toks": 10})) for text in (long, short)], True)
    assert found[0] == found[1]
    assert lms[1].get_model_info()["num_truncated"] == lms[1].num_truncated == before + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "the option of generation num_beams is 4, which is not known here"),
        ({"max_gen_toks": POSITIONS}, "max_gen_toks is 256, and a model that reads 255 tokens has no room"),
    ],
)
def test_what_cannot_be_generated_is_refused(lms, settings, message):
    with pytest.raises(ValueError, match=message):
        lms[0].generate_until([Request((words(3), settings))], disable_tqdm=True)


def test_continuations_that_cannot_be_scored_are_refused(lms):
    for continuation, count in ((" " + words(POSITIONS), POSITIONS), ("", 0)):
        with pytest.raises(ValueError, match=f"a continuation has {count} tokens, and 1 to 255 can be scored"):
            lms[0].loglikelihood([Request(("w1", continuation))], disable_tqdm=True)


def test_the_harness_finds_the_class_by_name_and_makes_it_of_strings(folders):
    from lm_eval.api.registry import get_model

    from smoltolk.evaluation.harness import SmolTolkLM

    assert get_model("smoltolk") is SmolTolkLM
    more = {"batch_size": "auto", "max_batch_size": 5, "device": None}
    lm = SmolTolkLM.create_from_arg_string(f"pretrained={folders[1]},autocast=True,max_length=100", more)
    assert (lm.settings.batch_size, lm.settings.autocast, lm.max_length) == (5, True, 100)
    assert lm.get_model_info()["precision"] == "float32, autocast to bfloat16"


def test_the_gpu_that_the_harness_asks_for_by_itself_may_be_missing(folders, monkeypatch):
    from smoltolk.evaluation.harness import SmolTolkLM

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.warns(UserWarning, match="device is 'cuda:0', but torch sees no GPU: computing on the CPU"):
        assert SmolTolkLM(folders[0], device="cuda:0").device.type == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrained": "none"}, "none holds no config.json: give the folder of a SmolTolk model or of a text LM"),
        ({"batch_size": "some"}, "batch_size is 'some'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": POSITIONS}, "max_length is 256: give 1 to 255"),
    ],
)
def test_what_is_no_model_or_no_size_is_refused(folders, changes, message):
    from smoltolk.evaluation.harness import SmolTolkLM

    with pytest.raises(ValueError, match=message):
        SmolTolkLM(**({"pretrained": folders[1]} | changes))


def test_the_harness_has_its_own_command_line(capsys):
    before = list(sys.argv)
    with pytest.raises(SystemExit) as stop:
        cli.main(["lm-eval", "--model", "smoltolk", "--help"])
    assert stop.value.code == 0
    assert "--include_path" in capsys.readouterr().out
    assert sys.argv == before


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys, folders, tmp_path):
    monkeypatch.delitem(sys.modules, "smoltolk.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match=r"pip install 'smoltolk\[harness\]'"):
        importlib.import_module("smoltolk.evaluation.harness")
    assert cli.main(["text-tasks", *map(str, folders), "--tasks", "a", "--output", str(tmp_path)]) == 1
    assert cli.main(["lm-eval", "--model", "smoltolk"]) == 1
    assert capsys.readouterr().err.count("smoltolk[harness]") == 2


def write_tasks(folder):
    """Two tasks of choices, the group of both, and one of whole texts."""
    rng = np.random.default_rng(0)

    def task(name, rows, **settings):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        about = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(about | settings | {"metadata": {"version": 2.0}}))

    for name, count in (("choices", 12), ("more_choices", 5)):
        task(
            name,
            [
                {
                    "question": words(8, i),
                    "choices": [words(2, i + 50), words(3, i + 90)],
                    "label": int(rng.integers(2)),
                }
                for i in range(count)
            ],
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="{{choices}}",
            doc_to_target="label",
            metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        )
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "all_choices", "task": ["choices", "more_choices"], "aggregate_metric_list": [mean]}
    (folder / "group.yaml").write_text(yaml.safe_dump(group | {"metadata": {"version": 1.0}}))
    task(
        "texts",
        [{"text": words(5 + 2 * i, i)} for i in range(8)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    return folder


@pytest.fixture(scope="module")
def evaluated(folders, tmp_path_factory):
    """Folder of tasks, of the report, and the settings."""
    base = tmp_path_factory.mktemp("text-tasks")
    (base / "tasks").mkdir()
    settings = TextTaskSettings(("all_choices", "texts"), include_path=write_tasks(base / "tasks"))
    said = []
    with pytest.MonkeyPatch.context() as patch:  # the harness has pip list all packages after every task
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        changes = evaluate_text_tasks(folders, settings, base / "report", progress=said.append)
    assert said == [f"{task} with {folder}" for folder in folders for task in settings.tasks]
    return settings, base / "report", changes


def test_training_speech_parts_alone_changes_no_text_task(evaluated, folders):
    same = [change for change in evaluated[2] if change.model == str(folders[1])]
    assert {(change.task, change.metric, change.num_documents) for change in same} == {
        ("all_choices", "acc", 17),
        ("choices", "acc", 12),
        ("more_choices", "acc", 5),
        ("texts", "word_perplexity", 8),
        ("texts", "bits_per_byte", 8),
    }
    assert {(change.difference, change.low, change.high, change.p_value) for change in same} == {(0, 0, 0, 1)}


def test_a_report_has_what_both_models_come_to_and_the_interval_of_the_difference(evaluated, folders, lms):
    settings, output, changes = evaluated
    report = json.loads((output / "text-tasks.json").read_text())
    assert [model["model"] for model in report["models"]] == list(map(str, folders))
    assert len({model["checkpoint"] for model in report["models"]}) == 3
    assert report["tasks"]["choices"]["version"] == 2
    assert report["tasks"]["choices"]["num_fewshot"] == 0
    assert {"lm_eval_version", "smoltolk_version", "own_tasks_fingerprint"} <= set(report)
    assert [Change(**change) for change in report["changes"]] == changes
    found = {(change.task, change.metric): change for change in changes if change.model == str(folders[2])}
    texts = [json.loads(line)["text"] for line in (settings.include_path / "texts.jsonl").read_text().splitlines()]
    scores = lms[0].loglikelihood_rolling([Request((text,)) for text in texts], disable_tqdm=True)
    perplexity = found["texts", "word_perplexity"]
    assert perplexity.before == pytest.approx(np.exp(-sum(scores) / len(" ".join(texts).split())), rel=1e-6)
    assert perplexity.higher_is_better is False
    assert perplexity.low <= perplexity.difference == perplexity.after - perplexity.before <= perplexity.high
    assert 0 < perplexity.p_value <= 1
    group = found["all_choices", "acc"]
    parts = [found[name, "acc"] for name in ("choices", "more_choices")]
    assert group.after == pytest.approx(sum(part.after * part.num_documents for part in parts) / 17)
    assert group.low < group.high
    markdown = (output / "text-tasks.md").read_text()
    assert f"| {' | '.join(cells(group))} |" in markdown
    assert "## " + str(folders[2]) in markdown


def test_what_is_done_is_kept_and_the_command_prints_it(evaluated, folders, monkeypatch, capsys):
    settings, output, _ = evaluated
    before = (output / "text-tasks.json").read_bytes()
    monkeypatch.setattr(text_tasks, "_run", None)  # nothing is evaluated again
    command = ["text-tasks", *map(str, folders), "--output", str(output), "--tasks", *settings.tasks]
    assert cli.main([*command, "--include-path", str(settings.include_path)]) == 0
    assert (output / "text-tasks.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert "word_perplexity ↓" in printed
    assert str(output / "text-tasks.md") in printed


def test_what_is_kept_of_other_settings_or_documents_is_refused(evaluated, folders):
    settings, output, _ = evaluated
    others = TextTaskSettings(settings.tasks, include_path=settings.include_path, limit=3)
    with pytest.raises(ValueError, match="was made with limit None, not 3: give another --output"):
        evaluate_text_tasks(folders, others, output)
    path = next(path for path in sorted(output.rglob("texts.json")))
    kept = path.read_text()
    part = json.loads(kept)
    part["tasks"]["texts"]["documents_fingerprint"] = "0"
    path.write_text(json.dumps(part))
    try:
        with pytest.raises(ValueError, match="the models read different documents of texts"):
            evaluate_text_tasks(folders, settings, output)
        path.write_text("{")
        with pytest.raises(ValueError, match=r"texts.json cannot be read: remove it"):
            evaluate_text_tasks(folders, settings, output)
    finally:
        path.write_text(kept)


def test_a_finished_task_whose_data_has_changed_is_refused(evaluated, folders, monkeypatch):
    settings, output, _ = evaluated
    monkeypatch.setattr(text_tasks, "_run", None)  # nothing is evaluated again
    path = settings.include_path / "texts.jsonl"
    before, status = path.read_bytes(), path.stat()
    try:
        path.write_bytes(before.replace(b"w", b"v", 1))
        os.utime(path, (status.st_atime, status.st_mtime))
        with pytest.raises(ValueError, match=r"other data of texts \(test 0: texts.jsonl was \w+, is \w+\): give"):
            evaluate_text_tasks(folders, settings, output)
        path.write_bytes(before)  # of another time: what is read counts, and nothing else
        assert evaluate_text_tasks(folders, settings, output) == evaluated[2]
    finally:
        path.write_bytes(before)


def test_the_data_of_a_task_is_its_files_or_a_revision_of_the_hub(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n')
    source = {"path": "json", "data_files": {"test": str(file)}}
    expected = {"test 0: a.jsonl": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert text_tasks._identity_of_data(source) == expected
    assert text_tasks._source({"dataset_path": "a", "dataset_kwargs": {"revision": "b", "num_proc": 2}}) == {
        "path": "a",
        "name": None,
        "revision": "b",
    }
    assert text_tasks._source({"dataset_path": "a", "custom_dataset": "def f(): …"}) is None
    of_hub = SimpleNamespace(repo_id="a/b", hash="c" * 40)
    monkeypatch.setattr("datasets.load_dataset_builder", lambda path, name: of_hub)
    assert text_tasks._identity_of_data({"path": "a/b", "name": None}) == {"revision": "c" * 40}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, r"tasks is \[\]: give at least one"),
        ({"tasks": ("a", "a")}, "each once"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"include_path": text_tasks.Path("none")}, "include_path is none, which is no folder"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TextTaskSettings(**({"tasks": ("a",)} | changes))


def test_a_task_that_is_nowhere_is_named(evaluated, monkeypatch):
    import lm_eval.tasks

    own = lm_eval.tasks.TaskManager
    # The harness's own index takes half a minute.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **more: own(**more | {"include_defaults": False}))
    settings = TextTaskSettings(("texts", "stories"), include_path=evaluated[0].include_path)
    with pytest.raises(ValueError, match="the task stories is not among the harness's 4: see"):
        text_tasks._task_manager(settings)


def test_one_model_or_one_without_weights_cannot_be_compared(folders, tmp_path):
    settings = TextTaskSettings(("a",))
    for models in (folders[:1], folders[:1] * 2):
        with pytest.raises(ValueError, match="give that before training, at least one after it, and each once"):
            evaluate_text_tasks(models, settings, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no config.json with safetensors"):
        evaluate_text_tasks([folders[0], tmp_path], settings, tmp_path)


def test_standard_errors_are_the_usual_ones():
    right = [1.0, 0.0, 1.0, 1.0, 0.0]
    mean = Documents.find(right, 0.6)
    assert mean.aggregate == "mean"
    assert mean.standard_error() == pytest.approx(np.std(right, ddof=1) / np.sqrt(5))
    scores = np.random.default_rng(0).normal(-3, 1, 400)
    perplexity = Documents.find(list(scores), float(np.exp(-scores.mean())))
    assert perplexity.aggregate == "perplexity"
    drawn = np.exp(-np.random.default_rng(1).choice(scores, (2000, 400)).mean(1)).std()
    assert perplexity.standard_error() == pytest.approx(drawn, rel=0.1)
    lengths = np.random.default_rng(2).integers(5, 50, 400)
    pairs = list(zip((scores * lengths).tolist(), lengths.tolist(), strict=True))
    ratio = float((scores * lengths).sum() / lengths.sum())
    assert Documents.find(pairs, float(np.exp(-ratio))).aggregate == "perplexity"
    bits = Documents.find(pairs, -ratio / float(np.log(2)))
    assert bits.aggregate == "bits"
    rows = np.random.default_rng(3).integers(400, size=(2000, 400))
    drawn = ((scores * lengths)[rows].sum(1) / lengths[rows].sum(1) / np.log(2)).std()
    assert bits.standard_error() == pytest.approx(drawn, rel=0.1)
    assert Documents.find([2.0], 2.0).standard_error() is None


def test_numbers_of_numpy_are_kept_as_numbers():
    kept = json.loads(json.dumps([np.float32(0.5), np.bool_(True), {1}], default=text_tasks._plain))
    assert kept == [0.5, True, "{1}"]


@pytest.mark.parametrize("entries", [[], [["a", "b"]], [[1, 0]], [1.0, 2.0], [[1, 2, 3]], [[1], [1, 2]]])
def test_a_metric_that_is_none_of_its_documents_has_no_error(entries):
    assert Documents.find(entries, 7.0) is None
