"""Steering `generate` through the one id space."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from smoltolk.model.configuration_smoltolk import IdSpace
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM


class ModalityLogitsProcessor(LogitsProcessor):
    """Keeps each row in its modality: after speech speech, after text text, after a switch the other one.

    Control ids and reserved speech rows are never generated.

    Args:
        ids: the id space.
    """

    def __init__(self, ids: IdSpace) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, seen) ids, (batch, vocab_size) scores → scores with −inf outside of the row's block."""
        column = torch.arange(scores.shape[1], device=scores.device)
        speech = (column >= self.ids.speech_offset) & (column <= self.ids.end_of_speech_id)
        text = column < self.ids.text_vocab_size
        allowed = torch.where(next_is_speech(input_ids, self.ids)[:, None], speech, text)
        return scores.masked_fill(~allowed, float("-inf"))


def next_is_speech(input_ids: Tensor, ids: IdSpace) -> Tensor:
    """Whether the next id of each row is speech, (batch, seen) → (batch,); a switch alone leads to speech."""
    last = input_ids[:, -1]
    before = input_ids[:, -2] if input_ids.shape[1] > 1 else torch.zeros_like(last)
    return torch.where(last == ids.switch_id, before < ids.speech_offset, last >= ids.speech_offset)


@torch.no_grad()
def continue_ids(
    model: SmolTolkForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = 0,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continues rows of ids in the modality that their last id asks for.

    Args:
        model: the model.
        input_ids: prompts, padded on the left, (batch, seq).
        attention_mask: 1 for real tokens, 0 for padding, (batch, seq).
        max_new_tokens: longest continuation.
        min_new_tokens: shortest continuation before its end token.
        temperature: 0 takes the best id at each step, more samples.
        top_k: sample from the best so many only, 0 for all.
        top_p: sample from the smallest set of ids with this share of probability.
        seed: seed of sampling; None leaves torch's generator as it is.
        use_cache: whether to keep keys and values of what was seen.

    Returns:
        New ids of each row, without the end token and what comes after it.
    """
    if seed is not None:
        torch.manual_seed(seed)
    ids = model.ids
    ends = [ids.end_of_text_id, ids.end_of_speech_id]
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    output = model.generate(  # type: ignore[misc]
        input_ids,
        attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        eos_token_id=ends,
        pad_token_id=ids.end_of_text_id,
        logits_processor=LogitsProcessorList([ModalityLogitsProcessor(ids)]),
        use_cache=use_cache,
        **sampling,
    )
    continuations = []
    for row in output[:, input_ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        continuations.append(row[:end])
    return continuations
