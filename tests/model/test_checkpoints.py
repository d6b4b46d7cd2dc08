"""Import of foreign checkpoints: every variant, and what is refused."""

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from tests.conftest import EARLY_FUSION, mixed_ids, tiny_lm_config, tiny_model
from transformers import AutoConfig, GPTNeoXConfig, LlamaConfig

import smoltolk

GOLDEN = Path(__file__).parent.parent / "parity"


@pytest.fixture
def parts():
    checkpoint = torch.load(GOLDEN / "ckpt/ckpt_full.pt", weights_only=True)
    args = json.loads((GOLDEN / "full/model_args.json").read_text())
    return checkpoint["model"], checkpoint["model_args"], LlamaConfig(**args["llama_config"])


RENAMED = {
    "control_embeddings.": None,  # rows of the text tables
    "lm.model.embed_tokens.": None,
    "lm.gpt_neox.embed_in.": None,
    "lm.lm_head.": None,
    "lm.embed_out.": None,
    "unit_embeddings.": "audio_embed.0.",
    "unit_head.": "audio_unembed.0.",
    "input_adapter.layers.": "audio_in_layers.",
    "output_adapter.layers.": "audio_out_layers.",
    "layer_selector.projection.": "layer_selector.",
    "layer_selector.level_projection.": "selwa_downproj.",
    "lm.model.": "context_model.",
    "lm.gpt_neox.": "context_model.",
}


def in_the_authors_format(model, **model_args):
    """The inverse of the import: a checkpoint of the authors' code with the weights of our model."""
    config, ids = model.config, model.ids
    control = model.control_embeddings.weight.detach()
    weights = {
        "txt_embed.weight": torch.cat([model.lm.get_input_embeddings().weight.detach(), control]),
        "txt_unembed.weight": torch.cat([model.lm.get_output_embeddings().weight.detach(), control]),
    }
    for name, weight in model.state_dict().items():
        ours = next((prefix for prefix in RENAMED if name.startswith(prefix)), None)
        if name == "layer_selector.static_logits":
            weights["layer_weights"] = weight[:, None, None, None]
        elif RENAMED[ours]:
            weights[RENAMED[ours] + name.removeprefix(ours)] = weight
    weights.setdefault("audio_unembed.0.weight", weights["audio_embed.0.weight"])
    settings = {
        "audio_vocabsize": ids.num_speech_tokens,
        "txt_vocabsize": ids.speech_offset,
        "audio_pad_token": ids.num_speech_tokens - 1,
        "bop_token": ids.bop_id,
        "eop_token": ids.eop_id,
        "swt_token": ids.switch_id,
        "n_audio_in_layers": config.num_input_adapter_layers,
        "n_audio_out_layers": config.num_output_adapter_layers,
        "layer_wa_audio": "layer_weights" in weights,
        "layer_selwa_audio": config.layer_mixing == "selected",
        "raw_speech_residual": config.speech_residual,
        "tie_audio_embeddings": config.tie_speech_embeddings,
        "entropy_reg": config.selector_entropy_weight,
    }
    return {"model": weights, "model_args": settings | model_args}


def assert_same(ours, imported):
    ids = mixed_ids(ids=ours.ids)
    with torch.no_grad():
        a, b = ours(ids), imported(ids)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.layer_weights, b.layer_weights)


