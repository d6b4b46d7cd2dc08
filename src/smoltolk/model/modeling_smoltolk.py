"""SmolTolk: a text-speech language model with late fusion and multi-level fission (arXiv 2503.06211).

  text, control ids              speech ids
         │                           │
text embeddings e_t           unit embeddings e_t ─────────────┐
         │                           │                         │
         │                  input adapter, per segment         │   late fusion
         └────────── h⁰ ─────────────┘                         │
                     │                                         │
            text backbone, h¹ … h^L ──── layer selector ──── Σ w h + e   multi-level fission
                     │                                         │
                 text head                              output adapter   late fission
                     │                                         │
               text logits                    unit head → speech logits
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from .configuration_smoltolk import SmolTolkConfig

SUPPORTED_BACKBONES = ("llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")


@dataclass
class SmolTolkOutput(ModelOutput):
    """What `SmolTolkForCausalLM` returns.

    Args:
        loss: summed cross-entropy over the number of labels, minus the weighted selector entropy, ().
        text_loss: mean cross-entropy over text labels, (); NaN without text labels.
        speech_loss: mean cross-entropy over speech labels, (); NaN without speech labels.
        label_losses: cross-entropy of each label, (batch, seq), at the label's own place and 0 where there is
            no label; when asked for.
        logits: scores of the next id over the whole id space, (batch, seq, vocab_size). The text and the
            speech block are normalised apart; control columns are −inf.
        layer_weights: how speech was mixed from the backbone's levels, (batch, seq, num_layers).
        past_key_values: one cache for backbone, output adapter and input adapter.
        hidden_states: the levels h⁰ … h^L of the backbone, each (batch, seq, dim), when asked for.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    speech_loss: Tensor | None = None
    label_losses: Tensor | None = None
    logits: Tensor | None = None
    layer_weights: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class Adapter(nn.Module):
    """A stack of decoder layers of the backbone's own class, causal, without a final norm.

    Args:
        layer_class: class of the backbone's decoder layers.
        config: the backbone's configuration stretched over all stacks (`SmolTolkConfig.stack_config`).
        first_layer: index of the first layer in the shared cache.
        num_layers: how many layers; none makes the adapter the identity.
    """

    def __init__(self, layer_class: Any, config: Any, first_layer: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer_class(config, first_layer + i) for i in range(num_layers))

    def forward(self, hidden: Tensor, **attention: Any) -> Tensor:
        """(batch, seq, dim) → (batch, seq, dim); `attention` is what the backbone's layers take."""
        for layer in self.layers:
            hidden = first(layer(hidden, **attention))
        return hidden


