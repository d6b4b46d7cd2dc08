"""The paper's equations as one would write them first: what the benchmarks compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from smoltolk import SmolTolkForCausalLM, SmolTolkOutput


class ReferenceModel(nn.Module):
    """Straightforward PyTorch on the weights of a `SmolTolkForCausalLM`; same losses, same gradients.

    All positions go through the input adapter under a dense mask, all levels are stacked before they are mixed,
    the output adapter and both heads run on all positions, and cross-entropy takes whole float32 logits.

    Args:
        model: the model whose weights it uses, with the paper's settings.

    Raises:
        ValueError: the model has other settings than the paper's.
    """

    def __init__(self, model: SmolTolkForCausalLM) -> None:
        super().__init__()
        config = model.config
        if (config.layer_mixing, config.selector_input, config.speech_residual) != ("selected", "static", True):
            raise ValueError(
                f"layer_mixing is {config.layer_mixing!r}, selector_input {config.selector_input!r}, speech_residual "
                f"{config.speech_residual}: the reference knows 'selected', 'static' and True only"
            )
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> SmolTolkOutput:
        """Ids and labels, both (batch, seq) and unpadded → the three losses."""
        model, ids = self.model, self.model.ids
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        embeds = self._embed(input_ids)  # (batch, seq, dim)

        is_speech = input_ids >= ids.speech_offset
        composed = self._input_adapter(embeds, is_speech, positions)
        fused = torch.where(is_speech[..., None], composed.to(embeds.dtype), embeds)
        levels = model.body(inputs_embeds=fused, use_cache=False, output_hidden_states=True).hidden_states[1:]

        selector = model.layer_selector
        stack = torch.stack(levels).float()  # (L, batch, seq, dim)
        average = (stack * selector.static_logits.softmax(0)[:, None, None, None]).sum(0)
        weights = selector.projection(average).float().softmax(-1)  # (batch, seq, L)
        speech = (stack * weights.movedim(-1, 0)[..., None]).sum(0) + embeds
        causal = create_causal_mask(model.lm.config, embeds, None, None, positions)
        speech = model.output_adapter(speech.to(embeds.dtype), causal, positions)

        text_logits = model.lm.get_output_embeddings()(levels[-1])  # (batch, seq, text vocabulary)
        unit_logits = F.linear(speech, model.unit_embeddings.weight)  # (batch, seq, unit vocabulary)
        is_text = (labels >= 0) & (labels < ids.text_vocab_size)
        is_unit = labels >= ids.speech_offset
        text_sum = summed_cross_entropy(text_logits, labels, is_text)
        unit_sum = summed_cross_entropy(unit_logits, labels - ids.speech_offset, is_unit)
        num_text, num_units = is_text[:, 1:].sum(), is_unit[:, 1:].sum()
        return SmolTolkOutput(
            loss=(text_sum + unit_sum) / (num_text + num_units),
            text_loss=text_sum / num_text,
            speech_loss=unit_sum / num_units,
        )

    def _embed(self, input_ids: Tensor) -> Tensor:
        model, ids = self.model, self.model.ids
        embeds = model.get_input_embeddings()(input_ids.clamp(max=ids.text_vocab_size - 1))
        control = model.control_embeddings((input_ids - ids.text_vocab_size).clamp(0, 2))
        units = model.unit_embeddings((input_ids - ids.speech_offset).clamp(min=0))
        embeds = torch.where((input_ids >= ids.text_vocab_size)[..., None], control, embeds)
        return torch.where((input_ids >= ids.speech_offset)[..., None], units, embeds)

    def _input_adapter(self, embeds: Tensor, is_speech: Tensor, positions: Tensor) -> Tensor:
        """All positions under a dense mask that parts the runs of speech, (batch, 1, seq, seq)."""
        seq = embeds.shape[1]
        run = (is_speech[:, 1:] != is_speech[:, :-1]).cumsum(1)
        run = F.pad(run, (1, 0))  # (batch, seq)
        causal = torch.ones(seq, seq, dtype=torch.bool, device=embeds.device).tril()
        mask = ((run[:, :, None] == run[:, None]) & causal)[:, None]
        adapter = self.model.input_adapter
        if adapter.config._attn_implementation == "eager":
            mask = torch.zeros_like(mask, dtype=embeds.dtype).masked_fill(~mask, torch.finfo(embeds.dtype).min)
        return adapter(embeds, mask, positions)


def summed_cross_entropy(logits: Tensor, labels: Tensor, is_counted: Tensor) -> Tensor:
    """Summed float32 cross-entropy of logits (batch, seq, vocab) at the counted labels (batch, seq), shifted here."""
    target = labels.where(is_counted, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="sum")
