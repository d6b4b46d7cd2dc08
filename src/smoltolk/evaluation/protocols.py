"""Protocols: what exactly a score is, as explicit knobs with names for the usual sets of them."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from smoltolk.model.configuration_smoltolk import IdSpace


@dataclass(frozen=True)
class Protocol:
    """How a log-likelihood becomes a score: numbers of different protocols are not comparable.

    Args:
        name: what to call it in results.
        span: what is scored: the "continuation" alone, the whole "sequence" with its prompt, or the
            "sequence-but-first", all of it but its first token.
        start: what is put in front, and never scored: nothing ("none"), "end-of-speech", "end-of-text", or the
            end token of the modality that the sequence begins with ("own-end").
        end: where an end token is appended and scored: never ("none"), to sequences that end in "speech", or to
            all, each with its modality's "own" one.
        length_norm: "mean" log-likelihood per scored token, or their "sum".
        tie_credit: what an item counts whose two scores are equal.
        cloze_tie_credit: the same in StoryCloze-type tasks, None for `tie_credit`.
        scores_switch: whether the switch between prompt and continuation is scored, which needs a model that
            predicts it.
        num_prefix_tokens: in S→T alone, so many text tokens stand before the speech prompt: the last ones of an
            ending of another item, drawn by `prefix_seed`, the same before both endings.
        prefix_seed: seed of that choice.

    Raises:
        ValueError: a knob is out of its range, or the first token is to be scored with nothing before it.
    """

    name: str
    span: Literal["continuation", "sequence", "sequence-but-first"]
    start: Literal["none", "end-of-speech", "end-of-text", "own-end"] = "none"
    end: Literal["none", "speech", "own"] = "none"
    length_norm: Literal["mean", "sum"] = "mean"
    tie_credit: float = 0.5
    cloze_tie_credit: float | None = None
    scores_switch: bool = False
    num_prefix_tokens: int = 0
    prefix_seed: int = 0

    def __post_init__(self) -> None:
        for field, choices in CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} is {getattr(self, field)!r}: choose one of {', '.join(choices)}")
        for field in ("tie_credit", "cloze_tie_credit"):
            credit = getattr(self, field)
            if credit is not None and not 0 <= credit <= 1:
                raise ValueError(f"{field} is {credit}: give a number from 0 to 1")
        if self.num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens is {self.num_prefix_tokens}: give 0 or more")
        if self.span == "sequence" and self.start == "none":
            raise ValueError(
                "span is 'sequence' and start is 'none', but nothing predicts a first token without a start: give a "
                "start, or the span 'sequence-but-first'"
            )

    def for_task(self, *, is_cloze: bool) -> "Protocol":
        """The protocol with the tie credit that holds for a kind of task."""
        if not is_cloze or self.cloze_tie_credit is None:
            return replace(self, cloze_tie_credit=None)
        return replace(self, tie_credit=self.cloze_tie_credit, cloze_tie_credit=None)

    def knobs(self) -> dict[str, Any]:
        """All knobs, without the name and the second tie credit: of a protocol that `for_task` made."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "cloze_tie_credit")}


CHOICES = {
    "span": ("continuation", "sequence", "sequence-but-first"),
    "start": ("none", "end-of-speech", "end-of-text", "own-end"),
    "end": ("none", "speech", "own"),
    "length_norm": ("mean", "sum"),
}

CONTINUATION = Protocol("continuation-mean", span="continuation")
# The authors' scripts/nll_eval.py (github.com/Anon-SmolTolk/SmolTolk): units alone, their own end token in front, which
# is end-of-speech; text, which they do not score so, gets end-of-text and not a token that no text follows.
# StoryCloze is won by a strictly higher score; sWUGGY and sBLIMP go through the Zero Resource scorer.
AUTHORS = Protocol("authors", span="sequence", start="own-end", cloze_tie_credit=0.0)
# Their scripts/cross-modal_eval.py, which also puts 10 text tokens before speech prompts in S→T (`num_prefix_tokens`).
AUTHORS_CROSS_MODAL = Protocol("authors-cross-modal", span="continuation", tie_credit=0.0)
# slamkit puts its tokenizer's own start in front; here the end token of the modality, as these models have no other.
SLAMKIT = Protocol("slamkit", span="sequence", start="own-end", end="speech", scores_switch=True)
# The chain rule of the challenge's causal baseline, from start to end symbol, without a norm: compute_proba_LSTM in
# utils/lm_scoring.py (github.com/zerospeech/zerospeech2021_baseline; arXiv 2011.11588). Submissions may score as
# they like: the challenge itself fixes the averages and ties alone.
ZRC = Protocol("zrc", span="sequence", start="own-end", end="own", length_norm="sum")
SALMON = Protocol("salmon", span="sequence-but-first", length_norm="sum")
PROTOCOLS = {protocol.name: protocol for protocol in (CONTINUATION, AUTHORS, AUTHORS_CROSS_MODAL, SLAMKIT, ZRC, SALMON)}


def find_protocol(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol is {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A sequence to score.

    Args:
        prompt: ids before the continuation, without a switch, (prompt,) int64; may be empty.
        continuation: ids of the continuation, (continuation,) int64.
    """

    prompt: np.ndarray
    continuation: np.ndarray


@dataclass(frozen=True, eq=False)
class Layout:
    """A sequence as the model reads it.

    Args:
        ids: start, prompt, switch, continuation, end, (seq,) int64.
        is_scored: which of them count, (seq,).
        num_shared: how many in front depend on the prompt alone.
    """

    ids: np.ndarray
    is_scored: np.ndarray
    num_shared: int


def lay_out(candidate: Candidate, protocol: Protocol, ids: IdSpace) -> Layout:
    """Puts a candidate's parts together, with the switch where the modality changes.

    Raises:
        ValueError: the continuation is empty, or nothing is left to score.
    """
    prompt, continuation = candidate.prompt, candidate.continuation
    if not len(continuation):
        raise ValueError("the continuation is empty: there is nothing to score")
    first = prompt[0] if len(prompt) else continuation[0]
    starts = {
        "none": [],
        "end-of-speech": [ids.end_of_speech_id],
        "end-of-text": [ids.end_of_text_id],
        "own-end": [ids.end_id(bool(first >= ids.speech_offset))],
    }
    start = starts[protocol.start]
    ends_in_speech = bool(continuation[-1] >= ids.speech_offset)
    switches = len(prompt) > 0 and (prompt[-1] >= ids.speech_offset) != (continuation[0] >= ids.speech_offset)
    switch = [ids.switch_id] if switches else []
    has_end = protocol.end == "own" or (protocol.end == "speech" and ends_in_speech)
    end = [ids.end_id(ends_in_speech)] if has_end else []
    parts = [start, prompt, switch, continuation, end]
    sequence = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    is_scored = np.ones(len(sequence), dtype=bool)
    if protocol.span == "continuation":
        is_scored[: len(start) + len(prompt)] = False
    else:
        is_scored[: len(start) + (protocol.span == "sequence-but-first")] = False
    if switches and not protocol.scores_switch:
        is_scored[len(start) + len(prompt)] = False
    if is_scored[0]:
        raise ValueError(
            f"nothing comes before the first token, which the protocol {protocol.name} scores: give a prompt, or "
            "choose a protocol with a start or with the span 'sequence-but-first'"
        )
    if not is_scored.any():
        raise ValueError(f"the sequence has {len(sequence)} token, of which {protocol.name} scores none")
    return Layout(sequence, is_scored, len(start) + len(prompt))