class LayerSelector(nn.Module):
    """Multi-level fission (paper, section 3): mixes the backbone's levels per position.

    `m_t = Σ_l softmax(α)_l h^l_t`, `w_t = softmax(W m_t + b)`, `z_t = Σ_l w_{t,l} h^l_t`.
    """

    def __init__(self, config: SmolTolkConfig) -> None:
        super().__init__()
        self.mixing = config.layer_mixing
        self.selector_input = config.selector_input
        num_layers = config.lm_config.num_hidden_layers
        if self.mixing == "static" or (self.mixing == "selected" and self.selector_input == "static"):
            self.static_logits = nn.Parameter(torch.empty(num_layers))  # α
        if self.mixing == "selected":
            self.projection = nn.Linear(config.hidden_size, num_layers)  # W, b

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Levels h¹ … h^L, each (batch, seq, dim) → mix (batch, seq, dim), weights (batch, seq, L).

        Softmax and sum run in float32.
        """
        last = levels[-1]
        shape = (*last.shape[:-1], len(levels))
        if self.mixing == "last":
            one_hot = torch.zeros(len(levels), device=last.device)
            one_hot[-1] = 1
            return last, one_hot.expand(shape)
        if self.mixing == "static":
            weights = self.static_logits.float().softmax(-1).expand(shape)
            return mix(levels, weights), weights
        if self.selector_input == "static":
            source = mix(levels, self.static_logits.float().softmax(-1).expand(shape))
        else:
            source = last if self.selector_input == "last" else levels[int(self.selector_input)]
        scores = self.projection(source.to(self.projection.weight.dtype))
        weights = scores.float().softmax(-1)
        return mix(levels, weights), weights


class SmolTolkForCausalLM(PreTrainedModel, GenerationMixin):
    """A Hugging Face causal LM whose ids are text tokens, control tokens and speech units.

    Early fusion and every ablation are settings of `SmolTolkConfig`. Build one from a pretrained text LM
    with `from_backbone`, load a saved one with `from_pretrained`.

    Raises:
        ValueError: the backbone is not one of `SUPPORTED_BACKBONES`.
    """

    config_class = SmolTolkConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: SmolTolkConfig) -> None:
        super().__init__(config)
        check_backbone(config.lm_config)
        self.ids = config.ids
        self.lm = AutoModelForCausalLM.from_config(config.lm_config)
        layer_class = type(self.body.layers[0])
        self.stack_config = stack = config.stack_config()
        stack._attn_implementation = self.lm.config._attn_implementation
        num_layers = config.lm_config.num_hidden_layers
        num_in, num_out = config.num_input_adapter_layers, config.num_output_adapter_layers

        self.control_embeddings = nn.Embedding(3, config.hidden_size)  # bop, eop, switch
        self.unit_embeddings = nn.Embedding(self.ids.num_speech_tokens, config.hidden_size)
        self.input_adapter = Adapter(layer_class, stack, num_layers + num_out, num_in)
        self.layer_selector = LayerSelector(config)
        self.output_adapter = Adapter(layer_class, stack, num_layers, num_out)
        self.output_norm = type(self.body.norm)(config.hidden_size) if config.output_adapter_norm else None
        self.unit_head = None  # tied to the unit embeddings
        if not config.tie_speech_embeddings:
            self.unit_head = nn.Linear(config.hidden_size, self.ids.num_speech_tokens, bias=False)
        self.post_init()

    @classmethod
    def from_backbone(cls, name_or_path: str, **settings: Any) -> "SmolTolkForCausalLM":
        """Puts new speech parts around a pretrained text LM.

        Args:
            name_or_path: the text LM, a folder or a hub name.
            settings: fields of `SmolTolkConfig` other than `lm_config`.

        Raises:
            ValueError: the LM is not one of `SUPPORTED_BACKBONES`.
        """
        check_backbone(AutoConfig.from_pretrained(name_or_path))
        lm = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
        model = cls(SmolTolkConfig(lm_config=lm.config, **settings))
        model.lm = lm
        return model

    @property
    def body(self) -> Any:
        """The text backbone without its head."""
        return self.lm.base_model

    def get_input_embeddings(self) -> nn.Module:
        """The text embeddings."""
        return self.lm.get_input_embeddings()

    def speech_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the speech parts: all that do not belong to the text LM."""
        return ((name, p) for name, p in self.named_parameters() if not name.startswith("lm."))

    def text_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the text LM."""
        return ((name, p) for name, p in self.named_parameters() if name.startswith("lm."))

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """As in transformers, and for the adapters too."""
        super().set_attn_implementation(attn_implementation, allow_all_kernels)
        self.stack_config._attn_implementation = self.lm.config._attn_implementation

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        return_label_losses: bool = False,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> SmolTolkOutput:
        """Reads text and speech, scores the next text token and the next unit at every position.

        Args:
            input_ids: ids of the one id space, (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, (batch, seen + seq); None for no padding.
            labels: (batch, seq), Hugging Face convention: the ids themselves, −100 where nothing is to be
                predicted; the shift happens inside. Control ids are never predicted, so labels at control
                ids count as −100.
            position_ids: (batch, seq); derived from the mask when None.
            past_key_values: cache of the tokens seen before.
            use_cache: whether to return a cache.
            logits_to_keep: score only the last so many positions, 0 for all.
            return_logits: whether to compute logits; by default when there are no labels.
            return_label_losses: whether to return the loss of each label.
            output_hidden_states: whether to return the levels h⁰ … h^L.
            num_items_in_batch: number of labels to normalise the loss by; by default those of this batch.
            kwargs: passed to the backbone.

        Raises:
            ValueError: ids out of range, or a sequence longer than the backbone's positions.
        """
        self._check_ids(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.get_text_config())
        num_seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_length(num_seen + input_ids.shape[1])
        if position_ids is None:
            position_ids = default_positions(input_ids, attention_mask, num_seen)
        is_real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            is_real = attention_mask[:, -input_ids.shape[1] :].bool()
        is_speech = (input_ids >= self.ids.speech_offset) & is_real

        embeds = self._embed(input_ids)  # (batch, seq, dim)
        fused = self._fuse(embeds, is_speech, past_key_values)
        wants_logits = return_logits or (return_logits is None and labels is None)
        rows: Tensor | slice = slice(None)  # the rows that the output adapter runs on
        if labels is not None and not wants_logits and past_key_values is None:
            rows = self._rows_with_unit_labels(labels)
        # The mask is made before the backbone puts this call's tokens into the cache.
        causal = self._causal(embeds, attention_mask, position_ids, past_key_values, rows)
        with layer_outputs(self.body.layers) as levels:
            last = self.body(
                inputs_embeds=fused,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=past_key_values is not None,
                **kwargs,
            ).last_hidden_state
        levels[-1] = last  # h^L comes after the final norm

        mixed, layer_weights = self.layer_selector(levels)
        speech = mixed + embeds if self.config.speech_residual else mixed
        speech = self.output_adapter(speech[rows].to(embeds.dtype), **causal)
        if self.output_norm is not None:
            speech = self.output_norm(speech)

        output = SmolTolkOutput(layer_weights=layer_weights, past_key_values=past_key_values)
        if labels is not None:
            losses = self._add_losses(output, last, speech, labels, rows, is_real, num_items_in_batch)
            if return_label_losses:
                output.label_losses = losses
        if wants_logits:
            output.logits = self._logits(last[:, -logits_to_keep:], speech[:, -logits_to_keep:])
        if output_hidden_states:
            output.hidden_states = (fused, *levels)
        return output

    def _embed(self, input_ids: Tensor) -> Tensor:
        """e_t: the raw embedding of every id, (batch, seq) → (batch, seq, dim)."""
        ids = self.ids
        embeds = self.lm.get_input_embeddings()(input_ids.clamp(max=ids.text_vocab_size - 1))
        control = self.control_embeddings((input_ids - ids.text_vocab_size).clamp(0, 2))
        units = self.unit_embeddings((input_ids - ids.speech_offset).clamp(min=0))
        embeds = torch.where((input_ids >= ids.text_vocab_size)[..., None], control.to(embeds.dtype), embeds)
        return torch.where((input_ids >= ids.speech_offset)[..., None], units.to(embeds.dtype), embeds)

    def _fuse(self, embeds: Tensor, is_speech: Tensor, cache: Cache | None) -> Tensor:
        """Late fusion: speech goes through the input adapter, segment by segment; all else passes by."""
        if not len(self.input_adapter.layers):
            return embeds
        if cache is None:
            return self._fuse_packed(embeds, is_speech)
        return self._fuse_cached(embeds, is_speech, cache)

    def _fuse_packed(self, embeds: Tensor, is_speech: Tensor) -> Tensor:
        """Runs the adapter on speech positions only, segments of like length side by side."""
        flat, fused = embeds.flatten(0, 1), embeds.flatten(0, 1).clone()  # (batch · seq, dim)
        segments = speech_segments(is_speech)
        for start, length, longest in segments:  # (segments,), (segments,), int
            offset = torch.arange(longest, device=embeds.device)
            inside = offset < length[:, None]  # (segments, longest)
            position = (start[:, None] + offset).clamp(max=len(flat) - 1)
            composed = self.input_adapter(
                flat[position],
                attention_mask=mask_for(self.stack_config, offset <= offset[:, None], embeds.dtype),
                position_ids=offset[None],
                position_embeddings=self.body.rotary_emb(flat, offset[None]),
            )
            fused = fused.index_put((position[inside],), composed[inside].to(fused.dtype))
        if not segments and self.training:  # every parameter keeps a gradient, also in a batch of text alone
            zero = torch.zeros(1, 1, dtype=torch.long, device=embeds.device)
            rotary = self.body.rotary_emb(flat, zero)
            dummy = self.input_adapter(flat[None, :1], position_ids=zero, position_embeddings=rotary)
            fused = fused + 0.0 * dummy.sum()
        return fused.view_as(embeds)

    def _fuse_cached(self, embeds: Tensor, is_speech: Tensor, cache: Cache) -> Tensor:
        """The same with a cache: its last layer remembers which tokens are speech, hence all segments."""
        memory = self.config.num_hidden_layers
        num_seen = cache.get_seq_length(memory)
        now = is_speech[:, None, :, None].to(embeds.dtype)
        seen = cache.update(now, now, memory)[0][:, 0, :, 0] > 0.5  # (batch, seen + seq)
        index = torch.arange(seen.shape[1], device=embeds.device)
        starts = seen & ~F.pad(seen, (1, 0))[:, :-1]
        begin = torch.where(starts, index, 0).cummax(1).values  # start of the segment at each position
        query = num_seen + torch.arange(embeds.shape[1], device=embeds.device)
        begin_of_query = begin.index_select(1, query)
        reaches = (index <= query[:, None]) & (index >= begin_of_query[..., None]) & seen[:, None]
        reaches = (reaches | (index == query[:, None]))[:, None]  # (batch, 1, seq, seen + seq)
        positions = query - begin_of_query
        composed = self.input_adapter(
            embeds,
            attention_mask=mask_for(self.stack_config, reaches, embeds.dtype),
            position_ids=positions,
            position_embeddings=self.body.rotary_emb(embeds, positions),
            past_key_values=cache,
        )
        return torch.where(is_speech[..., None], composed.to(embeds.dtype), embeds)

    def _causal(
        self,
        embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        cache: Cache | None,
        rows: Tensor | slice,
    ) -> dict[str, Any]:
        """What decoder layers take for causal attention over whole sequences, for some rows of the batch."""
        embeds = embeds[rows]
        if attention_mask is not None:
            attention_mask = attention_mask[rows]
        if len(position_ids) > 1:
            position_ids = position_ids[rows]
        return {
            "attention_mask": create_causal_mask(self.lm.config, embeds, attention_mask, cache, position_ids),
            "position_ids": position_ids,
            "position_embeddings": self.body.rotary_emb(embeds, position_ids),
            "past_key_values": cache,
        }

    def _rows_with_unit_labels(self, labels: Tensor) -> Tensor:
        """Indices of the rows that speech is predicted in, at least one so that every parameter keeps a gradient."""
        chosen = (labels[:, 1:] >= self.ids.speech_offset).any(1)
        chosen[0] |= ~chosen.any()
        return chosen.nonzero()[:, 0]

    def _logits(self, last: Tensor, speech: Tensor) -> Tensor:
        """Both heads side by side in the one id space, (batch, kept, vocab_size)."""
        text_logits, speech_logits = self._text_head(last), self._speech_head(speech)
        control = text_logits.new_full((*text_logits.shape[:-1], 3), float("-inf"))
        return torch.cat([text_logits, control, speech_logits.to(text_logits.dtype)], dim=-1)

    def _text_head(self, last: Tensor) -> Tensor:
        return self.lm.get_output_embeddings()(last)

    def _speech_head(self, speech: Tensor) -> Tensor:
        weight = self.unit_embeddings.weight if self.unit_head is None else self.unit_head.weight
        return F.linear(speech.to(weight.dtype), weight)

    def _add_losses(
        self,
        output: SmolTolkOutput,
        last: Tensor,
        speech: Tensor,
        labels: Tensor,
        rows: Tensor | slice,
        is_real: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Cross-entropy of every label over its own block, text or speech (paper, section 3).

        `speech` holds the output adapter's `rows`, which no unit label lies outside of. Fills in the losses of the
        output and returns those of the labels, (batch, seq).
        """
        target = labels[:, 1:]
        is_text = (target >= 0) & (target < self.ids.text_vocab_size)
        is_unit = target >= self.ids.speech_offset
        # Heads run on labelled rows only: an empty choice still gives every parameter a gradient (of zero).
        text_logits = self._text_head(last[:, :-1][is_text])
        unit_logits = self._speech_head(speech[:, :-1][is_unit[rows]])
        text_losses = F.cross_entropy(text_logits.float(), target[is_text], reduction="none")
        unit_losses = F.cross_entropy(unit_logits.float(), target[is_unit] - self.ids.speech_offset, reduction="none")
        text_sum, unit_sum = text_losses.sum(), unit_losses.sum()
        num_text, num_units = is_text.sum(), is_unit.sum()
        num_labels = (num_text + num_units).clamp(min=1)
        if num_items_in_batch is None:
            num_items_in_batch = num_labels
        loss = (text_sum + unit_sum) / num_items_in_batch
        if self.config.selector_entropy_weight:
            share = num_labels / num_items_in_batch  # of this batch in what the loss is normalised by
            assert output.layer_weights is not None
            entropy = mean_entropy(output.layer_weights, is_real) * (num_units > 0)  # no speech, no selection
            loss = loss - self.config.selector_entropy_weight * share * entropy
        output.loss = loss
        output.text_loss = text_sum / num_text
        output.speech_loss = unit_sum / num_units
        losses = text_losses.new_zeros(target.shape)
        losses = losses.masked_scatter(is_text, text_losses).masked_scatter(is_unit, unit_losses)
        return F.pad(losses, (1, 0))

    def _check_ids(self, input_ids: Tensor) -> None:
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return  # a look at the values would stall an accelerator, which raises by itself
        if input_ids.numel() and not 0 <= input_ids.min() <= input_ids.max() < self.ids.vocab_size:
            raise ValueError(
                f"input_ids hold {int(input_ids.min())} … {int(input_ids.max())}, but the id space is "
                f"0 … {self.ids.vocab_size - 1} ({self.ids.text_vocab_size} text tokens, 3 control ids, "
                f"{self.ids.num_units} units and end-of-speech from {self.ids.speech_offset} on): "
                "check that the units come from the tokenizer of this model"
            )

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"the sequence has {num_tokens} tokens, more than the backbone's max_position_embeddings "
                f"of {self.config.max_position_embeddings}: shorten it, or use another backbone"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerSelector) and hasattr(module, "static_logits"):
            init.normal_(module.static_logits, mean=0.0, std=0.01)


