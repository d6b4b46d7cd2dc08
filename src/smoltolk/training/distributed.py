"""Ranks: the processes of a run that `torchrun` started, or the one there is without it."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM


@dataclass(frozen=True)
class Ranks:
    """One process among those that train a model together.

    Args:
        rank: its number, from 0.
        size: number of processes.
        device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sums of numbers over all ranks, in float64."""
        if self.size == 1:
            return list(values)
        # On the CPU, so that no rank waits for its accelerator.
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def share(self, value: Any) -> Any:
        """What the main process has for this value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """What each rank has for this value."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """Ends the work together."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def join_ranks(device: str) -> Ranks:
    """Joins the processes that `torchrun` started; alone without it.

    Args:
        device: as recipes name it; "auto" takes the GPU if there is one, "cuda" that of the local rank.

    Raises:
        ValueError: there is no such device, or several ranks are to share a GPU.
    """
    # Looked at, not tried as `check_device` does: that would make every rank take memory of the first GPU.
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, which torch does not know: give auto, cuda or cpu") from error
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if place.type == "cuda" and size > 1:
        if place.index is not None:
            raise ValueError(f"device is {device!r}, but {size} ranks cannot share a GPU: give cuda")
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if place.type == "cuda" and (place.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(
            f"device is {device!r}, here number {place.index or 0} from 0, but torch finds {count} GPUs: start as "
            "many ranks as there are, check driver and CUDA_VISIBLE_DEVICES, or give cpu"
        )
    if size == 1:
        return Ranks(0, 1, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    return Ranks(rank, size, place)


def shard(model: SmolTolkForCausalLM, ranks: Ranks) -> None:
    """Spreads the model over the ranks, in place (FSDP2): each layer by itself, the rest together.

    Weights stay float32 and are gathered so: a step computes what it computes on one rank.
    """
    if ranks.size == 1:
        model.to(ranks.device)  # type: ignore[arg-type]
        return
    from torch.distributed.fsdp import fully_shard

    layers = (model.body.layers, model.input_adapter.layers, model.output_adapter.layers)
    shard_layers(chain(*layers), ranks)
    fully_shard(model, mesh=_mesh(ranks))


def shard_layers(layers: Iterable[nn.Module], ranks: Ranks) -> None:
    """Spreads modules over the ranks, each by itself, in place; alone there is nothing to spread."""
    if ranks.size == 1:
        return
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(ranks)
    for layer in layers:
        # Said, since by default layers of no larger module that is spread too stay whole after their first forward.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def _mesh(ranks: Ranks) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(ranks.device.type, (ranks.size,))


def set_gradient_sync(model: SmolTolkForCausalLM, *, is_on: bool) -> None:
    """Whether the next backward pass exchanges gradients: only the last of several micro-batches needs to."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(is_on)  # type: ignore[operator]


def reshard(model: SmolTolkForCausalLM) -> None:
    """Gives back what a forward pass without a backward pass has gathered; else the weights would stay whole."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over ranks, in one piece."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
