"""Parameter groups, learning-rate schedule, and the account of training FLOPs."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from smoltolk.model.configuration_smoltolk import SmolTolkConfig
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.training.config import StageSettings
from smoltolk.training.lora import is_lora

UNITS_PER_WORD, TEXT_TOKENS_PER_WORD = 5, 1.3  # of spoken English at 25 Hz without repetitions, roughly
SPEECH_SHARE = {"interleaved": 0.5, "speech": 1.0, "text": 0.0}  # of the tokens of a task's rows, roughly


def trained_parts(model: SmolTolkForCausalLM, stage: StageSettings) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Named parameters that a stage trains, "speech" and, unless it is frozen, "text": the text LM or its LoRA."""
    parts = {"speech": list(model.speech_parameters())}
    if stage.train == "everything":
        parts["text"] = list(model.text_parameters())
    elif stage.train == "lora":
        parts["text"] = [(name, parameter) for name, parameter in model.text_parameters() if is_lora(name)]
    return parts


def make_optimizer(model: SmolTolkForCausalLM, stage: StageSettings) -> torch.optim.AdamW:
    """AdamW for a stage, with all that it does not train frozen.

    Speech parts and text LM are groups of their own, each parted by weight decay: matrices have it,
    embeddings, norms and biases don't. Every trained parameter is in exactly one group.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    rates = {"speech": stage.learning_rate, "text": stage.text_learning_rate or stage.learning_rate}
    parts = trained_parts(model, stage)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, parameter in chain(*parts.values()):
        parameter.requires_grad_(True)
    groups = []
    for part, named in parts.items():
        parameters = [parameter for _, parameter in named]
        decayed = [p for p in parameters if p.ndim >= 2 and id(p) not in embeddings]
        others = [p for p in parameters if p.ndim < 2 or id(p) in embeddings]
        for members, weight_decay in ((decayed, stage.weight_decay), (others, 0.0)):
            if members:
                groups.append(
                    {
                        "params": members,
                        "weight_decay": weight_decay,
                        "peak_lr": rates[part],
                        "part": part,
                        "lr": 0.0,
                    }
                )
    return torch.optim.AdamW(groups, betas=stage.betas, fused=True)


def trapezoid(step: int, stage: StageSettings) -> float:
    """Share of the peak learning rate at a step of a stage: linear rise, plateau, linear fall."""
    rise = (step + 1) / stage.warmup_steps if stage.warmup_steps else 1.0
    fall = (stage.steps - step) / stage.decay_steps if stage.decay_steps else 1.0
    return min(1.0, rise, fall)


def mixing_size(config: SmolTolkConfig) -> int:
    """Multiplications per token of the layer selector and the mix of levels."""
    num_layers, dim = config.lm_config.num_hidden_layers, config.hidden_size
    mix = num_layers * dim
    if config.layer_mixing != "selected":
        return 0 if config.layer_mixing == "last" else mix

    def perceptron(size: int, hidden_size: int | None, output_size: int) -> int:
        return size * output_size if hidden_size is None else hidden_size * (size + output_size)

    source_size = dim
    if config.selector_input == "static":
        mix *= 2  # the average that the selector looks at
    if config.selector_level_size is not None:
        mix += num_layers * perceptron(dim, config.selector_level_hidden_size, config.selector_level_size)
        source_size = num_layers * config.selector_level_size
    return mix + perceptron(source_size, config.selector_hidden_size, num_layers)


def layer_sizes(lm: Any) -> tuple[int, int]:
    """Weights in the matrices of a decoder layer, and the width of its attention over all heads."""
    dim = lm.hidden_size
    head_dim = getattr(lm, "head_dim", None) or dim // lm.num_attention_heads
    kv_heads = getattr(lm, "num_key_value_heads", None) or lm.num_attention_heads
    projections = 2 * dim * head_dim * (lm.num_attention_heads + kv_heads)  # queries and output, keys and values
    feed_forward = (2 if lm.model_type == "gpt_neox" else 3) * dim * lm.intermediate_size  # not gated, or gated
    return projections + feed_forward, lm.num_attention_heads * head_dim


def training_flops(
    config: SmolTolkConfig,
    *,
    num_tokens: int,
    num_speech_tokens: int,
    num_text_labels: int,
    num_speech_labels: int,
    row_tokens: int,
    is_backbone_trained: bool,
    lora_size: int = 0,
    is_lora_trained: bool = False,
) -> int:
    """Floating-point operations of forward and backward over some rows.

    Counts matrix products: 2 per weight and token forward, the same for the gradient of the activations and
    for the gradient of the weights if they are trained; attention 2 · row_tokens · dim per token and layer
    forward (half of the square, by causality) and twice that backward. The input adapter sees speech tokens
    only, heads see labelled rows only. Its attention within segments is left out, being short. Each of the
    `lora_size` weights of LoRA matrices that take part sees every token.
    """
    lm = config.lm_config
    dim, num_layers = lm.hidden_size, lm.num_hidden_layers
    layer, attention_size = layer_sizes(lm)
    attention = 2 * row_tokens * attention_size
    passes = 6 if is_backbone_trained else 4
    flops = num_layers * num_tokens * (passes * layer + 3 * attention)
    flops += num_tokens * (6 if is_lora_trained else 4) * lora_size
    flops += config.num_output_adapter_layers * num_tokens * (6 * layer + 3 * attention)
    flops += config.num_input_adapter_layers * num_speech_tokens * 6 * layer
    flops += 6 * num_tokens * mixing_size(config)
    flops += num_text_labels * passes * lm.vocab_size * dim
    flops += num_speech_labels * 6 * config.ids.num_speech_tokens * dim
    return flops


def distillation_flops(
    config: SmolTolkConfig,
    *,
    weights: Mapping[str, float],
    counts: Mapping[str, float],
    num_read: int,
    num_read_squared: int,
    is_backbone_trained: bool,
) -> int:
    """What distillation adds to `training_flops`, counted alike; a second making of many logits is left out.

    Args:
        config: the model's.
        weights: weight of each term.
        counts: number of places of each term.
        num_read: text tokens that the teacher reads.
        num_read_squared: sum over rows of their squares.
        is_backbone_trained: whether the student's text head learns.
    """
    lm = config.lm_config
    layer, attention_size = layer_sizes(lm)
    flops = lm.num_hidden_layers * (2 * layer * num_read + 2 * attention_size * num_read_squared)
    head = lm.vocab_size * lm.hidden_size
    taught = sum(int(counts[name]) for name in ("next_token", "switch") if weights[name])
    labelled = int(counts["word"]) if weights["word"] else 0
    return flops + 2 * head * taught + (6 if is_backbone_trained else 4) * head * (taught + labelled)


def expected_flops(config: SmolTolkConfig, stage: StageSettings, lora_size: int = 0) -> int:
    """Training FLOPs of a step of a stage, before its rows are known: shares of speech are taken from its mixture.

    `lora_size` is the number of weights of the LoRA matrices that take part.
    """
    tokens = stage.rows_per_step * stage.row_tokens
    shares = stage.mixture.model_dump()
    total = sum(shares.values())
    speech = sum(SPEECH_SHARE.get(task, 0.5) * weight for task, weight in shares.items()) / total
    flops = training_flops(
        config,
        num_tokens=tokens,
        num_speech_tokens=round(speech * tokens),
        num_text_labels=round((1 - speech) * tokens),
        num_speech_labels=round(speech * tokens),
        row_tokens=stage.row_tokens,
        is_backbone_trained=stage.train == "everything",
        lora_size=lora_size,
        is_lora_trained=stage.train == "lora",
    )
    if stage.distillation is None:
        return flops
    words = speech * tokens / UNITS_PER_WORD
    written = TEXT_TOKENS_PER_WORD * words + 0.5 * tokens * shares["interleaved"] / total
    return flops + distillation_flops(
        config,
        weights=stage.distillation.weights,
        counts={"next_token": words, "hidden_states": words, "switch": 0, "word": speech * tokens - words},
        num_read=round(written),
        num_read_squared=round(written * min(written / stage.rows_per_step, stage.row_tokens)),
        is_backbone_trained=stage.train == "everything",
    )
