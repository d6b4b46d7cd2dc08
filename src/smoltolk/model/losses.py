"""The loss's parts: cross-entropy under a head in chunks, and the entropy of the layer selector."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS_PER_CHUNK = 2**23  # of a head, in training: 32 MiB in float32


class HeadLoss(torch.autograd.Function):
    """Cross-entropy under a linear head, in chunks of rows: neither logits nor their gradient are ever held whole.

    The gradient is made in the forward pass, while a chunk's logits are there, and scaled in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        more: Tensor | None,
        scale: float,
        cap: float | None,
        needs_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows, dim), (vocab, dim), (rows,), (rows,) → summed loss (), losses (rows,), both float32.

        Without a gradient also whether no id scores higher than the target, (rows,), which training does not ask.
        """
        losses = torch.empty(len(hidden), device=hidden.device)
        is_best = None if needs_gradient else torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        needs_hidden, needs_weight, _, needs_more = (n and needs_gradient for n in ctx.needs_input_grad[:4])
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        more_gradient = torch.empty_like(more, dtype=torch.float32) if more is not None and needs_more else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        rows_per_chunk = max(1, LOGITS_PER_CHUNK // len(weight))
        for start in range(0, len(hidden), rows_per_chunk):
            chunk = slice(start, start + rows_per_chunk)
            logits = F.linear(hidden[chunk].to(weight.dtype), weight).float()  # (chunk, vocab)
            if scale != 1:
                logits *= scale
            slope: Tensor | float = scale
            if cap is not None:
                logits = cap * torch.tanh(logits / cap)
                slope = scale * (1 - (logits / cap).square())
            if more is not None:
                logits = torch.cat([logits, more[chunk, None].float()], 1)  # (chunk, vocab + 1)
            picked = logits.gather(1, target[chunk, None])[:, 0]
            total = logits.logsumexp(1)
            losses[chunk] = total - picked
            if is_best is not None:
                is_best[chunk] = picked >= logits.amax(1)
            if not needs_hidden and not needs_weight and not needs_more:
                continue
            gradient = logits.sub_(total[:, None]).exp_()  # softmax, (chunk, vocab)
            gradient.scatter_add_(1, target[chunk, None], gradient.new_full((len(gradient), 1), -1.0))
            if more is not None:
                if more_gradient is not None:
                    more_gradient[chunk] = gradient[:, -1]
                gradient = gradient[:, :-1]
            if isinstance(slope, Tensor) or slope != 1:
                gradient = gradient * slope
            gradient = gradient.to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[chunk] = (gradient @ weight).to(hidden.dtype)
            if weight_gradient is not None:
                some = hidden[chunk].to(weight.dtype)
                if weight.dtype != torch.float32 or torch.is_autocast_enabled(hidden.device.type):
                    weight_gradient += gradient.T @ some
                else:  # without another tensor of the weight's size
                    weight_gradient.addmm_(gradient.T, some)
        ctx.gradients = (
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None,
            None if more is None or more_gradient is None else more_gradient.to(more.dtype),
        )
        ctx.mark_non_differentiable(*(tensor for tensor in (losses, is_best) if tensor is not None))
        return losses.sum(), losses, is_best

    @staticmethod
    def backward(ctx: Any, sum_gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Scales the gradient of the forward pass, in place: it can be taken once."""
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was taken before: call the model again")
        gradients, ctx.gradients = ctx.gradients, None
        return (*(None if g is None else g.mul_(sum_gradient.to(g.dtype)) for g in gradients), *[None] * 3)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    more: Tensor | None = None,
    *,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy of targets under a linear head whose logits are scaled, then capped softly.

    Args:
        hidden: what the head reads, (rows, dim).
        weight: the head's weight, (vocab, dim).
        target: ids, (rows,).
        more: the logit of one more id than the head has, `vocab`, (rows,); neither scaled nor capped.
        scale: factor of the logits.
        cap: bound of the logits, reached through tanh.

    Returns:
        Summed loss (), and each row's own (rows,) without gradient; float32. Where no gradients are taken, also
        whether no id scores higher than the target, (rows,) bool, else None.
    """
    return HeadLoss.apply(hidden, weight, target, more, scale, cap, torch.is_grad_enabled())


def mean_entropy(weights: Tensor, is_real: Tensor) -> Tensor:
    """Mean entropy in nats of distributions (batch, seq, L) over the real positions (batch, seq)."""
    # Clamped: the slope of p log p at 0 is infinite, and softmax would make it NaN.
    entropy = -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(-1)
    return (entropy * is_real).sum() / is_real.sum()
