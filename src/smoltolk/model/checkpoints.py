"""Import of checkpoints in the format of the SmolTolk authors' research code."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from .configuration_smoltolk import SmolTolkConfig
from .modeling_smoltolk import SmolTolkForCausalLM

COMPILE_PREFIX = "_orig_mod."
LOWER_DTYPES = (torch.bfloat16, torch.float16)

# The authors' settings that decide what a model computes, with their defaults.
DEFAULTS: dict[str, Any] = {
    "n_codebooks": 1,
    "n_audio_in_layers": 0,
    "n_audio_out_layers": 0,
    "layer_wa_audio": False,
    "layer_selwa_audio": False,
    "selwa_in_layer": None,
    "raw_speech_residual": False,
    "tie_audio_embeddings": True,
    "entropy_reg": 0.0,
}
# Their other settings: seen in the weights, checked against the id space, or without effect on what is computed
# (rope_theta too: their rotary table is made again from the backbone's own value).
OTHER_SETTINGS = {
    *("selwa_linear", "selwa_downproj", "selwa_downproj_linear", "audio_vocabsize", "txt_vocabsize"),
    *("audio_pad_token", "bop_token", "eop_token", "swt_token", "backbone"),
    *("block_size", "warm_init", "freeze_backbone", "freeze_txt_inout", "rope_theta"),
    *("torch_dtype", "attn_implementation"),
}


def import_checkpoint(
    source: str | Path | Mapping[str, Any], lm_config: PreTrainedConfig | str | Path | None = None
) -> SmolTolkForCausalLM:
    """Reads a checkpoint of the authors' code into a `SmolTolkForCausalLM`.

    Their unit vocabulary ends with a padding row, which is kept as a reserved id so that logits and losses
    are theirs to the last column; their text table carries the three control rows. The model is in bfloat16
    or float16 when all weights are, and in float32, which holds both exactly, when they are mixed.

    Args:
        source: a `torch.save` file, read with `weights_only=True`, or the dict it holds: `model` (weights)
            and `model_args` (settings).
        lm_config: configuration of the text backbone, or the name or path to load it from; by default the
            name in `model_args["backbone"]`.

    Raises:
        ValueError: not such a checkpoint, an unsupported variant, a setting that is not known, or weights of
            another shape.
    """
    checkpoint = source if isinstance(source, Mapping) else _read(Path(source))
    missing = {name for name in ("model", "model_args") if not isinstance(checkpoint.get(name), Mapping)}
    if missing:
        raise ValueError(
            f"the checkpoint lacks {', '.join(sorted(missing))}: expected a dict with the weights under "
            "'model' and the settings under 'model_args', both dicts"
        )
    settings = _settings(checkpoint["model_args"])
    weights = {name.replace(COMPILE_PREFIX, ""): w for name, w in checkpoint["model"].items()}
    _check_weights(weights)
    model = SmolTolkForCausalLM(_config(settings, _backbone_config(settings, lm_config), weights))
    _check_ids(settings, model)
    _load(_rename(weights, model), model)
    _check_ties(weights, model)
    dtype = _dtype(weights)
    for parameter in model.parameters():  # not the buffers: rotary positions stay in float32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"source {path} is not a file: give the path of a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError) as error:
        raise ValueError(
            f"source {path} cannot be loaded with weights_only=True: it is damaged, or holds Python objects, which "
            "could run code; if you trust it, load it yourself and pass a dict of its 'model' and 'model_args'"
        ) from error
    return checkpoint if isinstance(checkpoint, Mapping) else {}


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the authors' defaults for what is not given."""
    unknown = sorted(name for name in given.keys() - DEFAULTS - OTHER_SETTINGS if given[name])
    if unknown:
        raise ValueError(
            f"model_args has settings that are not known: {', '.join(f'{n} = {given[n]!r}' for n in unknown)}; "
            "if they don't change what the model computes, pass the checkpoint as a dict without them"
        )
    settings = DEFAULTS | {name: value for name, value in given.items() if value is not None}
    if settings["n_codebooks"] != 1:
        raise ValueError(
            f"n_codebooks is {settings['n_codebooks']}: SmolTolk models one stream of units; "
            "multi-codebook checkpoints cannot be imported"
        )
    return settings


def _check_weights(weights: Mapping[str, Tensor]) -> None:
    for name, what in (("audio_embed.0.weight", "speech"), ("txt_embed.weight", "text")):
        if name not in weights:
            raise ValueError(f"the checkpoint has no {name}: a model without {what} cannot be imported")
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise ValueError(f"{name} is of dtype {weight.dtype}: give the weights before they were quantised")


def _dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {weight.dtype for weight in weights.values()}
    return next((dtype for dtype in LOWER_DTYPES if dtypes == {dtype}), torch.float32)


def _backbone_config(settings: Mapping[str, Any], lm_config: PreTrainedConfig | str | Path | None) -> PreTrainedConfig:
    if isinstance(lm_config, PreTrainedConfig):
        return lm_config
    # The authors keep copies of the hub's SmolLMs under ./models.
    name = settings.get("backbone", "").replace("./models", "HuggingFaceTB") if lm_config is None else lm_config
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the backbone {str(name)!r} cannot be resolved here: pass lm_config, the configuration of the "
            "text LM or a folder that holds it"
        ) from error


