"""The demo as a smoke run, and what the README shows on what it leaves behind."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml

from smoltolk import cli
from smoltolk.demo import run
from smoltolk.demo.backbone import BackboneSettings
from smoltolk.demo.report import verdict
from smoltolk.demo.run import run_demo
from smoltolk.experiments.ablation import RATE, load_ablation
from smoltolk.training.config import load_recipe

README = Path("README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo-run"
    command = [sys.executable, "-m", "smoltolk", "demo", "--quick", "--output", str(folder)]
    killed = subprocess.Popen(command)
    while killed.poll() is None and not (folder / "seed-0" / "steps" / "cloze.json").exists():
        time.sleep(0.1)
    killed.kill()  # in the middle of pretraining the backbone: the next run goes on
    killed.wait()
    stamps = {path.name: path.stat().st_mtime_ns for path in (folder / "seed-0" / "steps").glob("*.json")}
    (folder.parent / "stamps-at-kill.json").write_text(json.dumps(stamps))
    subprocess.run(command, check=True, timeout=600)
    return folder


def readme_commands(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def in_demo(demo, monkeypatch):
    monkeypatch.chdir(demo.parent)


@pytest.mark.slow
def test_the_report_is_self_contained_and_holds_every_part(demo):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:audio/mpeg;base64,") >= 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    results = json.loads((demo / "results.json").read_text())
    for model in ("smoltolk", "smoltolk-distilled", "early-fusion"):
        for pair in ("S→S", "T→T", "T→S", "S→T"):
            for kind in ("story", "topic"):
                accuracy = results["summary"][model][pair][kind]
                assert accuracy["n"] == 8
                assert f"{100 * accuracy['accuracy']:.1f} ± {100 * accuracy['standard_error']:.1f}" in page
    assert set(results["summary"]["text-alone"]) == {"T→T"}
    assert [len(sentences) for sentences in results["verdict"].values()] == [8, 8]
    assert all(s in page.replace("&#39;", "'") for sentences in results["verdict"].values() for s in sentences)


@pytest.mark.slow
def test_all_models_saw_the_same_rows(demo):
    curves = json.loads((demo / "results.json").read_text())["seeds"][0]["models"]
    rows = [
        [[line[k] for k in ("tokens", "text_labels", "speech_labels")] for line in curves[name]["curve"]]
        for name in ("smoltolk", "smoltolk-distilled", "early-fusion")
    ]
    assert rows[0] == rows[1] == rows[2]


@pytest.mark.slow
def test_who_ignores_the_context_scores_half(demo):
    items = pq.read_table(demo / "seed-0" / "cloze.parquet").to_pylist()
    for ending in ("text", "units"):
        first, second = items[0::2], items[1::2]
        assert [i[f"true_{ending}"] for i in first] == [i[f"false_{ending}"] for i in second]
        assert [i[f"false_{ending}"] for i in first] == [i[f"true_{ending}"] for i in second]


@pytest.mark.slow
def test_a_killed_run_went_on_without_doing_its_first_steps_again(demo):
    stamps = json.loads((demo.parent / "stamps-at-kill.json").read_text())
    assert {"tokenizer.json", "speech.json", "cloze.json"} <= set(stamps)
    assert stamps == {name: (demo / "seed-0" / "steps" / name).stat().st_mtime_ns for name in stamps}


@pytest.mark.slow
def test_a_second_run_redoes_nothing(demo, capsys):
    before = {path: path.stat().st_mtime_ns for path in (demo / "seed-0").rglob("*.safetensors")}
    assert run_demo(demo, quick=True) == demo / "report.html"
    assert {path: path.stat().st_mtime_ns for path in (demo / "seed-0").rglob("*.safetensors")} == before
    assert capsys.readouterr().out.count("done before") == 8


@pytest.mark.slow
def test_other_settings_in_the_same_folder_are_refused(demo):
    with pytest.raises(ValueError, match="holds a demo of other settings"):
        run_demo(demo)


def test_data_alone_comes_with_a_recipe_to_ablate(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(run, "make_data", lambda miniature, steps: made.append((miniature.folder, miniature.seed)))
    assert cli.main(["demo", "--data-only", "--seeds", "3", "--output", str(tmp_path)]) == 0
    assert made == [(tmp_path / f"seed-{seed}", seed) for seed in range(3)]
    ablation = load_ablation(tmp_path / "ablation.yaml")
    assert ablation.settings.seeds == [0, 1, 2]
    assert ablation.development(2) == tmp_path / "seed-2" / "development.parquet"
    assert ablation.fresh(1) == tmp_path / "seed-1" / "cloze.parquet"
    rates = {variant.name: [setting[RATE] for setting in variant.sweep] for variant in ablation.variants}
    assert rates["smoltolk"] == [7.5e-4, 1.5e-3, 3e-3]
    assert rates["early-fusion"] == [1.5e-3, 3e-3, 6e-3]
    distilled = next(variant for variant in ablation.variants if variant.name == "distilled")
    tried = [ablation.recipe_of(distilled, setting, 0, "out") for setting in distilled.sweep]
    assert [[stage.distillation.hidden_states for stage in recipe.stages] for recipe in tried] == [
        [weight, weight] for weight in (1, 3, 10, 1, 3, 10)
    ]
    recipe = ablation.recipe_of(ablation.base, {}, 2, "out")
    assert recipe.model.backbone == str(tmp_path / "seed-2" / "backbone")
    assert recipe.data.text[0].store == str(tmp_path / "seed-2" / "text-store")
    assert recipe.speech_tokenizer == str(tmp_path / "seed-2" / "speech-tokenizer")
    assert recipe.model.selector_entropy_weight == 0.01
    assert [(stage.steps, stage.decay_steps) for stage in recipe.stages] == [(150, 50), (500, 250)]
    assert recipe.validation.model_dump() == {"rows": 64, "every_steps": 150}
    assert recipe.checkpoint.model_dump() == {"every_steps": 150, "keep_last": 1}


def test_data_for_a_larger_text_lm_comes_with_lower_rates(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(run, "make_data", lambda miniature, steps: made.append(miniature.settings.backbone))
    size = ["--width", "512", "--layers", "10", "--device", "cpu"]
    assert cli.main(["demo", "--data-only", *size, "--output", str(tmp_path)]) == 0
    assert made == [BackboneSettings(512, num_layers=10, num_heads=16, steps=600, learning_rate=1.5e-3 / 4)]
    ablation = load_ablation(tmp_path / "ablation.yaml")
    rates = {variant.name: [setting[RATE] for setting in variant.sweep] for variant in ablation.variants}
    assert rates["smoltolk"] == [7.5e-4 / 4, 1.5e-3 / 4, 3e-3 / 4]
    assert rates["early-fusion"] == [1.5e-3 / 4, 3e-3 / 4, 6e-3 / 4]
    stages = ablation.recipe_of(ablation.base, {}, 0, "out").stages
    assert [stage.learning_rate for stage in stages] == [3e-3 / 4, 1.5e-3 / 4]


def test_a_recipe_for_an_accelerator_leaves_attention_and_threads_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "make_data", lambda miniature, steps: None)
    recipe = yaml.safe_load(
        run.make_ablation_data(tmp_path, device="meta").read_text()
    )  # a device that is always there
    assert recipe["device"] == "meta"
    assert not {"attn_implementation", "num_threads"} & recipe.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data-only", "--width", "100"], "width is 100: give a multiple of a head's 32"),
        (["--data-only", "--layers", "0"], "layers is 0: give 1 or more"),
        (["--data-only", "--device", "nowhere"], "device is 'nowhere'"),
        (["--width", "256"], "belong to --data-only"),
    ],
)
def test_a_size_that_cannot_be_is_refused(tmp_path, options, message, capsys):
    assert cli.main(["demo", *options, "--output", str(tmp_path / "demo")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_readmes_commands_on_the_demos_model_work(demo, in_demo, capsys):
    commands = [
        line
        for block in readme_commands("bash")
        for line in block.splitlines()
        if line.startswith(("smoltolk generate", "smoltolk evaluate")) and "demo-run" in line
    ]
    assert len(commands) == 3
    for command in commands:
        assert cli.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    audio, rate = soundfile.read("ending.wav")
    assert rate == 16000
    assert np.abs(audio).max() > 0
    assert json.loads(Path("demo-run/scores/result.json").read_text())["accuracy"]["S→S"]["story"]["n"] == 8


@pytest.mark.slow
def test_the_readmes_python_works(demo, in_demo):
    (block,) = readme_commands("python")
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102


def test_the_readmes_other_commands_are_commands():
    makefile = Path("Makefile").read_text()
    seen = []
    for block in readme_commands("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line)
            if program == "ray":  # its own job, whose command is ours
                program, *arguments = arguments[arguments.index("--") + 1 :]
            seen.append(program)
            if program == "make":
                assert re.search(rf"^{arguments[0]}:", makefile, flags=re.MULTILINE)
            else:
                assert program == "smoltolk"
                options = cli._parser().parse_args(arguments)
                if options.command == "train":
                    load_recipe(options.recipe)
    assert seen.count("make") == 2


def test_the_verdict_names_who_leads_only_beyond_the_noise():
    def result(mean, low, high):
        difference = {"mean": mean, "low": low, "high": high}
        by_kind = dict.fromkeys(("story", "topic"), difference)
        by_pair = dict.fromkeys(("S→S", "T→T", "T→S", "S→T"), by_kind)
        return {"differences": {"smoltolk - early-fusion": by_pair}}

    def first_sentence(*results):
        return verdict(results, "smoltolk", "early-fusion")[0]

    assert "SmolTolk leads by 10.0 points" in first_sentence(result(0.1, 0.05, 0.15))
    assert "early fusion leads by 10.0 points" in first_sentence(result(-0.1, -0.15, -0.05))
    assert "no clear difference" in first_sentence(result(0.1, -0.05, 0.25))
    assert "SmolTolk leads by 11.0 points" in first_sentence(*(result(m, 0, 0) for m in (0.1, 0.12, 0.11)))
    assert "no clear difference" in first_sentence(*(result(m, 0, 0) for m in (0.1, -0.12, 0.05)))
