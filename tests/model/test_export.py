"""The folder that is made to be shared: it loads where smoltolk is not, and its card tells what is known."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.conftest import mixed_ids, tiny_lm_config, tiny_recipe, tiny_text_tokenizer

import smoltolk
from smoltolk import SmolTolkConfig, SmolTolkForCausalLM
from smoltolk.model.card import describe, public_name
from smoltolk.model.export import CODE, load_model, new_folder
from smoltolk.speech.mel import MelTokenizer
from smoltolk.speech.mel_vocoder import MelVocoder
from smoltolk.training.config import Recipe
from smoltolk.training.trainer import Trainer

# Run in a process of its own, beside the exported folder, where smoltolk cannot be imported.
ELSEWHERE = """
import re, sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "smoltolk":
            raise ImportError("smoltolk is not installed here")

sys.meta_path.insert(0, Block())
try:
    import smoltolk
except ImportError:
    pass
else:
    raise SystemExit("smoltolk was found")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained("shared", trust_remote_code=True)
assert type(AutoConfig.from_pretrained("shared", trust_remote_code=True)).__module__.startswith("transformers_modules")
given = load_file("given.safetensors")
with torch.no_grad():
    output = model(given["ids"])
generated = model.generate(given["ids"], do_sample=False, max_new_tokens=10, min_new_tokens=10)
(usage, _) = re.findall(r"```python\\n(.*?)```", Path("shared/README.md").read_text(), flags=re.DOTALL)
snippet = {}
exec(usage, snippet)
found = {"logits": output.logits, "layer_weights": output.layer_weights.contiguous(), "generated": generated}
save_file(found | {"units": snippet["units"]}, "found.safetensors")
"""


def sound(seed):
    return np.random.default_rng(seed).normal(0, 0.1, 16_000).astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model with all that may lie beside it, but no training record."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tokenizer = MelTokenizer.fit([sound(seed) for seed in range(3)], num_units=8)
    torch.manual_seed(0)
    config = SmolTolkConfig(
        lm_config=tiny_lm_config(_name_or_path="/home/somebody/backbone"),
        num_units=8,
        selector_hidden_size=16,
        speech_tokenizer=tokenizer.card(),
    )
    SmolTolkForCausalLM(config).save_pretrained(folder)
    tiny_text_tokenizer().save_pretrained(folder)
    tokenizer.save(folder / "speech_tokenizer")
    pairs = [(tokenizer.encode(sound(0)), sound(0))]
    MelVocoder.fit(pairs, tokenizer, steps=1).save(folder / "vocoder")
    return folder


@pytest.fixture(scope="module")
def shared(source, tmp_path_factory):
    return smoltolk.export_model(source, tmp_path_factory.mktemp("export") / "shared", license="apache-2.0")


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory):
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("run") / "tiny"
    return Trainer(Recipe.model_validate(tiny_recipe(tiny_world, output)), progress=False).run()


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


def test_the_exported_folder_gives_the_same_numbers_where_smoltolk_is_not_installed(source, shared, tmp_path):
    from safetensors.torch import save_file

    model = SmolTolkForCausalLM.from_pretrained(source)
    ids = mixed_ids(ids=model.ids)
    with torch.no_grad():
        output = model(ids)
    generated = model.generate(ids, do_sample=False, max_new_tokens=10, min_new_tokens=10)
    shutil.copytree(shared, tmp_path / "shared")
    save_file({"ids": ids}, tmp_path / "given.safetensors")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert "Do you wish to run the custom code?" not in process.stdout
    found = load_file(tmp_path / "found.safetensors")
    assert torch.equal(found["logits"], output.logits)
    assert torch.equal(found["layer_weights"], output.layer_weights)
    assert torch.equal(found["generated"], generated)
    assert 0 <= found["units"].min() <= found["units"].max() <= model.ids.num_units


def test_the_cards_use_of_the_pipeline_runs(shared, tmp_path, monkeypatch):
    shutil.copytree(shared, tmp_path / "shared")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(shared)[1], "README.md", "exec"), {})  # noqa: S102
    assert (tmp_path / "speech.wav").stat().st_size > 44


def test_the_folder_holds_safetensors_code_tokenizers_and_card(source, shared):
    names = {str(path.relative_to(shared)) for path in shared.rglob("*") if path.is_file()}
    kept = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert names == kept | {*CODE, "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    config = json.loads((shared / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_smoltolk.SmolTolkConfig",
        "AutoModelForCausalLM": "modeling_smoltolk.SmolTolkForCausalLM",
    }
    assert "somebody" not in (shared / "config.json").read_text()


def test_an_exported_folder_can_be_exported_again(shared, tmp_path):
    again = smoltolk.export_model(shared, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (shared / "model.safetensors").read_bytes()


def test_a_card_without_a_record_says_so(shared):
    card = (shared / "README.md").read_text()
    assert "No record of the training was kept with this model." in card
    assert "No results were given." in card
    assert "a selector with a hidden layer that looks at the static average" in card
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["license"] == "apache-2.0"
    model = SmolTolkForCausalLM.from_pretrained(shared)
    assert f"| all | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert f"| {model.ids.switch_id} | switch" in card
    assert f"| fingerprint | {model.config.speech_tokenizer['fingerprint']} |" in card


def test_the_card_of_a_trained_model_tells_its_training_and_results(trained, tmp_path):
    accuracy = {"n": 40, "accuracy": 0.625, "standard_error": 0.1, "low": 0.5, "high": 0.75, "num_ties": 0}
    result = {
        "task": "cloze",
        "protocol": "continuation-mean",
        "items": "/home/somebody/cloze.parquet",
        "checkpoint": "0",
        "accuracy": {"S→T": {"story": accuracy}},
    }
    card = (smoltolk.export_model(trained, tmp_path / "tiny", results=[result]) / "README.md").read_text()
    record = json.loads((trained / "training.json").read_text())
    metrics = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    assert f"{record['tokens']:,} tokens, {record['flops']:.3g} FLOPs" in card
    assert "9 steps" in card
    for step in (4, 9):  # the ends of the stages
        losses = [f"{task} {metrics[step - 1][f'validation_{task}_loss']:.4f}" for task in ("interleaved", "text")]
        assert losses[0] in card
        assert losses[1] in card
    assert "| 2 | everything | 5 | 4 × 32 | interleaved 1, speech 1, text 1 | 0.001, text 0.001 |" in card
    assert "| interleaved | store (1) |" in card
    assert "| cloze | cloze.parquet | continuation-mean | S→T | story | 40 | 62.5 | 50.0 … 75.0 |" in card
    assert str(trained.parent.parent) not in card
    assert "somebody" not in card
    assert "license" not in yaml.safe_load(card.split("---")[1])


def test_a_record_of_before_validation_losses_were_kept_still_makes_a_card(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "old")
    record = json.loads((trained / "training.json").read_text())
    del record["validation_losses"]
    (tmp_path / "old" / "training.json").write_text(json.dumps(record))
    card = (smoltolk.export_model(tmp_path / "old", tmp_path / "new") / "README.md").read_text()
    assert card.count("| not recorded |") == 2


def test_without_a_text_tokenizer_the_card_uses_ids(source, tmp_path):
    shutil.copytree(
        source, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*", "speech_tokenizer", "vocoder")
    )
    exported = smoltolk.export_model(tmp_path / "bare", tmp_path / "exported")
    (usage,) = blocks(exported)
    assert "AutoTokenizer" not in usage
    compile(usage, "README.md", "exec")


def test_a_destination_that_holds_something_is_refused_and_left_alone(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    for destination in (tmp_path / "full", tmp_path / "full" / "note.txt"):
        with pytest.raises(ValueError, match="exists and is not an empty folder: give another"):
            smoltolk.export_model(source, destination)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "note.txt"]


def test_a_folder_that_fails_half_way_leaves_nothing(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(OSError, match="the disk is full"):
        smoltolk.export_model(source, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "new").mkdir()
    with new_folder(tmp_path / "new") as folder:
        (folder / "whole").write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "whole"]


def test_something_else_than_a_whole_model_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="a model of type 'llama'"):
        load_model(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_input_adapter_layers": 3}))
    with pytest.raises(ValueError, match=r"not those of its config.json: .*missing_keys.*input_adapter\.layers\.2"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_units": 9}))
    with pytest.raises(ValueError, match=r"mismatched_keys.*unit_embeddings"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "late fusion (2 input adapter layers), speech from levels selected per position by a linear selector"),
        ({"selector_input": 1}, "looks at layer index 1, 2 output adapter layers, raw residual, unit head tied"),
        ({"layer_mixing": "static", "num_input_adapter_layers": 0}, "early fusion, speech from a static average"),
        ({"num_output_adapter_layers": 0, "speech_residual": False}, "no output adapter, no residual"),
    ],
)
def test_a_variant_is_told_in_words(settings, words):
    assert words in describe(SmolTolkConfig(lm_config=tiny_lm_config(), **settings))


def test_only_the_last_part_of_a_path_is_made_public():
    names = ["HuggingFaceTB/SmolLM-135M", "backbone", "/home/me/lm", "./lm", "runs/seed-0/lm", "~/lm", r"C:\me\lm"]
    assert [public_name(name) for name in names[:6]] == [*names[:2], "lm", "lm", "lm", "lm"]
    assert public_name(names[6]).endswith("lm")