def _config(settings: Mapping[str, Any], lm_config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> SmolTolkConfig:
    layer_mixing = "last"
    selector: dict[str, Any] = {}
    if settings["layer_selwa_audio"]:
        layer_mixing = "selected"
        selector = _selector_settings(settings, lm_config.num_hidden_layers, weights)
    elif settings["layer_wa_audio"]:
        layer_mixing = "static"
    return SmolTolkConfig(
        lm_config=lm_config,
        num_units=weights["audio_embed.0.weight"].shape[0] - 2,  # then end-of-speech and padding
        num_reserved_speech_tokens=1,
        num_input_adapter_layers=settings["n_audio_in_layers"],
        num_output_adapter_layers=settings["n_audio_out_layers"],
        layer_mixing=layer_mixing,
        speech_residual=bool(settings["raw_speech_residual"]),
        tie_speech_embeddings=bool(settings["tie_audio_embeddings"]),
        **selector,
    )


def _selector_settings(settings: Mapping[str, Any], num_layers: int, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings of the layer selector; its sizes are read from the weights."""

    def hidden_size(name: str) -> int | None:
        return weights[f"{name}.0.weight"].shape[0] if f"{name}.0.weight" in weights else None

    found = {
        "selector_hidden_size": hidden_size("layer_selector"),
        "selector_entropy_weight": settings["entropy_reg"],
    }
    last_of_projection = weights.get("selwa_downproj.2.weight", weights.get("selwa_downproj.weight"))
    if last_of_projection is not None:
        return found | {
            "selector_input": "levels",
            "selector_level_size": last_of_projection.shape[0],
            "selector_level_hidden_size": hidden_size("selwa_downproj"),
        }
    if settings["layer_wa_audio"]:  # goes before selwa_in_layer in their code
        return found | {"selector_input": "static"}
    level = settings["selwa_in_layer"]
    if level is None:
        return found | {"selector_input": "last"}
    # They count h⁰ too, so layer 1 is the first one's output, and from the end as Python does.
    index = level + num_layers if level < 0 else level - 1
    if not 0 <= index < num_layers:
        raise ValueError(
            f"selwa_in_layer is {level}: a selector that looks at the backbone's input cannot be imported, "
            f"only at layers 1 to {num_layers}"
        )
    return found | {"selector_input": "last" if index == num_layers - 1 else index}


def _check_ids(settings: Mapping[str, Any], model: SmolTolkForCausalLM) -> None:
    ids = model.ids
    expected = {
        "bop_token": ids.bop_id,
        "eop_token": ids.eop_id,
        "swt_token": ids.switch_id,
        "audio_pad_token": ids.num_speech_tokens - 1,
    }
    for name, value in expected.items():
        if settings.get(name) not in (None, value):
            raise ValueError(
                f"{name} is {settings[name]}, but {value} with the backbone's vocab_size of {ids.text_vocab_size} "
                f"and {ids.num_speech_tokens} rows of units: give the lm_config it was trained with"
            )


def _load(ours: Mapping[str, Tensor], model: SmolTolkForCausalLM) -> None:
    expected = model.state_dict()
    for name, weight in ours.items():
        if name in expected and expected[name].shape != weight.shape:
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)} in the checkpoint, but the model built from its "
                f"model_args and lm_config wants {tuple(expected[name].shape)}: "
                "give the lm_config it was trained with"
            )
    result = model.load_state_dict(ours, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise ValueError(
            f"the checkpoint does not fit its model_args: missing {result.missing_keys}, "
            f"unknown {result.unexpected_keys}"
        )


def _check_ties(weights: Mapping[str, Tensor], model: SmolTolkForCausalLM) -> None:
    """Two tables of the checkpoint that are one in the model must be equal."""
    are_units_tied = model.unit_head is None
    is_text_tied = model.lm.get_output_embeddings().weight is model.lm.get_input_embeddings().weight
    for a, b, is_tied, remedy in (
        ("audio_embed.0.weight", "audio_unembed.0.weight", are_units_tied, "set tie_audio_embeddings to False"),
        ("txt_embed.weight", "txt_unembed.weight", is_text_tied, "give an lm_config with tie_word_embeddings=False"),
    ):
        num_rows = model.ids.text_vocab_size if a.startswith("txt") else None
        if is_tied and b in weights and not torch.equal(weights[a][:num_rows].float(), weights[b][:num_rows].float()):
            raise ValueError(f"{a} and {b} differ, but the model's settings make them one: {remedy}")


def _rename(weights: Mapping[str, Tensor], model: SmolTolkForCausalLM) -> dict[str, Tensor]:
    """Weights under our names; the text table is parted into text and control rows."""
    num_text = model.ids.text_vocab_size
    body = f"lm.{model.lm.base_model_prefix}."
    names = {module: name for name, module in model.named_modules()}
    modules = {
        "layer_selector.": "layer_selector.projection.",
        "selwa_downproj.": "layer_selector.level_projection.",
        "audio_in_layers.": "input_adapter.layers.",
        "audio_out_layers.": "output_adapter.layers.",
        "context_model.": body,
    }
    ours = {}
    for name, weight in weights.items():
        if name == "txt_embed.weight":
            ours[names[model.lm.get_input_embeddings()] + ".weight"] = weight[:num_text]
            ours["control_embeddings.weight"] = weight[num_text:]
        elif name == "txt_unembed.weight":
            ours[names[model.lm.get_output_embeddings()] + ".weight"] = weight[:num_text]
        elif name == "audio_embed.0.weight":
            ours["unit_embeddings.weight"] = weight
        elif name == "audio_unembed.0.weight":
            if model.unit_head is not None:
                ours["unit_head.weight"] = weight
        elif name == "layer_weights":
            if model.config.selector_input != "levels":  # they make it, and don't use it
                ours["layer_selector.static_logits"] = weight.flatten()
        else:
            module = next((module for module in modules if name.startswith(module)), "")
            ours[modules.get(module, "") + name.removeprefix(module)] = weight  # others are reported as unknown
    return ours
