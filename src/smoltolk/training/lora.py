"""LoRA (Hu et al., 2021, arXiv 2106.09685): small matrices learn beside the frozen weights of the text LM.

`y = W x + alpha / rank · B A x` for the linear layers of the text LM's decoder layers; B begins at zero, so that
nothing changes before a step is done.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.training.config import LoraSettings

ADAPTER = "default"  # the name PEFT gives to the one there is


def add_lora(model: SmolTolkForCausalLM, settings: LoraSettings) -> None:
    """Puts LoRA matrices (extra `lora`) into the text LM of a model, in place; they are drawn from torch's generator.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: a name of `target_modules` is that of no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("LoRA needs PEFT, which is not installed: pip install 'smoltolk[lora]'") from error
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=target_names(model, settings.target_modules),
    )
    inject_adapter_in_model(config, model.lm, ADAPTER)
    for layer in lora_layers(model):
        layer.cast_input_dtype_enabled = False  # type: ignore[assignment]  # autocast does it, without another copy


def target_names(model: SmolTolkForCausalLM, wanted: list[str] | None) -> list[str]:
    """Names within the text LM of the linear layers that get LoRA: all of its decoder layers, or those wanted.

    Raises:
        ValueError: a wanted name is that of none of them.
    """
    layers = f"{model.lm.base_model_prefix}.layers"
    linear = [f"{layers}.{name}" for name, module in model.body.layers.named_modules() if isinstance(module, nn.Linear)]
    if wanted is None:
        return linear
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    for name in wanted:
        if name not in known:
            raise ValueError(f"lora.target_modules has {name!r}: the backbone's linear layers are {', '.join(known)}")
    return [name for name in linear if name.rsplit(".", 1)[-1] in wanted]


def lora_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The linear layers with LoRA matrices beside them."""
    return (module for module in model.modules() if hasattr(module, "lora_A"))


def is_lora(name: str) -> bool:
    """Whether a parameter's name is that of a LoRA matrix."""
    return ".lora_A." in name or ".lora_B." in name


def lora_size(model: SmolTolkForCausalLM) -> int:
    """Number of weights of all LoRA matrices."""
    return sum(p.numel() for name, p in model.text_parameters() if is_lora(name))


def use_lora(model: SmolTolkForCausalLM, *, is_on: bool) -> None:
    """Whether the LoRA matrices take part: before their stage they would add zeros, and cost time.

    PEFT also sets which parameters require gradients: say after this what is trained.
    """
    for layer in lora_layers(model):
        layer.enable_adapters(is_on)  # type: ignore[operator]


def merged(model: SmolTolkForCausalLM, weights: dict[str, Any]) -> dict[str, Tensor]:
    """Whole weights of a model with LoRA as those of the same model without.

    Args:
        model: the model, which may be spread over ranks; it stays as it is.
        weights: its state dict, not spread.
    """
    scales = {name: layer.scaling[ADAPTER] for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    plain = {}
    for name, weight in weights.items():
        if is_lora(name):
            continue
        layer, _, kind = name.rpartition(".base_layer.")
        if layer and kind == "weight":
            a, b = (weights[f"{layer}.{matrix}.{ADAPTER}.weight"] for matrix in ("lora_A", "lora_B"))
            weight = weight + scales[layer] * (b @ a)
        plain[name.replace(".base_layer.", ".")] = weight
    return plain