def check_backbone(lm_config: Any) -> None:
    """Refuses text LMs that the adapters cannot be built from.

    Raises:
        ValueError: the configuration is not that of a supported decoder-only LM.
    """
    if getattr(lm_config, "is_encoder_decoder", False) or lm_config.model_type not in SUPPORTED_BACKBONES:
        raise ValueError(
            f"the backbone is of type {lm_config.model_type!r}: SmolTolk builds on decoder-only LMs of the "
            f"Llama kind, one of {', '.join(SUPPORTED_BACKBONES)}"
        )


def first(output: Any) -> Tensor:
    """The hidden states of a decoder layer's output, which is a tensor or a tuple."""
    return output[0] if isinstance(output, tuple) else output


def mix(levels: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ_l w_l h^l in float32: levels of (batch, seq, dim), weights (batch, seq, L) → (batch, seq, dim).

    A running sum: stacking the levels would take L times the memory.
    """
    mixed = weights[..., :1] * levels[0].float()
    for i, level in enumerate(levels[1:], start=1):
        mixed = torch.addcmul(mixed, weights[..., i : i + 1], level.float())
    return mixed


def mean_entropy(weights: Tensor, is_real: Tensor) -> Tensor:
    """Mean entropy in nats of distributions (batch, seq, L) over the real positions (batch, seq)."""
    entropy = torch.special.entr(weights).sum(-1)
    return (entropy * is_real).sum() / is_real.sum()


def default_positions(input_ids: Tensor, attention_mask: Tensor | None, num_seen: int) -> Tensor:
    """Positions that count real tokens only, (batch or 1, seq)."""
    length = input_ids.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(num_seen, num_seen + length, device=input_ids.device)[None]


def speech_segments(is_speech: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    """Maximal runs of speech in (batch, seq), grouped by like length.

    Returns:
        Groups of (start in the flattened batch, length, longest length): padding a group to its longest
        segment at most doubles it, and groups shorter than 32 are one.
    """
    padded = F.pad(is_speech, (1, 1))
    rises = (padded[:, 1:-1] & ~padded[:, :-2]).flatten().nonzero()[:, 0]  # first positions
    falls = (padded[:, 1:-1] & ~padded[:, 2:]).flatten().nonzero()[:, 0]  # last positions
    lengths = falls - rises + 1
    groups = []
    limit, covered = 32, 0
    longest = int(lengths.max()) if len(lengths) else 0
    while covered < longest:
        chosen = (lengths > covered) & (lengths <= limit)
        if chosen.any():
            groups.append((rises[chosen], lengths[chosen], int(lengths[chosen].max())))
        covered, limit = limit, 2 * limit
    return groups


def mask_for(config: PreTrainedConfig, reaches: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A boolean attention mask, (…, query, key), in the form the configured attention takes.

    A plain causal mask, (seq, seq), needs no tensor with SDPA, which is faster by its own flag.
    """
    if config._attn_implementation == "sdpa":
        return None if reaches.ndim == 2 else reaches
    return torch.zeros_like(reaches, dtype=dtype).masked_fill(~reaches, torch.finfo(dtype).min)


@contextmanager
def layer_outputs(layers: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Collects the outputs of decoder layers: equal to `output_hidden_states`, and friendly to compile."""
    outputs: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(first(out))) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
