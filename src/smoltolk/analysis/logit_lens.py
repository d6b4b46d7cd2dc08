"""The logit lens: what the text head reads off every level (nostalgebraist 2020)."""

from dataclasses import dataclass

import numpy as np
import torch

from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM

ROWS = 256  # scored at a time: the vocabulary may have hundreds of thousands of columns


@dataclass(frozen=True, eq=False)
class Lens:
    """What the text head says at some places, all (levels, places).

    Args:
        best: the text token of the highest score.
        log_probability: log-probability of the token asked for, in nats.
    """

    best: np.ndarray
    log_probability: np.ndarray


@torch.no_grad()
def logit_lens(model: SmolTolkForCausalLM, states: np.ndarray, tokens: np.ndarray) -> Lens:
    """Reads text off levels: through the final norm, where it has not been applied yet, and the text head.

    Args:
        model: the model.
        states: the levels h⁰ … h^L (levels, places, dim); h^L comes after the final norm.
        tokens: the text token to score at each place (places,).
    """
    best = np.zeros(states.shape[:2], dtype=np.int64)
    log_probability = np.zeros(states.shape[:2])
    dtype = model.lm.get_output_embeddings().weight.dtype
    for level in range(len(states)):
        for start in range(0, len(tokens), ROWS):
            chosen = slice(start, start + ROWS)
            hidden = torch.from_numpy(states[level, chosen]).to(model.device, dtype)
            if level < len(states) - 1:
                hidden = model.final_norm(hidden)
            scores = model.text_head(hidden).float().log_softmax(-1)
            wanted = torch.from_numpy(tokens[chosen]).to(model.device)
            best[level, chosen] = scores.argmax(-1).cpu().numpy()
            log_probability[level, chosen] = scores.gather(-1, wanted[:, None])[:, 0].double().cpu().numpy()
    return Lens(best, log_probability)
