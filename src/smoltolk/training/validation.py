"""Validation: the loss of each task on its fixed batch, and what the layer selector looks at."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from smoltolk.data.dataset import Batch
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM
from smoltolk.training.distributed import Ranks, reshard


@torch.no_grad()
def validate(
    model: SmolTolkForCausalLM,
    batches: Mapping[str, Batch],
    forward: Callable[[Batch], Any],
    ranks: Ranks,
    rows_per_micro_batch: int,
) -> dict[str, Any]:
    """Scores the batches of all tasks, spread over the ranks.

    Args:
        model: the model, which is in evaluation mode afterwards.
        batches: one for each task.
        forward: the model's output for a micro-batch.
        ranks: what this process is among the others.
        rows_per_micro_batch: rows in one forward.

    Returns:
        `validation_…_loss` of each task, the mean over its labels; where units are predicted also
        `selector_entropy` in nats and `layer_weights`, a share for each level.
    """
    model.eval()
    metrics: dict[str, Any] = {}
    config: Any = model.config
    selected = [0.0] * (config.lm_config.num_hidden_layers + 2)  # sums of weights and of entropy, and number of units
    for task, batch in batches.items():
        starts = range(0, len(batch), rows_per_micro_batch)
        parts = [batch.select(slice(start, start + rows_per_micro_batch)) for start in starts]
        total = 0.0
        # Sharded ranks gather weights together: one that has no part left computes one that does not count.
        for first in range(0, len(parts), ranks.size):
            is_counted = first + ranks.rank < len(parts)
            part = parts[first + ranks.rank if is_counted else 0]
            output = forward(part)
            if not is_counted:
                continue
            num_text, num_speech = model.count_labels(part.input_ids, part.labels)
            total += output.text_loss.item() * num_text if num_text else 0.0
            total += output.speech_loss.item() * num_speech if num_speech else 0.0
            is_unit = part.labels[:, 1:] >= model.ids.speech_offset
            weights = output.layer_weights[:, :-1][is_unit.to(ranks.device)]  # (units, L)
            entropy = -torch.special.xlogy(weights, weights).sum()
            found = [*weights.sum(0).tolist(), entropy.item(), len(weights)]
            selected = [a + b for a, b in zip(selected, found, strict=True)]
        num_labels = max(1, sum(model.count_labels(batch.input_ids, batch.labels)))
        metrics[f"validation_{task}_loss"] = finite(ranks.sum(total)[0] / num_labels)
    reshard(model)
    *weight_sums, entropy_sum, count = ranks.sum(*selected)
    if count:
        metrics["selector_entropy"] = finite(entropy_sum / count)
        metrics["layer_weights"] = [finite(round(weight / count, 5)) for weight in weight_sums]
    return metrics


def finite(value: float) -> float | None:
    """The value, or None for one that JSON cannot hold."""
    return value if abs(value) < float("inf") else None
