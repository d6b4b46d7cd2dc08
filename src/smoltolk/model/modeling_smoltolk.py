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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
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
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.utils import ModelOutput

from .configuration_smoltolk import SmolTolkConfig
from .fission import LayerSelector
from .fusion import Adapter, first, fuse
from .losses import head_loss, mean_entropy

SUPPORTED_BACKBONES = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)

MoreLoss = Callable[[Sequence[Tensor], Callable[[Tensor], Tensor]], Tensor]


@dataclass
class SmolTolkOutput(ModelOutput):
    """What `SmolTolkForCausalLM` returns.

    Args:
        loss: summed cross-entropy over the number of labels, minus the weighted selector entropy, ().
        text_loss: mean cross-entropy over text labels, (); NaN without text labels.
        speech_loss: mean cross-entropy over speech labels, (); NaN without speech labels.
        token_losses: cross-entropy of each label, (batch, seq), at the label's own place and 0 where there is
            no label; when asked for.
        token_is_best: whether no id of its block scores higher than the label, (batch, seq), at the label's own
            place and False where there is no label; with `token_losses`, where no gradients are taken.
        logits: scores of the next id over the whole id space, (batch, seq, vocab_size). The text and the
            speech block are normalised apart; control columns are −inf.
        layer_weights: how speech was mixed from the backbone's levels, (batch, seq, num_layers).
        past_key_values: one cache for backbone, output adapter and input adapter.
        hidden_states: the levels h⁰ … h^L of the backbone, each (batch, seq, dim), when asked for.
        attentions: those of the backbone, when asked for.
    """

    loss: Tensor | None = None
    text_loss: Tensor | None = None
    speech_loss: Tensor | None = None
    token_losses: Tensor | None = None
    token_is_best: Tensor | None = None
    logits: Tensor | None = None
    layer_weights: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Levels:
    """What `keep_level` collects the outputs of the backbone's layers in, in order.

    An object and no list, so that what moves or copies arguments (FSDP2, offloading) leaves it alone.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []


@dataclass(frozen=True, eq=False)
class Losses:
    """Cross-entropy of a batch's labels.

    Args:
        text: sum over the text head's labels, ().
        speech: sum over the unit head's labels, ().
        num_text: number of the text head's labels, ().
        num_units: number of the unit head's labels, ().
        tokens: loss of each label at its own place, (batch, seq), 0 where there is none; without gradient.
        is_best: whether no id of its block scores higher than the label, (batch, seq); None where gradients are taken.
    """

    text: Tensor
    speech: Tensor
    num_text: Tensor
    num_units: Tensor
    tokens: Tensor
    is_best: Tensor | None


@dataclass(frozen=True, eq=False)
class Targets:
    """What is predicted at every position but the last, all (batch, seq − 1).

    Args:
        target: the next id.
        source: the id it follows.
        is_text: which targets are the text head's.
        is_unit: which targets are the unit head's.
    """

    target: Tensor
    source: Tensor
    is_text: Tensor
    is_unit: Tensor

    def rows_with_speech(self) -> Tensor:
        """Indices of the rows with targets of the unit head; at least one, so that its parameters keep a gradient."""
        chosen = self.is_unit.any(1)
        chosen[0] |= ~chosen.any()
        return chosen.nonzero()[:, 0]


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
        self._supports_flash_attn, self._supports_flex_attn = self.lm._supports_flash_attn, self.lm._supports_flex_attn
        num_layers = config.lm_config.num_hidden_layers
        num_in, num_out = config.num_input_adapter_layers, config.num_output_adapter_layers

        self.control_embeddings = nn.Embedding(3, config.hidden_size)  # bop, eop, switch
        self.unit_embeddings = nn.Embedding(self.ids.num_speech_tokens, config.hidden_size)
        self.input_adapter = Adapter(self.body, config.adapter_config(), num_layers + num_out, num_in)
        self.layer_selector = LayerSelector(config)
        self.output_adapter = Adapter(self.body, config.adapter_config(), num_layers, num_out)
        self.output_norm = None
        if config.output_adapter_norm:
            self.output_norm = type(self.final_norm)(config.hidden_size)
        self.unit_head = None  # tied to the unit embeddings
        if not config.tie_speech_embeddings:
            self.unit_head = nn.Linear(config.hidden_size, self.ids.num_speech_tokens, bias=False)
        # How the family scales embeddings, in their table or in the body, and logits.
        self.embedding_scale = getattr(self.get_input_embeddings(), "scalar_embed_scale", 1.0)
        self.body_scale = getattr(self.body, "embedding_multiplier", 1.0)
        self.logits_scale = 1 / getattr(config.lm_config, "logits_scaling", 1.0)
        self.logits_cap = getattr(config.lm_config, "final_logit_softcapping", None)
        self._keep_levels()
        self._share_attn_implementation()
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str,
        *,
        rope_theta: float | None = None,
        max_position_embeddings: int | None = None,
        **settings: Any,
    ) -> "SmolTolkForCausalLM":
        """Puts new speech parts around a pretrained text LM.

        Args:
            name_or_path: the text LM, a folder or a hub name.
            rope_theta: base of the rotary positions of all stacks, saved with the model; None for the LM's own. Where
                a family parts them by the kind of attention, that of full attention.
            max_position_embeddings: longest sequence, saved with the model; None for the LM's own.
            settings: fields of `SmolTolkConfig` other than `lm_config`.

        Raises:
            ValueError: the LM is not one of `SUPPORTED_BACKBONES`.
        """
        lm_config = AutoConfig.from_pretrained(name_or_path)
        check_backbone(lm_config)
        if rope_theta is not None:
            rope = lm_config.rope_parameters
            rope.get("full_attention", rope)["rope_theta"] = rope_theta
        if max_position_embeddings is not None:
            lm_config.max_position_embeddings = max_position_embeddings
        lm = AutoModelForCausalLM.from_pretrained(name_or_path, config=lm_config, dtype=torch.float32)
        model = cls(SmolTolkConfig(lm_config=lm.config, **settings))
        model.lm = lm
        model._keep_levels()
        return model.eval()

    @property
    def body(self) -> Any:
        """The text backbone without its head."""
        return self.lm.base_model

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the backbone's last layer and the text head; the level h^L comes after it."""
        return getattr(self.body, "norm", None) or self.body.final_layer_norm

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
        self._share_attn_implementation()

    def generate(self, inputs: Tensor | None = None, *arguments: Any, **settings: Any) -> Any:
        """As in transformers; prompts are padded on the left.

        Raises:
            ValueError: there is no prompt, its mask has a hole or padding on the right, or flex attention meets a
                static cache.
        """
        prompt, mask = settings.get("input_ids") if inputs is None else inputs, settings.get("attention_mask")
        if prompt is None or not prompt.shape[1]:
            raise ValueError("the prompt is empty: give some text or speech to continue")
        if mask is not None and mask.ndim == 2:
            check_mask(mask)
            if not mask[:, -1].all():
                raise ValueError("attention_mask ends in 0: pad prompts on the left, so that all end at the same place")
        if settings.get("cache_implementation") == "static" and "flex" in self.lm.config._attn_implementation:
            raise ValueError("cache_implementation is 'static', which takes no flex attention: set sdpa attention")
        return super().generate(inputs, *arguments, **settings)  # type: ignore[misc]

    def init_continuous_batching(self, *_: Any, **__: Any) -> Any:
        """Not supported: requests that share one paged row have no segments of their own in the adapters.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("generate_batch is not supported: use generate with rows padded on the left")

    def _keep_levels(self) -> None:
        for layer in self.body.layers:
            layer.register_forward_hook(keep_level, with_kwargs=True)

    def _share_attn_implementation(self) -> None:
        """Gives the adapters the backbone's kind of attention."""
        self.output_adapter.config._attn_implementation = self.lm.config._attn_implementation
        self.input_adapter.config._attn_implementation = self._input_attention(uses_mask=False)

    def _input_attention(self, *, uses_mask: bool) -> str:
        """Attention of the input adapter: flash takes no masks, and for short segments SDPA is as quick as flex."""
        kind = self.lm.config._attn_implementation
        if "flash" in kind and not uses_mask:
            return kind
        return "eager" if kind == "eager" or not self.lm._supports_sdpa else "sdpa"

    def compile_layers(self, **options: Any) -> None:
        """Compiles every decoder layer of the backbone and the adapters, in place (`torch.compile`'s options).

        Layers of a stack share their code, so that it is compiled once. What reads their outputs stays outside.
        """
        # Of one code Dynamo keeps 8 versions, and runs what needs another uncompiled. All stacks share theirs, and
        # training, validation, frozen weights and shapes each need some: about 20 were seen in a run of two stages.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        # The same options for all: stacks share their code, and would share one that is slower for being general.
        for layer in chain(self.body.layers, self.output_adapter.layers, self.input_adapter.layers):
            layer.forward = torch.compile(layer.forward, **options)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        return_token_losses: bool = False,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        more_loss: MoreLoss | None = None,
        **kwargs: Any,
    ) -> SmolTolkOutput:
        """Reads text and speech, scores the next text token and the next unit at every position.

        Args:
            input_ids: ids of the one id space, (batch, seq).
            attention_mask: 1 for real tokens, 0 for padding, (batch, seen + seq); None for no padding. Masks as
                `generate` makes them for a static cache are taken too.
            labels: (batch, seq), Hugging Face convention: the ids themselves, −100 where nothing is to be
                predicted; the shift happens inside. Control ids are not predicted, so labels at control
                ids count as −100, but for the switch with `predict_switch`.
            position_ids: (batch, seq); derived from the mask when None.
            past_key_values: cache of the tokens seen before.
            use_cache: whether to return a cache.
            logits_to_keep: score only the last so many positions, 0 for all.
            return_logits: whether to compute logits; by default when there are no labels.
            return_token_losses: whether to return the loss of each label, and whether it is its block's best id.
            output_hidden_states: whether to return the levels h⁰ … h^L.
            num_items_in_batch: number of labels to normalise the loss by; by default those of this batch.
            more_loss: gives a loss to add, of the levels h¹ … h^L (batch, seq, dim) and of what makes text logits of
                hidden states (…, dim) of the last one.
            kwargs: passed to the backbone; `return_dict=False` gives a tuple.

        Positions that restart within a row part packed documents: no token sees another document, nor predicts its
        first one.

        Raises:
            ValueError: no ids or ids out of range, more tokens than the backbone has positions, a mask with a hole,
                packed documents with a mask or a cache, or a cache of another model.
        """
        return_dict = kwargs.pop("return_dict", None)
        self._check_ids("input_ids", input_ids, lowest=0)
        if labels is not None:
            self._check_ids("labels", labels, lowest=-100)
        if past_key_values is not None:
            self._check_cache(past_key_values)
        elif use_cache:
            past_key_values = DynamicCache(config=self.config.get_text_config())
        num_seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        body_mask, attention_mask = self._masks(attention_mask)
        is_real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None and attention_mask.ndim == 2:
            if attention_mask.device.type == "cpu":
                check_mask(attention_mask)
            is_real = attention_mask[:, -input_ids.shape[1] :].bool()
        elif attention_mask is not None:  # which positions attend to themselves
            query = torch.arange(input_ids.shape[1], device=input_ids.device)
            reach = attention_mask[:, 0, query, num_seen + query]
            is_real = (reach if reach.dtype == torch.bool else reach == 0).expand_as(input_ids)
        is_first = torch.zeros_like(is_real)  # of a document, in a row that packs several
        if position_ids is None:
            position_ids = default_positions(input_ids, attention_mask, num_seen)
        else:
            is_first[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
            self._check_packing(is_first, is_real, attention_mask, past_key_values)
        self._check_length(position_ids)
        is_speech = (input_ids >= self.ids.speech_offset) & is_real

        embeds = self._embed(input_ids)  # (batch, seq, dim)
        self.input_adapter.config._attn_implementation = self._input_attention(uses_mask=past_key_values is not None)
        fused = fuse(self.input_adapter, embeds, is_speech, is_first, past_key_values)
        wants_logits = return_logits or (return_logits is None and labels is None)
        targets = None
        rows: Tensor | slice = slice(None)  # the rows that the output adapter runs on
        if labels is not None:
            # Neither padding nor another document predicts a token.
            can_predict = is_real[:, :-1] & is_real[:, 1:] & ~is_first[:, 1:]
            targets = self._targets(input_ids, labels, can_predict)
            if not wants_logits and past_key_values is None:
                rows = targets.rows_with_speech()
        # The mask is made before the backbone puts this call's tokens into the cache.
        causal = self._causal(embeds, attention_mask, position_ids, past_key_values, rows)
        kept = Levels()
        body_output = self.body(
            inputs_embeds=fused if self.body_scale == 1 else fused / self.body_scale,
            attention_mask=body_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            levels=kept,
            **kwargs,
        )
        last = body_output.last_hidden_state
        levels = [*kept.tensors[:-1], last]  # h¹ … h^L, which comes after the final norm

        mixed, layer_weights = self.layer_selector(levels)
        speech = mixed + embeds if self.config.speech_residual else mixed
        speech = self.output_adapter(speech[rows].to(embeds.dtype), **causal)
        if self.output_norm is not None:
            speech = self.output_norm(speech)

        loss = text_loss = speech_loss = token_losses = token_is_best = logits = None
        if targets is not None:
            losses = self._losses(last, speech, targets, rows)
            loss = self._loss(losses, layer_weights, is_real, num_items_in_batch)
            if more_loss is not None:
                loss = loss + more_loss(levels, self.text_head)
            text_loss, speech_loss = losses.text / losses.num_text, losses.speech / losses.num_units
            if return_token_losses:
                token_losses, token_is_best = losses.tokens, losses.is_best
        if wants_logits:
            kept_ids = slice(-logits_to_keep, None)
            logits = self._logits(last[:, kept_ids], speech[:, kept_ids], input_ids[:, kept_ids])
        output = SmolTolkOutput(
            loss=loss,
            text_loss=text_loss,
            speech_loss=speech_loss,
            token_losses=token_losses,
            token_is_best=token_is_best,
            logits=logits,
            layer_weights=layer_weights,
            past_key_values=past_key_values,
            hidden_states=(fused, *levels) if output_hidden_states else None,
            attentions=getattr(body_output, "attentions", None),
        )
        return output.to_tuple() if return_dict is False else output  # type: ignore[return-value]

    def _masks(
        self, attention_mask: Tensor | dict[str, Tensor] | None
    ) -> tuple[Tensor | dict[str, Tensor] | None, Tensor | None]:
        """The mask for the backbone and that for the adapters, which attend to everything.

        With a static cache `generate` makes one mask for each kind of attention among all layers.
        """
        if not isinstance(attention_mask, dict):
            return attention_mask, attention_mask
        has_kinds = getattr(self.config.lm_config, "layer_types", None) is not None
        body_mask = attention_mask if has_kinds else attention_mask["sliding_attention"]
        return body_mask, attention_mask["full_attention"]

    def _embed(self, input_ids: Tensor) -> Tensor:
        """e_t: the raw embedding of every id, (batch, seq) → (batch, seq, dim)."""
        ids = self.ids
        embeds = self.lm.get_input_embeddings()(input_ids.clamp(max=ids.text_vocab_size - 1))
        control = self.control_embeddings((input_ids - ids.text_vocab_size).clamp(0, 2))
        units = self.unit_embeddings((input_ids - ids.speech_offset).clamp(min=0))
        if self.embedding_scale != 1:
            control, units = self.embedding_scale * control, self.embedding_scale * units
        embeds = torch.where((input_ids >= ids.text_vocab_size)[..., None], control.to(embeds.dtype), embeds)
        embeds = torch.where((input_ids >= ids.speech_offset)[..., None], units.to(embeds.dtype), embeds)
        return embeds if self.body_scale == 1 else embeds * self.body_scale

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
            "attention_mask": create_causal_mask(
                config=self.lm.config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            ),
            "position_ids": position_ids,
            "cache": cache,
        }

    def _logits(self, last: Tensor, speech: Tensor, input_ids: Tensor) -> Tensor:
        """Both heads side by side in the one id space, (batch, kept, vocab_size)."""
        text_logits, speech_logits = self.text_head(last), self._speech_head(speech)
        control = text_logits.new_full((*text_logits.shape[:-1], 3), float("-inf"))
        if self.config.predict_switch:
            spoken = self._switch_score(speech, input_ids >= self.ids.speech_offset)
            control[..., 2] = torch.maximum(self._switch_score(last, input_ids < self.ids.text_vocab_size), spoken)
        return torch.cat([text_logits, control, speech_logits.to(text_logits.dtype)], dim=-1)

    def text_head(self, last: Tensor) -> Tensor:
        """Scores of the text tokens, (…, dim) → (…, V_text), of hidden states that went through the final norm."""
        logits = self.lm.get_output_embeddings()(last) * self.logits_scale
        return logits if self.logits_cap is None else self.logits_cap * torch.tanh(logits / self.logits_cap)

    @property
    def _unit_weight(self) -> Tensor:
        return self.unit_embeddings.weight if self.unit_head is None else self.unit_head.weight

    def _speech_head(self, speech: Tensor) -> Tensor:
        return F.linear(speech.to(self._unit_weight.dtype), self._unit_weight)

    def _switch_score(self, hidden: Tensor, can_switch: Tensor) -> Tensor:
        """Logit of the switch where it may come, else −inf: hidden (…, dim), which positions (…) → (…)."""
        weight = self.control_embeddings.weight[2]
        return (hidden.to(weight.dtype) @ weight).masked_fill(~can_switch, float("-inf"))

    def _targets(self, input_ids: Tensor, labels: Tensor, can_predict: Tensor) -> "Targets":
        """What is predicted at all positions but the last, by which head: that of the label's own modality.

        The switch is predicted by the head of the modality it ends.
        """
        ids, target, source = self.ids, labels[:, 1:], input_ids[:, :-1]
        is_text = can_predict & (target >= 0) & (target < ids.text_vocab_size)
        is_unit = can_predict & (target >= ids.speech_offset)
        if self.config.predict_switch:
            is_switch = can_predict & (target == ids.switch_id)
            is_text = is_text | is_switch & (source < ids.text_vocab_size)
            is_unit = is_unit | is_switch & (source >= ids.speech_offset)
        return Targets(target, source, is_text, is_unit)

    def count_labels(self, input_ids: Tensor, labels: Tensor) -> tuple[int, int]:
        """Number of labels of the text head and of the unit head in full rows, both (batch, seq)."""
        targets = self._targets(input_ids, labels, torch.ones_like(labels[:, 1:], dtype=torch.bool))
        return int(targets.is_text.sum()), int(targets.is_unit.sum())

    def _losses(self, last: Tensor, speech: Tensor, targets: "Targets", rows: Tensor | slice) -> "Losses":
        """Cross-entropy of every label over its own block, text or speech (paper, section 3).

        `speech` holds the output adapter's `rows`, which hold every target of speech.
        """
        ids, is_text, is_unit = self.ids, targets.is_text, targets.is_unit
        text_hidden, unit_hidden = last[:, :-1][is_text], speech[:, :-1][is_unit[rows]]
        text_target, unit_target = targets.target[is_text], targets.target[is_unit] - ids.speech_offset
        text_switch = unit_switch = None
        if self.config.predict_switch:  # one more column of either head, after all others
            text_switch = self._switch_score(text_hidden, targets.source[is_text] < ids.text_vocab_size)
            unit_switch = self._switch_score(unit_hidden, targets.source[is_unit] >= ids.speech_offset)
            text_target = text_target.clamp(max=ids.text_vocab_size)
            unit_target = torch.where(unit_target < 0, ids.num_speech_tokens, unit_target)
        # Heads run on labelled positions only: an empty choice still gives every parameter a gradient (of zero).
        text_sum, text_losses, text_best = head_loss(
            text_hidden,
            self.lm.get_output_embeddings().weight,
            text_target,
            text_switch,
            scale=self.logits_scale,
            cap=self.logits_cap,
        )
        unit_sum, unit_losses, unit_best = head_loss(unit_hidden, self._unit_weight, unit_target, unit_switch)
        tokens = text_losses.new_zeros(is_text.shape)
        tokens = tokens.masked_scatter(is_text, text_losses).masked_scatter(is_unit, unit_losses)
        best = None
        if text_best is not None and unit_best is not None:
            best = torch.zeros_like(is_text).masked_scatter(is_text, text_best).masked_scatter(is_unit, unit_best)
            best = F.pad(best, (1, 0))
        return Losses(text_sum, unit_sum, is_text.sum(), is_unit.sum(), F.pad(tokens, (1, 0)), best)

    def _loss(
        self, losses: "Losses", layer_weights: Tensor, is_real: Tensor, num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        """Summed cross-entropy over the number of labels, minus the weighted entropy of the selector."""
        num_labels = (losses.num_text + losses.num_units).clamp(min=1)
        if num_items_in_batch is None:
            num_items_in_batch = num_labels
        loss = (losses.text + losses.speech) / num_items_in_batch
        if self.config.selector_entropy_weight:
            share = num_labels / num_items_in_batch  # of this batch in what the loss is normalised by
            entropy = mean_entropy(layer_weights, is_real) * (losses.num_units > 0)  # no speech, no selection
            loss = loss - self.config.selector_entropy_weight * share * entropy
        return loss

    def _check_ids(self, name: str, ids: Tensor, lowest: int) -> None:
        if ids.device.type != "cpu" or torch.compiler.is_compiling():
            return  # a look at the values would stall an accelerator, which raises by itself
        if not ids.shape[1]:
            raise ValueError(f"{name} are empty: give some text or speech")
        if not lowest <= ids.min() <= ids.max() < self.ids.vocab_size:
            raise ValueError(
                f"{name} hold {int(ids.min())} … {int(ids.max())}, but the id space is "
                f"0 … {self.ids.vocab_size - 1} ({self.ids.text_vocab_size} text tokens, 3 control ids, "
                f"{self.ids.num_units} units and end-of-speech from {self.ids.speech_offset} on): "
                "check that the units come from the tokenizer of this model"
            )

    def _check_cache(self, cache: Cache) -> None:
        if torch.compiler.is_compiling() or not cache.get_seq_length():
            return
        memory = self.config.num_hidden_layers
        fits = memory <= len(cache.layers) <= memory + 1
        if fits and len(self.input_adapter.layers):
            keys = getattr(cache.layers[-1], "keys", None) if len(cache.layers) > memory else None
            fits = keys is not None and keys.shape[1] == keys.shape[3] == 1
        if not fits:
            raise ValueError(
                f"past_key_values has {len(cache.layers)} layers and comes from another model: this one fills "
                f"{memory} layers and one that remembers which tokens are speech; start from its own cache"
            )

    def _check_packing(self, is_first: Tensor, is_real: Tensor, mask: Tensor | None, cache: Cache | None) -> None:
        """Packed documents are told apart by their positions alone, which a mask or a cache overrules."""
        if is_first.shape[1] == 1 or torch.compiler.is_compiling():
            return
        uses_flash = "flash" in self.lm.config._attn_implementation and len(is_first) > 1
        if mask is None and cache is None and not uses_flash:
            return
        if (is_first[:, 1:] & is_real[:, 1:] & is_real[:, :-1]).any():
            raise ValueError(
                "position_ids restart within a row, which packs documents: give packed rows no attention_mask and no "
                "cache (use_cache=False), and one row at a time to flash attention"
            )

    def _check_length(self, position_ids: Tensor) -> None:
        if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
            return
        num_tokens = int(position_ids.max()) + 1
        if num_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"the sequence has {num_tokens} tokens, more than the backbone's max_position_embeddings "
                f"of {self.config.max_position_embeddings}: shorten it, or use another backbone"
            )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | LayerSelector | SmolTolkForCausalLM):
            super()._init_weights(module)
        else:  # norms and rotary positions as the backbone's family has them
            self.lm._init_weights(module)
        if isinstance(module, LayerSelector) and hasattr(module, "static_logits"):
            init.normal_(module.static_logits, mean=0.0, std=0.01)


