"""Multi-level fission: mixes what all levels of the backbone say, for the speech to be predicted."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .configuration_smoltolk import SmolTolkConfig


class LayerSelector(nn.Module):
    """Multi-level fission (paper, section 3): mixes the backbone's levels per position.

    `m_t = Σ_l softmax(α)_l h^l_t`, `w_t = softmax(W m_t + b)`, `z_t = Σ_l w_{t,l} h^l_t`.
    """

    def __init__(self, config: SmolTolkConfig) -> None:
        super().__init__()
        self.mixing = config.layer_mixing
        self.selector_input = config.selector_input
        num_layers, source_size = config.lm_config.num_hidden_layers, config.hidden_size
        if self.mixing == "static" or (self.mixing == "selected" and self.selector_input == "static"):
            self.static_logits = nn.Parameter(torch.empty(num_layers))  # α
        if self.mixing == "selected":
            if config.selector_level_size is not None:
                level_size, hidden_size = config.selector_level_size, config.selector_level_hidden_size
                self.level_projection = perceptron(source_size, hidden_size, level_size)
                source_size = num_layers * level_size
            self.projection = perceptron(source_size, config.selector_hidden_size, num_layers)  # W, b

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
        dtype = next(self.projection.parameters()).dtype
        if self.selector_input == "static":
            source = mix(levels, self.static_logits.float().softmax(-1).expand(shape))
        elif self.selector_input == "levels":
            source = torch.cat([self.level_projection(level.to(dtype)) for level in levels], dim=-1)
        else:
            source = last if self.selector_input == "last" else levels[int(self.selector_input)]
        scores = self.projection(source.to(dtype))
        weights = scores.float().softmax(-1)
        return mix(levels, weights), weights


def mix(levels: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Σ_l w_l h^l in float32: levels of (batch, seq, dim), weights (batch, seq, L) → (batch, seq, dim).

    A running sum: stacking the levels would take L times the memory.
    """
    mixed = weights[..., :1] * levels[0].float()
    for i, level in enumerate(levels[1:], start=1):
        mixed = torch.addcmul(mixed, weights[..., i : i + 1], level.float())
    return mixed


def perceptron(size: int, hidden_size: int | None, output_size: int) -> nn.Module:
    """A linear map, or one with a hidden layer."""
    if hidden_size is None:
        return nn.Linear(size, output_size)
    return nn.Sequential(nn.Linear(size, hidden_size), nn.GELU(), nn.Linear(hidden_size, output_size))
