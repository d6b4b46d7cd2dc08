"""What the layer selector looks at: mean weight per level, by modality, by unit, by distance from a switch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM

MAX_AFTER_SWITCH = 24


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Mean weight of each backbone level where a unit is predicted; NaN where nothing was seen.

    Args:
        speech: over all positions whose next id is speech (num_layers,).
        by_unit: by the unit that is predicted, end-of-speech last (num_units + 1, num_layers).
        after_switch: by how many units have been read since the switch to speech (MAX_AFTER_SWITCH,
            num_layers).
        num_positions: number of positions in `speech`.
        by_batch: sum over these positions in each batch (batches, num_layers).
        batch_positions: how many of them are in each batch (batches,).
    """

    speech: np.ndarray
    by_unit: np.ndarray
    after_switch: np.ndarray
    num_positions: int
    by_batch: np.ndarray
    batch_positions: np.ndarray


@torch.no_grad()
def layer_weights(model: SmolTolkForCausalLM, batches: Sequence[torch.Tensor]) -> LayerWeights:
    """Averages the selector's weights over rows of ids.

    Args:
        model: the model.
        batches: ids (rows, row_tokens), without padding.
    """
    model.eval()
    ids = model.ids
    num_layers = model.config.lm_config.num_hidden_layers
    by_unit = np.zeros((ids.num_units + 1, num_layers))
    unit_counts = np.zeros(ids.num_units + 1)
    after = np.zeros((MAX_AFTER_SWITCH, num_layers))
    after_counts = np.zeros(MAX_AFTER_SWITCH)
    by_batch, batch_positions = np.zeros((len(batches), num_layers)), np.zeros(len(batches), dtype=int)
    for i, input_ids in enumerate(batches):
        weights = model(input_ids.to(model.device), return_logits=False).layer_weights[:, :-1].cpu().numpy()
        target = input_ids[:, 1:].numpy() - ids.speech_offset
        is_speech = (target >= 0) & (target <= ids.num_units)
        np.add.at(by_unit, target[is_speech], weights[is_speech])
        np.add.at(unit_counts, target[is_speech], 1)
        by_batch[i], batch_positions[i] = weights[is_speech].sum(0, dtype=float), is_speech.sum()
        distance = since_switch(input_ids.numpy(), ids.switch_id)[:, :-1]
        chosen = is_speech & (distance >= 0) & (distance < MAX_AFTER_SWITCH)
        np.add.at(after, distance[chosen], weights[chosen])
        np.add.at(after_counts, distance[chosen], 1)
    with np.errstate(invalid="ignore"):
        return LayerWeights(
            speech=by_unit.sum(0) / unit_counts.sum(),
            by_unit=by_unit / unit_counts[:, None],
            after_switch=after / after_counts[:, None],
            num_positions=int(unit_counts.sum()),
            by_batch=by_batch,
            batch_positions=batch_positions,
        )


def since_switch(input_ids: np.ndarray, switch_id: int) -> np.ndarray:
    """Distance from the last switch, 0 at the switch itself and −1 before the first, (rows, row_tokens)."""
    position = np.arange(input_ids.shape[1])
    last = np.maximum.accumulate(np.where(input_ids == switch_id, position, -1), axis=1)
    return np.where(last >= 0, position - last, -1)
