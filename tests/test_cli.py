"""The command line: exit codes and messages."""

import pytest
import yaml
from tests.conftest import tiny_recipe

from smoltolk import cli


def test_no_command_prints_the_help(capsys):
    assert cli.main([]) == 0
    assert "prepare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "none.yaml"], "recipe none.yaml cannot be read"),
        (["evaluate", "none", "items.parquet", "--output", "out"], "none holds no config.json"),
        (["evaluate", "none", "items.parquet", "--output", "out", "--protocol", "best"], "protocol is 'best'"),
        (["generate", "none", "--text", "a", "--to", "text"], "none holds no config.json"),
        (["generate", "none", "--text", "a", "--to", "speech"], "needs --output"),
        (["demo", "--seeds", "0"], "seeds is 0"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


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

    monkeypatch.setattr(cli, f"_{command[0]}", interrupted)
    assert cli.main(command) == 130
    assert "run the same command to go on" in capsys.readouterr().err


def test_training_by_the_command_line_ends_with_the_models_folder(tiny_world, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tiny_world, tmp_path / "run")))
    assert cli.main(["train", str(path), "--no-progress"]) == 0
    assert f"trained model: {tmp_path / 'run' / 'model'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "model" / "config.json").is_file()
