"""Steering `generate` through the one id space."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from smoltolk.model.configuration_smoltolk import IdSpace
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM


@dataclass(frozen=True)
class RunLengths:
    """Fewest and most tokens of a run of one modality; both bounds are included.

    What the prompt holds of a run does not count. A run that has reached its bound ends: with a switch where
    the model may switch, else with the end token.

    Args:
        text: bounds of text tokens, None for no upper bound.
        speech: bounds of units.

    Raises:
        ValueError: bounds are not 0 ≤ fewest ≤ most.
    """

    text: tuple[int, int | None] = (0, None)
    speech: tuple[int, int | None] = (0, None)

    def __post_init__(self) -> None:
        for name in ("text", "speech"):
            fewest, most = getattr(self, name)
            if fewest < 0 or (most is not None and most < max(fewest, 1)):
                raise ValueError(f"{name} is {(fewest, most)}: give 0 <= fewest <= most, and most at least 1")


class ModalityLogitsProcessor(LogitsProcessor):
    """Keeps each row in its modality: after speech speech, after text text, after a switch the other one.

    Reserved speech rows and control ids are never generated, but for the switch of a model that predicts it.

    Args:
        ids: the id space.
        can_switch: whether the switch may be generated.
        lengths: bounds of the length of runs.
        prompt_length: tokens of the prompt, which do not count for the bounds.
    """

    def __init__(
        self,
        ids: IdSpace,
        *,
        can_switch: bool = False,
        lengths: RunLengths | None = None,
        prompt_length: int = 0,
    ) -> None:
        self.ids = ids
        self.can_switch = can_switch
        self.lengths = lengths or RunLengths()
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, seen) ids, (batch, vocab_size) scores → log-probabilities over the ids that may come, else −inf."""
        ids = self.ids
        column = torch.arange(scores.shape[1], device=scores.device)
        is_speech = next_is_speech(input_ids, ids)[:, None]
        units = (column >= ids.speech_offset) & (column <= ids.end_of_speech_id)
        allowed = torch.where(is_speech, units, column < ids.text_vocab_size)  # (batch, vocab_size)
        if self.can_switch:
            allowed |= (column == ids.switch_id) & (input_ids[:, -1:] != ids.switch_id)
        run = run_length(input_ids[:, self.prompt_length :], ids)[:, None]
        fewest, most = (_per_row(is_speech, self.lengths.text[i], self.lengths.speech[i]) for i in (0, 1))
        end = torch.where(is_speech, column == ids.end_of_speech_id, column == ids.end_of_text_id)
        is_last = end | (column == ids.switch_id)
        allowed &= ~(is_last & (run < fewest))
        closing = (column == ids.switch_id) if self.can_switch else end
        allowed = torch.where(run >= most, closing & allowed, allowed)
        # Each block is normalised by itself, as in training: beams are compared by what comes out here.
        return scores.masked_fill(~allowed, float("-inf")).log_softmax(-1)


class Sampler(LogitsProcessor):
    """Makes the best id a sample, by Gumbel noise from a generator of its own.

    Args:
        generator: where the noise comes from, on the scores' device; None for torch's own.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, seen) ids, (batch, vocab_size) logits → logits with noise."""
        waiting = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self.generator)
        return scores - waiting.log()


def _per_row(is_speech: Tensor, text: int | None, speech: int | None) -> Tensor:
    """The bound of each row's modality; None is one that is never reached."""
    unbounded = torch.iinfo(torch.long).max
    bounds = torch.tensor([unbounded if bound is None else bound for bound in (text, speech)], device=is_speech.device)
    return bounds[is_speech.long()]


def run_length(input_ids: Tensor, ids: IdSpace) -> Tensor:
    """Tokens since the last switch, (batch, seen) → (batch,)."""
    since = (input_ids.flip(1) == ids.switch_id).cumsum(1) == 0
    return since.sum(1)


def next_is_speech(input_ids: Tensor, ids: IdSpace) -> Tensor:
    """Whether the next id of each row is speech, (batch, seen) → (batch,); a switch alone leads to speech.

    Bop and eop have no modality: `bop units eop switch` goes on in text.
    """
    was_speech = torch.zeros_like(input_ids[:, -1], dtype=torch.bool)
    for token in input_ids[:, -3:].unbind(1):  # at most two control ids follow one another: eop, switch
        is_control = (token >= ids.text_vocab_size) & (token < ids.speech_offset)
        was_speech = torch.where(is_control, was_speech, token >= ids.speech_offset)
    return was_speech ^ (input_ids[:, -1] == ids.switch_id)