TINY_NEOX = GPTNeoXConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=0,
    eos_token_id=0,
)
MLP = {"selector_hidden_size": 32}
LEVELS = {"selector_input": "levels", "selector_level_size": 8}
VARIANTS = {  # our settings, and those of the authors that don't follow from them
    "the paper's": ({}, {}),
    "early fusion": (EARLY_FUSION, {}),
    "no input adapter": ({"num_input_adapter_layers": 0}, {}),
    "no output adapter": ({"num_output_adapter_layers": 0}, {}),
    "one layer in, three out": ({"num_input_adapter_layers": 1, "num_output_adapter_layers": 3}, {}),
    "last level": ({"layer_mixing": "last"}, {}),
    "last level, whatever the selector would see": ({"layer_mixing": "last"}, {"selwa_in_layer": 1}),
    "static weights": ({"layer_mixing": "static"}, {}),
    "selector on the static mix, which goes before a layer": ({}, {"selwa_in_layer": 1}),
    "selector on the last level": ({"selector_input": "last"}, {}),
    "selector on layer 1": ({"selector_input": 0}, {"selwa_in_layer": 1}),
    "selector on layer 2": ({"selector_input": 1}, {"selwa_in_layer": 2}),
    "selector on the last layer but one": ({"selector_input": 1}, {"selwa_in_layer": -2}),
    "selector on the last layer": ({"selector_input": "last"}, {"selwa_in_layer": 3}),
    "MLP selector": (MLP, {"selwa_linear": False}),
    "MLP selector on the last level": (MLP | {"selector_input": "last"}, {"selwa_linear": False}),
    "MLP selector on layer 2": (MLP | {"selector_input": 1}, {"selwa_linear": False, "selwa_in_layer": 2}),
    "selector on all levels": (LEVELS, {"selwa_downproj": 8}),
    "MLP selector on all levels, through MLPs": (
        LEVELS | MLP | {"selector_level_hidden_size": 32},
        {"selwa_downproj": 8, "selwa_downproj_linear": False, "selwa_linear": False},
    ),
    "no residual": ({"speech_residual": False}, {}),
    "untied units": ({"tie_speech_embeddings": False}, {}),
    "untied text": ({"lm_config": tiny_lm_config(tie_word_embeddings=False)}, {}),
    "another family of backbones": ({"lm_config": TINY_NEOX}, {}),
    "entropy": ({"selector_entropy_weight": 0.01}, {}),
    "another rotary base, which their code does not apply": ({}, {"rope_theta": 1e5}),
}


