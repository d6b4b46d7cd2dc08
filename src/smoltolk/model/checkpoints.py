"""Import of checkpoints in the format of the SmolTolk authors' research code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from .configuration_smoltolk import SmolTolkConfig
from .modeling_smoltolk import SmolTolkForCausalLM

COMPILE_PREFIX = "_orig_mod."


def import_checkpoint(
    source: str | Path | Mapping[str, Any], lm_config: PreTrainedConfig | str | Path | None = None
) -> SmolTolkForCausalLM:
    """Reads a checkpoint of the authors' code into a `SmolTolkForCausalLM`.

    Their unit vocabulary ends with a padding row, which is kept as a reserved id so that logits and losses
    are theirs to the last column; their text table carries the three control rows.

    Args:
        source: a `torch.save` file, read with `weights_only=True`, or the dict it holds: `model` (weights)
            and `model_args` (settings).
        lm_config: configuration of the text backbone, or the name or path to load it from; by default the
            name in `model_args["backbone"]`.

    Raises:
        ValueError: not such a checkpoint, an unsupported variant, or weights of another shape.
    """
    checkpoint = source if isinstance(source, Mapping) else _read(Path(source))
    missing = {"model", "model_args"} - set(checkpoint)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {', '.join(sorted(missing))}: expected a dict with the weights under "
            "'model' and the settings under 'model_args'"
        )
    settings = checkpoint["model_args"]
    lm_config = _backbone_config(settings, lm_config)
    weights = {name.removeprefix(COMPILE_PREFIX): w for name, w in checkpoint["model"].items()}
    model = SmolTolkForCausalLM(_config(settings, lm_config, weights))
    ours = _rename(weights, model)
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
    return model.eval()


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"source {path} is not a file: give the path of a checkpoint")
    return torch.load(path, map_location="cpu", weights_only=True)


def _backbone_config(settings: Mapping[str, Any], lm_config: PreTrainedConfig | str | Path | None) -> PreTrainedConfig:
    if isinstance(lm_config, PreTrainedConfig):
        return lm_config
    name = settings["backbone"] if lm_config is None else lm_config
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"the backbone {str(name)!r} cannot be resolved here: pass lm_config, the configuration of the "
            "text LM or a folder that holds it"
        ) from error


def _config(settings: Mapping[str, Any], lm_config: PreTrainedConfig, weights: Mapping[str, Tensor]) -> SmolTolkConfig:
    if settings.get("n_codebooks", 1) != 1:
        raise ValueError(
            f"n_codebooks is {settings['n_codebooks']}: SmolTolk models one stream of units; "
            "multi-codebook checkpoints cannot be imported"
        )
    layer_mixing = "last"
    if settings.get("layer_selwa_audio"):
        layer_mixing = "selected"
    elif settings.get("layer_wa_audio"):
        layer_mixing = "static"
    if layer_mixing == "selected" and "layer_selector.weight" not in weights:
        raise ValueError("the checkpoint has a layer selector that is not linear: it cannot be imported")
    selector_input = settings.get("selwa_in_layer")
    num_rows = weights["audio_embed.0.weight"].shape[0]
    return SmolTolkConfig(
        lm_config=lm_config,
        num_units=num_rows - 2,  # then end-of-speech and padding
        num_reserved_speech_tokens=1,
        num_input_adapter_layers=settings["n_audio_in_layers"],
        num_output_adapter_layers=settings["n_audio_out_layers"],
        layer_mixing=layer_mixing,
        selector_input="static" if selector_input is None else selector_input,
        speech_residual=settings["raw_speech_residual"],
        tie_speech_embeddings=settings["tie_audio_embeddings"],
        selector_entropy_weight=settings.get("entropy_reg", 0.0) if layer_mixing == "selected" else 0.0,
    )


def _rename(weights: Mapping[str, Tensor], model: SmolTolkForCausalLM) -> dict[str, Tensor]:
    """Weights under our names; the text table is parted into text and control rows."""
    num_text = model.ids.text_vocab_size
    body = f"lm.{model.lm.base_model_prefix}."
    ours = {}
    for name, weight in weights.items():
        if name == "txt_embed.weight":
            ours[body + "embed_tokens.weight"] = weight[:num_text]
            ours["control_embeddings.weight"] = weight[num_text:]
        elif name == "txt_unembed.weight":
            ours["lm.lm_head.weight"] = weight[:num_text]
        elif name == "audio_embed.0.weight":
            ours["unit_embeddings.weight"] = weight
        elif name == "audio_unembed.0.weight":
            if model.unit_head is not None:
                ours["unit_head.weight"] = weight
        elif name == "layer_weights":
            ours["layer_selector.static_logits"] = weight.flatten()
        elif name.startswith("layer_selector."):
            ours["layer_selector.projection." + name.removeprefix("layer_selector.")] = weight
        elif name.startswith("audio_in_layers."):
            ours["input_adapter.layers." + name.removeprefix("audio_in_layers.")] = weight
        elif name.startswith("audio_out_layers."):
            ours["output_adapter.layers." + name.removeprefix("audio_out_layers.")] = weight
        elif name.startswith("context_model."):
            ours[body + name.removeprefix("context_model.")] = weight
        else:
            ours[name] = weight  # reported as unknown
    return ours
