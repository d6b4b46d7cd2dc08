"""Late fusion: adapters, and how the input adapter runs on segments of speech."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig


class Adapter(nn.Module):
    """A stack of decoder layers of the backbone's own class, causal, without a final norm.

    Args:
        body: the backbone, whose classes of decoder layers and rotary positions it takes.
        config: what they are built from (`SmolTolkConfig.adapter_config`).
        first_layer: index of the first layer in the shared cache.
        num_layers: how many layers; none makes the adapter the identity.
    """

    def __init__(self, body: Any, config: PreTrainedConfig, first_layer: int, num_layers: int) -> None:
        super().__init__()
        layer_class, rotary_class = type(body.layers[0]), type(body.rotary_emb)
        self.config = config
        self.next_layer = first_layer + num_layers  # of the shared cache
        self.layers = nn.ModuleList(layer_class(config, first_layer + i) for i in range(num_layers))
        self.rotary_emb = rotary_class(config) if num_layers else None
        # Some families name the cache or part their rotary positions by the kind of attention.
        takes_layer_past = "layer_past" in inspect.signature(layer_class.forward).parameters
        self.cache_argument = "layer_past" if takes_layer_past else "past_key_values"
        takes_layer_type = "layer_type" in inspect.signature(rotary_class.forward).parameters
        self.rotary_arguments = {"layer_type": "full_attention"} if takes_layer_type else {}

    def forward(
        self, hidden: Tensor, attention_mask: Any, position_ids: Tensor, cache: Cache | None = None, **kwargs: Any
    ) -> Tensor:
        """(batch, seq, dim) → (batch, seq, dim); mask and further arguments are what the configured attention takes."""
        if self.rotary_emb is None:
            return hidden
        attention = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(hidden, position_ids, **self.rotary_arguments),
            self.cache_argument: cache,
            **kwargs,
        }
        for layer in self.layers:
            hidden = first(layer(hidden, **attention))
        return hidden


def fuse(adapter: Adapter, embeds: Tensor, is_speech: Tensor, is_first: Tensor, cache: Cache | None) -> Tensor:
    """Late fusion: speech goes through the input adapter, segment by segment; all else passes by.

    Args:
        adapter: the input adapter.
        embeds: raw embeddings e_t, (batch, seq, dim).
        is_speech: which positions are speech, (batch, seq).
        is_first: where a document begins within a row, (batch, seq).
        cache: that of all stacks, with one more layer after the adapter's.

    Returns:
        h⁰, (batch, seq, dim).
    """
    if not len(adapter.layers):
        return embeds
    if cache is not None:
        return fuse_cached(adapter, embeds, is_speech, cache)
    if "flash" in adapter.config._attn_implementation:
        return fuse_packed(adapter, embeds, is_speech, is_first)
    return fuse_padded(adapter, embeds, is_speech, is_first)


def fuse_packed(adapter: Adapter, embeds: Tensor, is_speech: Tensor, is_first: Tensor) -> Tensor:
    """Runs the adapter on speech positions only, all segments in one row without padding (flash attention)."""
    start, length = speech_segments(is_speech, is_first)  # (segments,), (segments,)
    flat = embeds.flatten(0, 1)  # (batch · seq, dim)
    position = is_speech.flatten().nonzero()[:, 0]  # of speech in it, segment after segment
    if not len(length):  # every parameter keeps a gradient, also with text alone
        length, position = length.new_ones(1), position.new_zeros(1)
        start = position
    offset = position - start.repeat_interleave(length)
    bounds = F.pad(length.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(length.max())
    composed = adapter(
        flat[position][None],
        None,
        offset[None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
    )
    composed = torch.where(is_speech.flatten()[position, None], composed[0].to(flat.dtype), flat[position])
    return flat.index_put((position,), composed).view_as(embeds)


def fuse_padded(adapter: Adapter, embeds: Tensor, is_speech: Tensor, is_first: Tensor) -> Tensor:
    """Runs the adapter on speech positions only, segments of like length side by side."""
    flat, fused = embeds.flatten(0, 1), embeds.flatten(0, 1).clone()  # (batch · seq, dim)
    # Sharded ranks gather weights together: each must call the adapter as often as any other, once.
    in_step = torch.distributed.is_available() and torch.distributed.is_initialized()
    groups = of_like_length(*speech_segments(is_speech, is_first), in_one_group=in_step)
    for start, length, longest in groups:  # (segments,), (segments,), int
        offset = torch.arange(longest, device=embeds.device)
        inside = offset < length[:, None]  # (segments, longest)
        position = (start[:, None] + offset).clamp(max=len(flat) - 1)
        composed = adapter(
            flat[position],
            mask_for(adapter.config, offset <= offset[:, None], embeds.dtype),
            offset[None],
        )
        fused = fused.index_put((position[inside],), composed[inside].to(fused.dtype))
    if not groups and (adapter.training or in_step):  # every parameter keeps a gradient, also with text alone
        zero = torch.zeros(1, 1, dtype=torch.long, device=embeds.device)
        fused = fused + 0.0 * adapter(flat[None, :1], None, zero).sum()
    return fused.view_as(embeds)


def fuse_cached(adapter: Adapter, embeds: Tensor, is_speech: Tensor, cache: Cache) -> Tensor:
    """Runs the adapter with a cache, whose last layer remembers which tokens are speech, hence all segments."""
    memory = adapter.next_layer
    num_seen = cache.get_seq_length(memory) + 0  # a static cache counts in place
    now = is_speech[:, None, :, None].to(embeds.dtype)
    seen = cache.update(now, now, memory)[0][:, 0, :, 0] > 0.5  # (batch, seen + seq)
    index = torch.arange(seen.shape[1], device=embeds.device)
    starts = seen & ~F.pad(seen, (1, 0))[:, :-1]
    begin = torch.where(starts, index, 0).cummax(1).values  # start of the segment at each position
    query = num_seen + torch.arange(embeds.shape[1], device=embeds.device)
    begin_of_query = begin.index_select(1, query)
    reaches = (index <= query[:, None]) & (index >= begin_of_query[..., None]) & seen[:, None]
    reaches = (reaches | (index == query[:, None]))[:, None]  # (batch, 1, seq, seen + seq)
    positions = (query - begin_of_query) * is_speech
    composed = adapter(embeds, mask_for(adapter.config, reaches, embeds.dtype), positions, cache)
    return torch.where(is_speech[..., None], composed.to(embeds.dtype), embeds)


def speech_segments(is_speech: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
    """Maximal runs of speech.

    Args:
        is_speech: which positions are speech, (batch, seq).
        is_first: where a document begins within a row, (batch, seq); a run ends before it.

    Returns:
        Start in the flattened batch, and length, both (segments,).
    """
    padded = F.pad(is_speech, (1, 1))
    begins, ends = is_first | ~padded[:, :-2], F.pad(is_first[:, 1:], (0, 1)) | ~padded[:, 2:]
    rises = (is_speech & begins).flatten().nonzero()[:, 0]  # first positions
    falls = (is_speech & ends).flatten().nonzero()[:, 0]  # last positions
    return rises, falls - rises + 1


def of_like_length(start: Tensor, length: Tensor, *, in_one_group: bool = False) -> list[tuple[Tensor, Tensor, int]]:
    """Segments, both (segments,), in groups of (start, length, longest length), or all in one group.

    Padding a group to its longest segment at most doubles it, and segments shorter than 32 are one group.
    """
    groups = []
    longest = int(length.max()) if len(length) else 0
    limit, covered = longest if in_one_group else 32, 0
    while covered < longest:
        chosen = (length > covered) & (length <= limit)
        if chosen.any():
            groups.append((start[chosen], length[chosen], int(length[chosen].max())))
        covered, limit = limit, 2 * limit
    return groups


def mask_for(config: PreTrainedConfig, reaches: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A boolean attention mask, (…, query, key), in the form the configured attention takes.

    A plain causal mask, (seq, seq), needs no tensor with SDPA, which is faster by its own flag.
    """
    if config._attn_implementation == "sdpa":
        return None if reaches.ndim == 2 else reaches
    return torch.zeros_like(reaches, dtype=dtype).masked_fill(~reaches, torch.finfo(dtype).min)


def first(output: Any) -> Tensor:
    """The hidden states of a decoder layer's output, which is a tensor or a tuple."""
    return output[0] if isinstance(output, tuple) else output
