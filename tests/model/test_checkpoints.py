"""Import of foreign checkpoints: what is refused, and how."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import smoltolk

GOLDEN = Path(__file__).parent.parent / "parity"


@pytest.fixture
def parts():
    checkpoint = torch.load(GOLDEN / "ckpt/ckpt_full.pt", weights_only=True)
    args = json.loads((GOLDEN / "full/model_args.json").read_text())
    return checkpoint["model"], checkpoint["model_args"], LlamaConfig(**args["llama_config"])


def test_compile_prefixes_are_removed(parts):
    weights, settings, lm_config = parts
    prefixed = {f"_orig_mod.{name}": w for name, w in weights.items()}
    model = smoltolk.import_checkpoint({"model": prefixed, "model_args": settings}, lm_config)
    assert torch.equal(model.unit_embeddings.weight, weights["audio_embed.0.weight"])


def test_a_checkpoint_of_another_shape_is_refused(parts):
    weights, settings, lm_config = parts
    lm_config.intermediate_size = 100
    with pytest.raises(ValueError, match=r"has shape .* give the lm_config"):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings}, lm_config)


def test_missing_and_unknown_weights_are_named(parts):
    weights, settings, lm_config = parts
    del weights["layer_selector.bias"]
    weights["stray.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing .*projection.bias.*unknown .*stray.weight"):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings}, lm_config)


def test_several_codebooks_are_refused(parts):
    weights, settings, lm_config = parts
    with pytest.raises(ValueError, match="n_codebooks is 8"):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings | {"n_codebooks": 8}}, lm_config)


def test_a_backbone_name_that_cannot_be_resolved_asks_for_lm_config(parts, monkeypatch):
    weights, settings, _ = parts
    settings["backbone"] = "/no/such/folder"
    with pytest.raises(ValueError, match="pass lm_config"):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings})


def test_something_else_than_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks model, model_args"):
        smoltolk.import_checkpoint({"weights": {}})
    with pytest.raises(ValueError, match="is not a file"):
        smoltolk.import_checkpoint(tmp_path / "none.pt")
