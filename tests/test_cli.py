"""The command line: exit codes and messages."""

import json
from pathlib import Path

import pytest
import yaml
from tests.conftest import tiny_recipe

from smoltolk import cli
from smoltolk.model.fingerprint import checkpoint_fingerprint

PARITY = Path(__file__).parent / "parity"


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 0
    assert "prepare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "recipe none.yaml cannot be read"),
        (["evaluate", "none", "items.parquet", "--output", "out"], "none is no folder, and no model of this name"),
        (["evaluate", "none", "items.parquet", "--output", "out", "--protocol", "best"], "protocol is 'best'"),
        (
            ["evaluate-generation", "none", "p.jsonl", "--to", "text", "--output", "out"],
            "none is no folder, and no model of this name",
        ),
        (["generate", "none", "--text", "a", "--to", "text"], "none is no folder, and no model of this name"),
        (["generate", "none", "--text", "a", "--to", "speech"], "needs --output"),
        (["generate", "none", "--text", "a", "--to", "text", "--output", "a.txt"], "--to text prints the text"),
        (["generate", "none", "--text", "a", "--to", "speech", "--output", "a.mp3"], "give a name that ends in .wav"),
        (
            ["generate", "none", "--text", "a", "--to", "speech", "--output", "no/a.wav"],
            "no/a.wav lies in no, which",
        ),
        (["generate", ".", "--text", "a", "--to", "text"], ". holds a model of type 'llama'"),
        (["generate", ".", "--text", "a", "--to", "text", "--device", "gpu"], "device is 'gpu', which PyTorch cannot"),
        (["evaluate", ".", "items.parquet", "--output", "out"], ". holds a model of type 'llama'"),
        (["data", "check", "here", "--text-tokenizer", "./none"], "text tokenizer ./none cannot be read"),
        (["prepare", "here", "out", "--text-tokenizer", "./none"], "text tokenizer ./none cannot be read"),
        (["import-checkpoint", "here/a.txt", "out"], "source here/a.txt cannot be loaded with weights_only=True"),
        (["import-checkpoint", "none.pt", "out"], "source none.pt is not a file"),
        (["import-checkpoint", "none.pt", "."], "is not an empty folder"),
        (["data", "check", "none"], "smoltolk data check: none is not a folder"),
        (["import-checkpoint", "none.pt", "here/a.txt/out"], "cannot be read or written (Not a directory): correct"),
        (["export", "none", "out"], "none holds no config.json"),
        (["demo", "--seeds", "0"], "seeds is 0"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "a.txt").write_text("RIFF and so on")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


FOLDERS_TO_WRITE = [
    ["evaluate", "none", "items.parquet"],
    ["evaluate-generation", "none", "prompts.jsonl", "--to", "text"],
    ["text-tasks", "before", "after", "--tasks", "a"],
    ["resynthesize", "here.wav", "--tokenizer", "none", "--vocoder", "none"],
    ["prepare", "none.csv"],
]


@pytest.mark.parametrize("command", FOLDERS_TO_WRITE, ids=lambda command: command[0])
def test_an_output_folder_that_cannot_be_made_is_said_before_the_work(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.wav").touch()
    given = ["here.wav/a/b.wav"] if command[0] in ("resynthesize", "prepare") else ["--output", "here.wav/a"]
    assert cli.main([*command[:2], *given, *command[2:]]) == 1
    assert "lies in here.wav, which is not a folder: give a path in a folder that is there" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["here.wav"]


@pytest.mark.parametrize("command", [["scaling", "none"], ["analyze", "none", "--store", "none"], ["report", "none"]])
def test_a_page_that_cannot_be_written_is_said_before_the_work(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output, message in (
        ("none/page.html", "output none/page.html lies in none, which is not a folder"),
        (".", "output . is a folder: give the name of a file"),
    ):
        assert cli.main([*command, "--output", output]) == 1
        assert message in capsys.readouterr().err
    if command[0] != "report":
        assert cli.main([*command, "--output", "page.json"]) == 1
        assert "output is page.json, which is where the numbers go" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe_key_is_said_on_the_command_line(tiny_world, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tiny_world, tmp_path) | {"sead": 1}))
    assert cli.main(["train", str(path)]) == 1
    assert "sead: unknown key; did you mean seed?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["train", "r.yaml"], ["prepare", "a.csv", "s", "--speech-tokenizer", "t", "--text-tokenizer", "b"]]
)
def test_ctrl_c_says_how_to_resume(command, capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    module = cli.data if command[0] == "prepare" else cli.training
    monkeypatch.setattr(module, f"_{command[0]}", interrupted)
    assert cli.main(command) == 130
    assert "run the same command to go on" in capsys.readouterr().err


def test_training_by_the_command_line_ends_with_the_models_folder(tiny_world, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tiny_world, tmp_path / "run")))
    assert cli.main(["train", str(path), "--no-progress"]) == 0
    assert f"trained model: {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_checkpoint_is_imported_and_exported_by_the_command_line(tmp_path, capsys):
    settings = json.loads((PARITY / "full/model_args.json").read_text())["llama_config"]
    (tmp_path / "lm.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    imported, exported = tmp_path / "imported", tmp_path / "exported"
    command = ["import-checkpoint", str(PARITY / "ckpt/ckpt_full.pt"), str(imported)]
    assert cli.main([*command, "--lm-config", str(tmp_path / "lm.json")]) == 0
    printed = capsys.readouterr().out
    assert f"{imported}: late fusion (2 input adapter layers)" in printed
    assert "40 units, 96 text tokens, torch.float32" in printed
    assert "layer selector: 264 parameters" in printed
    assert sorted(path.name for path in imported.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert cli.main([*command, "--lm-config", str(tmp_path / "lm.json")]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err

    result = {"checkpoint": checkpoint_fingerprint(imported), "task": "cloze", "protocol": "p", "items": "i"}
    (tmp_path / "result.json").write_text(json.dumps(result | {"accuracy": {}}))
    command = ["export", str(imported), str(exported), "--license", "mit", "--results", str(tmp_path)]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == str(exported)
    assert (exported / "modeling_smoltolk.py").is_file()
    (tmp_path / "result.json").write_text(json.dumps(result | {"checkpoint": "another"}))
    command[2] = str(tmp_path / "more")
    assert cli.main(command) == 1
    assert "is no result of this model" in capsys.readouterr().err
    command[-1] = "none.json"
    assert cli.main(command) == 1
    assert "none.json cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_backbone_configuration_that_is_not_there_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "lm.json").write_text("{}")
    for name in ("lm.json", "none"):
        command = ["import-checkpoint", str(PARITY / "ckpt/ckpt_full.pt"), str(tmp_path / "out")]
        assert cli.main([*command, "--lm-config", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{name}' cannot be resolved here: pass lm_config" in error
    assert [path.name for path in tmp_path.iterdir()] == ["lm.json"]