def check_mask(attention_mask: Tensor) -> None:
    """Refuses masks (batch, seq) with rows whose tokens are not next to each other.

    Raises:
        ValueError: a row has a hole.
    """
    padded = F.pad(attention_mask.bool(), (1, 0))
    has_hole = (~padded[:, :-1] & padded[:, 1:]).sum(1) > 1
    if has_hole.any():
        raise ValueError(
            f"attention_mask has a hole in row {int(has_hole.nonzero()[0])}: the ones of a row must be next to "
            "each other; leave the token out, or pad at the ends"
        )


def check_backbone(lm_config: Any) -> None:
    """Refuses text LMs that the adapters cannot be built from.

    Raises:
        ValueError: the configuration is not that of a supported decoder-only LM.
    """
    if getattr(lm_config, "is_encoder_decoder", False) or lm_config.model_type not in SUPPORTED_BACKBONES:
        raise ValueError(
            f"the backbone is of type {lm_config.model_type!r}: SmolTolk builds on decoder-only LMs with rotary "
            f"positions, one of {', '.join(SUPPORTED_BACKBONES)}"
        )


def keep_level(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the backbone's layers, which hand on what the body is called with: `Levels` to collect them in.

    Unlike `output_hidden_states` it lets layers be compiled without graph breaks, and costs nothing.
    """
    if "levels" in kwargs:
        kwargs["levels"].tensors.append(first(output))


def default_positions(input_ids: Tensor, attention_mask: Tensor | None, num_seen: int) -> Tensor:
    """Positions that count real tokens only, (batch or 1, seq)."""
    length = input_ids.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(num_seen, num_seen + length, device=input_ids.device)[None]
