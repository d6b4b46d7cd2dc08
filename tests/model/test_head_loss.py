"""The chunked cross-entropy is the plain one."""

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import mixed_ids, tiny_model

from smoltolk.model.losses import head_loss


def plain(hidden, weight, target, scale, cap):
    logits = F.linear(hidden, weight).float() * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    losses = F.cross_entropy(logits, target, reduction="none")
    return losses.sum(), losses.detach()


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 100])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (0.5, 2.0)])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_and_gradients_are_those_of_whole_logits(monkeypatch, rows_per_chunk, scale, cap, autocast):
    monkeypatch.setattr("smoltolk.model.losses.LOGITS_PER_CHUNK", 11 * rows_per_chunk)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(11, (7,), generator=generator)
    found = []
    for function in (head_loss, plain):
        hidden = torch.randn(7, 8, generator=generator.manual_seed(1), requires_grad=True)
        weight = torch.randn(11, 8, generator=generator.manual_seed(2), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, losses = function(hidden, weight, target, scale=scale, cap=cap)[:2]
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


@pytest.mark.parametrize("frozen", [(), (0, 1)])
def test_one_more_id_is_one_more_column(frozen):
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor([0, 3, 2, 3])  # 3 is the id that the head does not have
    found = []
    for is_plain in (False, True):
        generator.manual_seed(1)
        tensors = [torch.randn(*shape, generator=generator) for shape in ((4, 5), (3, 5), (4,))]
        tensors[2][0] = float("-inf")
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i not in frozen)
        hidden, weight, more = tensors
        if is_plain:
            total = F.cross_entropy(torch.cat([hidden @ weight.T, more[:, None]], 1), target, reduction="sum")
        else:
            total = head_loss(hidden, weight, target, more)[0]
        total.backward()
        found.append([total.detach(), *(t.grad for t in tensors if t.grad is not None)])
    assert len(found[0]) == 4 - len(frozen)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_target_is_best_where_no_id_scores_higher_and_training_does_not_ask(monkeypatch):
    monkeypatch.setattr("smoltolk.model.losses.LOGITS_PER_CHUNK", 2 * 3)
    hidden, weight = torch.eye(3), torch.tensor([[2.0, 0, 1], [1.0, 0, 3], [0.0, 0, 2]])
    target, more = torch.tensor([0, 2, 3]), torch.tensor([0.0, -1, 4])
    with torch.no_grad():
        assert head_loss(hidden, weight, target, more)[2].tolist() == [True, True, True]  # a tie is no higher score
        assert head_loss(hidden, weight, target - 1 + 2 * (target == 0), more)[2].tolist() == [False, True, False]
    assert head_loss(hidden, weight, target, more)[2] is None


def test_the_gradient_can_be_taken_once():
    hidden = torch.randn(2, 4, requires_grad=True)
    total = head_loss(hidden, torch.randn(3, 4), torch.tensor([0, 2]))[0]
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken before: call the model again"):
        total.backward()


def test_a_model_of_low_precision_trains():
    model = tiny_model()
    ids = mixed_ids(ids=model.ids)
    expected = model(ids, labels=ids).loss
    output = model.to(torch.bfloat16).train()(ids, labels=ids)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, atol=0.05, rtol=0.05)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
