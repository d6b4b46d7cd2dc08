"""The one scorer: log-likelihoods of spans of id sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM


@dataclass(frozen=True)
class Protocol:
    """How a log-likelihood becomes a score: numbers of different protocols are not comparable.

    Args:
        name: what to call it in results.
        span: what is scored, the "continuation" alone or the "sequence" with its prompt. Switch tokens are
            never scored.
        length_norm: "mean" log-likelihood per token, or their "sum".
        tie_credit: what an item counts whose two scores are equal.
    """

    name: str
    span: Literal["continuation", "sequence"]
    length_norm: Literal["mean", "sum"]
    tie_credit: float


CONTINUATION = Protocol("continuation-mean", span="continuation", length_norm="mean", tie_credit=0.5)
AUTHORS_CROSS_MODAL = Protocol("authors-cross-modal", span="continuation", length_norm="mean", tie_credit=0.0)
PROTOCOLS = {protocol.name: protocol for protocol in (CONTINUATION, AUTHORS_CROSS_MODAL)}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A sequence to score.

    Args:
        ids: prompt and continuation, (seq,) int64.
        start: where the continuation begins.
    """

    ids: np.ndarray
    start: int


@torch.no_grad()
def score_candidates(
    model: SmolTolkForCausalLM,
    candidates: Sequence[Candidate],
    protocol: Protocol,
    *,
    batch_size: int = 48,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Scores sequences under a protocol.

    Batches are made of sequences of like length and padded on the right; a score does not depend on what
    else is in the batch.

    Args:
        model: the model.
        candidates: the sequences.
        protocol: which tokens count, and how.
        batch_size: sequences in one forward.
        progress: called with the number of sequences done since the last call.

    Returns:
        Scores (len(candidates),) float64, higher is likelier.
    """
    model.eval()
    scores = np.zeros(len(candidates))
    order = np.argsort([len(candidate.ids) for candidate in candidates], kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        length = max(len(candidates[i].ids) for i in chosen)
        input_ids = torch.zeros(len(chosen), length, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, i in enumerate(chosen):
            ids = torch.from_numpy(candidates[i].ids)
            first = candidates[i].start if protocol.span == "continuation" else 1
            input_ids[row, : len(ids)], mask[row, : len(ids)] = ids, 1
            labels[row, first : len(ids)] = ids[first:]
        labels[labels == model.ids.switch_id] = -100
        output = model(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            labels=labels.to(model.device),
            return_token_losses=True,
        )
        sums = -output.token_losses.double().sum(1).cpu().numpy()
        counts = (labels[:, 1:] >= 0).sum(1).numpy()
        scores[chosen] = sums / counts if protocol.length_norm == "mean" else sums
        if progress is not None:
            progress(len(chosen))
    return scores
