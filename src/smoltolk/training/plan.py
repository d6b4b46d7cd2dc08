"""What a recipe will need, before anything starts: parameters, tokens, operations, memory, hours."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from transformers import AutoConfig, PreTrainedConfig

from smoltolk.data.dataset import TASKS
from smoltolk.data.store import Store
from smoltolk.model.configuration_smoltolk import SmolTolkConfig
from smoltolk.model.fusion import Adapter
from smoltolk.model.losses import LOGITS_PER_CHUNK
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM, check_backbone
from smoltolk.training.config import LoraSettings, Recipe, StageSettings
from smoltolk.training.lora import add_lora, is_lora, lora_size
from smoltolk.training.optim import expected_flops, trained_parts

GIB = 2**30
NUM_UNITS = 500  # the paper's, where no store says another number
PEAK_TFLOPS = 989.5  # of an H100 in bf16 by its data sheet, where the recipe says nothing else
OVERHEAD_BYTES = GIB  # of the device's libraries and of the allocator


@dataclass(frozen=True)
class StagePlan:
    """What a stage needs.

    Args:
        trained: parameters that learn.
        frozen: parameters that don't.
        tokens_per_step: tokens of all ranks.
        steps: optimizer steps.
        flops: training FLOPs of the stage.
        memory_bytes: estimated peak of one GPU.
        hours: time at the given MFU.
    """

    trained: int
    frozen: int
    tokens_per_step: int
    steps: int
    flops: int
    memory_bytes: int
    hours: float

    @property
    def tokens(self) -> int:
        """Tokens of the stage."""
        return self.tokens_per_step * self.steps


@dataclass(frozen=True)
class Plan:
    """What a recipe needs.

    Args:
        parts: parameters by part of the model.
        stages: the stages in order.
        num_units: units of the speech tokenizer.
        is_assumed: whether that number is the paper's, for lack of a store.
    """

    parts: dict[str, int]
    stages: list[StagePlan]
    num_units: int
    is_assumed: bool


def make_plan(
    recipe: Recipe,
    *,
    gpus: int = 1,
    memory_gib: float = 80.0,
    mfu: float = 0.3,
    peak_tflops: float | None = None,
    lm_config: PreTrainedConfig | None = None,
) -> Plan:
    """Counts what a recipe needs, without weights, data or a GPU.

    Args:
        recipe: the recipe.
        gpus: ranks, one for each GPU.
        memory_gib: memory of a GPU in GiB.
        mfu: share of the peak that training reaches.
        peak_tflops: bf16 peak of a GPU; by default the recipe's, or an H100's.
        lm_config: configuration of the text LM; by default the backbone's own.

    Raises:
        ValueError: a number is out of range, or the recipe cannot run so: it does not fit into the memory, a step's
            rows cannot be shared, or rows are longer than the backbone's positions.
    """
    peak_tflops = peak_of(recipe, peak_tflops)
    for name, value in (("gpus", gpus), ("memory_gib", memory_gib), ("mfu", mfu), ("peak_tflops", peak_tflops)):
        if not value > 0:
            raise ValueError(f"{name} is {value}: give more than 0")
    if mfu > 1:
        raise ValueError(f"mfu is {mfu}: give a share of the peak, 1 at most")
    num_units, is_assumed = _num_units(recipe)
    config = _config(recipe, lm_config, num_units)
    with torch.device("meta"):
        model = SmolTolkForCausalLM(config)
    model.set_attn_implementation("eager" if recipe.attn_implementation == "eager" else "sdpa")
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    num_lora = 0
    if recipe.lora is not None:
        add_lora(model, recipe.lora)
        num_lora = parts["lora"] = lora_size(model)
    num_parameters = sum(parts.values())
    stages = []
    for number, stage in enumerate(recipe.stages, start=1):
        if stage.row_tokens > config.max_position_embeddings:
            raise ValueError(
                f"stage {number}: row_tokens {stage.row_tokens} exceeds the {config.max_position_embeddings} positions "
                "of the backbone: shorten the rows or set max_position_embeddings"
            )
        if stage.rows_per_step % (gpus * stage.rows_per_micro_batch):
            raise ValueError(
                f"stage {number}: rows_per_step {stage.rows_per_step} is not a multiple of {gpus} GPUs x "
                f"rows_per_micro_batch {stage.rows_per_micro_batch}: change one of them"
            )
        flops = stage.steps * expected_flops(config, stage, num_lora if recipe.uses_lora(number - 1) else 0)
        trained = sum(p.numel() for _, p in chain(*trained_parts(model, stage).values()))
        plan = StagePlan(
            trained=trained,
            frozen=num_parameters - trained,
            tokens_per_step=stage.rows_per_step * stage.row_tokens,
            steps=stage.steps,
            flops=flops,
            memory_bytes=sum(memory_by_use(model, recipe, stage, gpus).values()),
            hours=flops / (gpus * mfu * peak_tflops * 1e12) / 3600,
        )
        if plan.memory_bytes > memory_gib * GIB:
            raise ValueError(
                f"stage {number} needs about {plan.memory_bytes / GIB:.1f} GiB on each of {gpus} GPUs, more than "
                f"memory_gib {memory_gib:g}: lower rows_per_micro_batch {stage.rows_per_micro_batch}, set "
                "gradient_checkpointing, or take more GPUs"
            )
        stages.append(plan)
    return Plan({name: count for name, count in parts.items() if count}, stages, num_units, is_assumed)


def peak_of(recipe: Recipe, peak_tflops: float | None = None) -> float:
    """The bf16 peak of a GPU in TFLOP/s that hours are counted with: the given one, the recipe's, or an H100's."""
    return recipe.peak_tflops or PEAK_TFLOPS if peak_tflops is None else peak_tflops


def memory_by_use(model: SmolTolkForCausalLM, recipe: Recipe, stage: StageSettings, gpus: int) -> dict[str, int]:
    """Estimated bytes at the peak of a step on one GPU, by what they are for.

    Weights, gradients and AdamW's moments are float32 and spread over the GPUs. Activations are what a decoder layer
    keeps for its backward, counted without computing it; compiled layers keep less.
    """
    weights = 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for _, p in chain(*trained_parts(model, stage).values()))
    layers = [*model.body.layers, *model.output_adapter.layers, *model.input_adapter.layers]
    in_layers = [4 * sum(p.numel() for p in layer.parameters()) for layer in layers]
    num_micro_batches = stage.rows_per_step // (gpus * stage.rows_per_micro_batch)
    is_whole = gpus > 1 and num_micro_batches > 1  # gradients are exchanged after the last micro-batch only
    tokens = stage.rows_per_micro_batch * stage.row_tokens
    rows = (stage.rows_per_micro_batch, stage.row_tokens, recipe.precision == "bf16")
    kept = kept_bytes(model.config, *rows)
    kept_in_text = kept if stage.lora is None else kept_bytes(model.config, *rows, stage.lora)
    dim, num_layers = model.config.hidden_size, len(layers)
    # Below the first layer that learns nothing is kept: with a frozen LM only if no speech comes in before it.
    activations = len(model.body.layers) * kept_in_text + (num_layers - len(model.body.layers)) * kept
    if recipe.gradient_checkpointing:
        activations = num_layers * 4 * dim * tokens + max(kept, kept_in_text)
    head = max(model.config.lm_config.vocab_size, model.ids.num_speech_tokens)
    logits = min(LOGITS_PER_CHUNK, head * tokens)
    return {
        "weights": weights // gpus,
        "gradients": trained if is_whole else trained // gpus,
        "moments": 2 * trained // gpus,
        "gathered": 0 if gpus == 1 else weights - sum(in_layers) + 2 * max(in_layers),
        "activations": activations,
        "levels": model.config.lm_config.num_hidden_layers * 4 * dim * tokens,  # their gradients, from the mix
        **_teacher_bytes(model, recipe, stage, gpus),
        "heads": 12 * logits + (4 * head * dim if stage.train == "everything" else 0),
        "overhead": OVERHEAD_BYTES,
    }


def _teacher_bytes(model: SmolTolkForCausalLM, recipe: Recipe, stage: StageSettings, gpus: int) -> dict[str, int]:
    """Weights of the frozen text LM, whose layers are spread over the GPUs, and its levels; nothing without one."""
    if stage.distillation is None:
        return {}
    size = 2 if recipe.precision == "bf16" else 4
    layers = sum(p.numel() for name, p in model.body.layers.named_parameters() if not is_lora(name))
    others = sum(p.numel() for name, p in model.text_parameters() if not is_lora(name)) - layers
    levels = model.config.lm_config.num_hidden_layers * model.config.hidden_size
    return {"teacher": size * (layers // gpus + others + levels * stage.rows_per_micro_batch * stage.row_tokens)}


def kept_bytes(config: Any, rows: int, row_tokens: int, is_bf16: bool, lora: LoraSettings | None = None) -> int:
    """Bytes that one decoder layer keeps for its backward pass, weights left out; counted on tensors without data.

    With `lora` only its LoRA matrices learn.
    """
    kept: dict[int, Any] = {}  # storages by identity

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.device("meta"):
        layer = one_layer(config, lora)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        parameters = {n: torch.empty(p.shape, requires_grad=p.requires_grad) for n, p in layer.named_parameters()}
        buffers = {name: torch.empty(buffer.shape, dtype=buffer.dtype) for name, buffer in layer.named_buffers()}
        hidden = torch.empty(rows, row_tokens, config.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            functional_call(layer, parameters | buffers, (hidden, None, torch.arange(row_tokens)[None]))
        weights = {p.untyped_storage()._cdata for p in parameters.values()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


def one_layer(config: Any, lora: LoraSettings | None = None) -> nn.Module:
    """A decoder layer of the backbone's family; with `lora` it is frozen but for its LoRA matrices."""
    small = type(config.lm_config)(**config.lm_config.to_dict() | {"num_hidden_layers": 1, "layer_types": None})
    one = SmolTolkConfig(lm_config=small, num_units=1, num_input_adapter_layers=0, num_output_adapter_layers=1)
    model = SmolTolkForCausalLM(one)
    adapter: Adapter = model.output_adapter
    if lora is not None:
        add_lora(model, lora)
        adapter.layers = model.body.layers
    return adapter


def _num_units(recipe: Recipe) -> tuple[int, bool]:
    """Units of the stores, or the paper's number where there is none yet."""
    for share in (share for task in TASKS if task != "text" for share in recipe.data.stores(task)):
        try:
            found = Store(share.store).num_units
        except ValueError:  # not prepared yet
            continue
        if found is not None:
            return found, False
    return NUM_UNITS, True


def _config(recipe: Recipe, lm_config: PreTrainedConfig | None, num_units: int) -> SmolTolkConfig:
    settings = recipe.model.model_dump(exclude={"backbone", "rope_theta", "max_position_embeddings"})
    if lm_config is None:
        try:
            lm_config = AutoConfig.from_pretrained(recipe.model.backbone)
        except OSError as error:
            raise ValueError(
                f"backbone {recipe.model.backbone} cannot be read ({str(error).splitlines()[0]}): give --lm-config, "
                "a configuration file or folder of the same LM"
            ) from error
    check_backbone(lm_config)
    if recipe.model.max_position_embeddings is not None:
        lm_config.max_position_embeddings = recipe.model.max_position_embeddings
    return SmolTolkConfig(lm_config=lm_config, num_units=num_units, **settings)