@pytest.mark.parametrize(("settings", "model_args"), VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_of_the_authors_gives_the_same_logits(settings, model_args):
    ours = tiny_model(num_reserved_speech_tokens=1, **settings)
    checkpoint = in_the_authors_format(ours, **model_args)
    imported = smoltolk.import_checkpoint(checkpoint, ours.config.lm_config)
    assert_same(ours, imported)
    assert imported.config.selector_entropy_weight == ours.config.selector_entropy_weight


def test_static_weights_that_a_selector_on_all_levels_does_not_use_are_left_out():
    ours = tiny_model(num_reserved_speech_tokens=1, **LEVELS)
    checkpoint = in_the_authors_format(ours, selwa_downproj=8, layer_wa_audio=True)
    checkpoint["model"]["layer_weights"] = torch.zeros(3, 1, 1, 1)
    assert_same(ours, smoltolk.import_checkpoint(checkpoint, ours.config.lm_config))


def test_settings_that_are_not_given_have_the_authors_defaults():
    ours = tiny_model(num_reserved_speech_tokens=1, **EARLY_FUSION)
    checkpoint = in_the_authors_format(ours)
    assert_same(ours, smoltolk.import_checkpoint(checkpoint | {"model_args": {}}, ours.config.lm_config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_one_lower_dtype_keep_it_also_on_disk(dtype, tmp_path):
    ours = tiny_model(num_reserved_speech_tokens=1)
    for parameter in ours.parameters():
        parameter.data = parameter.data.to(dtype)
    imported = smoltolk.import_checkpoint(in_the_authors_format(ours), ours.config.lm_config)
    assert {p.dtype for p in imported.parameters()} == {dtype}
    assert_same(ours, imported)
    imported.save_pretrained(tmp_path)
    loaded = smoltolk.SmolTolkForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert_same(ours, loaded)


def test_weights_of_mixed_dtypes_become_float32():
    ours = tiny_model(num_reserved_speech_tokens=1)
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16().half().float()  # which all three hold exactly
    checkpoint = in_the_authors_format(ours)
    dtypes = itertools.cycle([torch.bfloat16, torch.float16, torch.float32])
    checkpoint["model"] = {name: w.to(dtype) for (name, w), dtype in zip(checkpoint["model"].items(), dtypes)}  # noqa: B905
    imported = smoltolk.import_checkpoint(checkpoint, ours.config.lm_config)
    assert {p.dtype for p in imported.parameters()} == {torch.float32}
    assert_same(ours, imported)


def test_compile_prefixes_are_removed_wherever_they_stand(parts):
    weights, settings, lm_config = parts
    prefixed = {f"_orig_mod.{name.replace('layers.0.', 'layers.0._orig_mod.')}": w for name, w in weights.items()}
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


def test_a_backbone_name_that_cannot_be_resolved_asks_for_lm_config(parts):
    weights, settings, _ = parts
    for backbone in ("/no/such/folder", ""):
        settings["backbone"] = backbone
        with pytest.raises(ValueError, match=f"{backbone!r} cannot be resolved here: pass lm_config"):
            smoltolk.import_checkpoint({"model": weights, "model_args": settings})


def test_the_authors_folder_of_backbones_is_the_hubs(parts, monkeypatch):
    weights, settings, lm_config = parts
    names = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: names.append(name) or lm_config)
    settings["backbone"] = "./models/SmolLM-135M"
    smoltolk.import_checkpoint({"model": weights, "model_args": settings})
    assert names == ["HuggingFaceTB/SmolLM-135M"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_residual": True, "x": 0}, r"settings that are not known: gate_residual = True; if"),
        ({"selwa_in_layer": 0, "layer_wa_audio": False}, r"selwa_in_layer is 0: .* only at layers 1 to 4"),
        ({"selwa_in_layer": 5, "layer_wa_audio": False}, r"selwa_in_layer is 5"),
        ({"swt_token": 90}, r"swt_token is 90, but 98 with the backbone's vocab_size of 96 .* give the lm_config"),
        ({"audio_pad_token": 40}, r"audio_pad_token is 40, but 41"),
    ],
)
def test_settings_that_would_change_the_function_are_refused_by_name(parts, change, message):
    weights, settings, lm_config = parts
    with pytest.raises(ValueError, match=message):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings | change}, lm_config)


@pytest.mark.parametrize(("modality", "name"), [("speech", "audio_embed.0.weight"), ("text", "txt_embed.weight")])
def test_a_model_of_one_modality_is_refused(parts, modality, name):
    weights, settings, lm_config = parts
    del weights[name]
    with pytest.raises(ValueError, match=f"no {name}: a model without {modality}"):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings}, lm_config)


def test_quantised_weights_are_refused(parts):
    weights, settings, lm_config = parts
    weights["layer_selector.weight"] = weights["layer_selector.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"layer_selector\.weight is of dtype torch\.int8"):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings}, lm_config)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("audio_unembed.0.weight", "tie_audio_embeddings to False"), ("txt_unembed.weight", "tie_word_embeddings=False")],
)
def test_tables_that_differ_are_not_made_one(parts, name, remedy):
    weights, settings, lm_config = parts
    weights[name] = weights[name] + 1
    with pytest.raises(ValueError, match=f"{name} differ, .*{remedy}"):
        smoltolk.import_checkpoint({"model": weights, "model_args": settings}, lm_config)


def test_something_else_than_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks model, model_args"):
        smoltolk.import_checkpoint({"weights": {}})
    with pytest.raises(ValueError, match="is not a file"):
        smoltolk.import_checkpoint(tmp_path / "none.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="lacks model, model_args"):
        smoltolk.import_checkpoint(tmp_path / "list.pt")


def test_a_file_that_could_run_code_or_is_damaged_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = (GOLDEN / "ckpt/ckpt_full.pt").read_bytes()
    torch.save({"model": {}, "model_args": tmp_path}, path)  # a Path is an object of Python's
    for content in (path.read_bytes(), pickle.dumps(Path, protocol=2), b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be loaded with weights_only=True"):
            smoltolk.import_checkpoint(path)