def check_prompt(prompt: Sequence[int], ids: IdSpace) -> None:
    """Refuses a prompt whose modalities do not follow one another as in training.

    Raises:
        ValueError: the prompt is empty, or two modalities meet without a switch, or a switch changes nothing.
    """
    if not len(prompt):
        raise ValueError("the prompt is empty: give some text or speech to continue")
    was_speech, switched = None, False
    for place, token in enumerate(prompt):
        if token == ids.switch_id:
            if switched:
                raise ValueError(f"the prompt has a second switch at token {place}: leave one of the two out")
            switched = True
        elif token == ids.bop_id:  # nothing leads from one pair of prompt and answer to the next
            was_speech, switched = None, False
        elif not ids.text_vocab_size <= token < ids.speech_offset:
            is_speech = token >= ids.speech_offset
            changes = was_speech is not None and is_speech != was_speech
            if was_speech is not None and changes != switched:
                way = f"goes from {_name(was_speech)} to {_name(is_speech)} at token {place}"
                raise ValueError(f"the prompt {way} {'with' if switched else 'without'} a switch: {_remedy(switched)}")
            was_speech, switched = is_speech, False


def _name(is_speech: bool) -> str:
    return "speech" if is_speech else "text"


def _remedy(switched: bool) -> str:
    return "a switch stands between two modalities only" if switched else "put the switch id between them"


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
    can_switch: bool = False,
    lengths: RunLengths | None = None,
    streamer: BaseStreamer | None = None,
    stopping: Iterable[Any] = (),
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
        seed: seed of sampling, from a generator of its own; None samples from torch's.
        use_cache: whether to keep keys and values of what was seen.
        can_switch: whether the model may change the modality by itself; it must have learnt to
            (`SmolTolkConfig.predict_switch`).
        lengths: fewest and most tokens of a run of each modality.
        streamer: gets ids as they come, in transformers' way.
        stopping: further stopping criteria of transformers.

    Returns:
        New ids of each row, without the end token and what comes after it.

    Raises:
        ValueError: a prompt is empty, padded on the right, or its modalities do not follow one another as in
            training; the temperature is negative or there is no new token to make; or the model shall switch and never
            learnt to.
    """
    ids = model.ids
    if can_switch and not model.config.predict_switch:
        raise ValueError("can_switch is True, but the model does not predict the switch: train with predict_switch")
    bounds = [most for _, most in (lengths.text, lengths.speech) if most is not None] if lengths else []
    if not can_switch and bounds and min(bounds) < min_new_tokens:
        raise ValueError(f"min_new_tokens is {min_new_tokens}, but lengths ends a run after {min(bounds)}: lower it")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: give 0 for the best id at each step, or more")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if not input_ids.shape[1]:
        check_prompt([], ids)
    for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        check_prompt([token for token, is_real in zip(row, mask, strict=True) if is_real], ids)
    input_ids = input_ids.masked_fill(attention_mask == 0, ids.end_of_text_id)
    ends = [ids.end_of_text_id, ids.end_of_speech_id]
    processors: list[LogitsProcessor] = []
    if temperature > 0:
        # Noise of our own, not torch's: a seed decides the same in any thread, and nothing else changes.
        generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        processors += [TemperatureLogitsWarper(float(temperature))] if temperature != 1 else []
        processors += [TopKLogitsWarper(top_k)] if top_k else []
        processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        processors += [Sampler(generator)]
    steering = ModalityLogitsProcessor(ids, can_switch=can_switch, lengths=lengths, prompt_length=input_ids.shape[1])
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        eos_token_id=ends,
        pad_token_id=ids.end_of_text_id,
        do_sample=False,
        logits_processor=LogitsProcessorList([steering, *processors]),
        stopping_criteria=StoppingCriteriaList(stopping),
        streamer=streamer,
        use_cache=use_cache,
    )
    continuations = []
    for row in output[:, input_ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        continuations.append(row[:end])
    return continuations
