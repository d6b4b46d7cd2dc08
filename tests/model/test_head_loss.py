"""The chunked cross-entropy is the plain one."""

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import mixed_ids, tiny_model

from smoltolk.model import modeling_smoltolk
from smoltolk.model.modeling_smoltolk import head_loss


def plain(hidden, weight, target, scale, cap):
    logits = F.linear(hidden, weight).float() * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses.sum(), losses.detach()


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (0.5, 2.0)])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_and_gradients_are_those_of_whole_logits(monkeypatch, rows_per_chunk, scale, cap, autocast):
    monkeypatch.setattr(modeling_smoltolk, "LOGITS_PER_CHUNK", 11 * rows_per_chunk)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(11, (7,), generator=generator)
    found = []
    for function in (head_loss, plain):
        hidden = torch.randn(7, 8, generator=generator.manual_seed(1), requires_grad=True)
        weight = torch.randn(11, 8, generator=generator.manual_seed(2), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, losses = function(hidden, weight, target, scale=scale, cap=cap)
        (total / 3).backward()
        found.append((total.detach(), losses, hidden.grad, weight.grad))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if autocast else {"atol": 1e-5, "rtol": 1e-5}
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, **tolerance)


def test_a_frozen_head_and_a_frozen_body_get_no_gradient():
    target = torch.tensor([0, 2])
    for frozen in (0, 1):
        tensors = [torch.randn(2, 4), torch.randn(3, 4)]
        tensors[1 - frozen].requires_grad_()
        head_loss(*tensors, target)[0].backward()
        assert tensors[frozen].grad is None
        assert tensors[1 - frozen].grad.abs().sum() > 0


def test_the_gradient_can_be_taken_once():
    hidden = torch.randn(2, 4, requires_grad=True)
    total, _ = head_loss(hidden, torch.randn(3, 4), torch.tensor([0, 2]))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken before: call the model again"):
        total.backward()


def test_a_model_of_low_precision_trains():
    model = tiny_model().to(torch.bfloat16).train()
    ids = mixed_ids(ids=model.ids)
    output = model(ids, labels=ids)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
