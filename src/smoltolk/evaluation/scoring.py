"""The one scorer: log-likelihoods of sequences under a protocol."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from smoltolk.evaluation.protocols import Candidate, Layout, Protocol, lay_out
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM, SmolTolkOutput

SHORTEST_SHARED = 16  # tokens; a cache costs more than reading a shorter prompt again


@dataclass(frozen=True)
class ScoringSettings:
    """How scores are computed; but for rounding, none of it changes them except precision and truncation.

    Args:
        batch_size: sequences in one forward.
        max_batch_tokens: tokens in one forward, padding included; a longer sequence is alone.
        autocast: whether to compute in bfloat16 where PyTorch's autocast does.
        truncates_prompts: whether prompts lose their beginning where a sequence is longer than the model's positions,
            which is counted in the result; otherwise that is an error.
        shares_prompts: whether sequences with the same prompt read it once.
        chunk_items: items that are made, scored and kept together.

    Raises:
        ValueError: a size is below 1.
    """

    batch_size: int = 48
    max_batch_tokens: int = 16384
    autocast: bool = False
    truncates_prompts: bool = False
    shares_prompts: bool = True
    chunk_items: int = 256

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_batch_tokens", "chunk_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")

    def precision(self, model: SmolTolkForCausalLM) -> str:
        """What the model computes in, for the record."""
        weights = str(model.dtype).removeprefix("torch.")
        return f"{weights}, autocast to bfloat16" if self.autocast else weights


def score_candidates(
    model: SmolTolkForCausalLM,
    candidates: Sequence[Candidate],
    protocol: Protocol,
    settings: ScoringSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Scores sequences under a protocol.

    A prompt that several sequences share is read once; batches are made of sequences of like length. But for
    rounding a score does not depend on what else is scored, and like sequences have the very same score.

    Args:
        model: the model.
        candidates: the sequences.
        protocol: which tokens count, and how.
        settings: sizes of batches and precision.
        progress: called with the number of sequences done since the last call.

    Returns:
        Scores (len(candidates),) float64, higher is likelier.

    Raises:
        ValueError: a sequence with nothing to score, with ids that the model has not, or a switch to score in a model
            that does not predict it.
    """
    return score_with_greedy(model, candidates, protocol, settings, progress)[0]


@torch.no_grad()
def score_with_greedy(
    model: SmolTolkForCausalLM,
    candidates: Sequence[Candidate],
    protocol: Protocol,
    settings: ScoringSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores sequences, and says which of them greedy decoding would give.

    Args:
        model: as in `score_candidates`, which this is but for what it returns; so are the others.
        candidates: the sequences.
        protocol: which tokens count, and how.
        settings: sizes of batches and precision.
        progress: called with the number of sequences done since the last call.

    Returns:
        Scores (len(candidates),) float64, and whether each scored token is the best of its modality given what
        comes before it, (len(candidates),) bool.

    Raises:
        ValueError: as `score_candidates`.
    """
    settings = settings or ScoringSettings()
    layouts = [lay_out(candidate, protocol, model.ids) for candidate in candidates]
    if protocol.scores_switch and not model.config.predict_switch:
        switches = model.ids.switch_id
        if any((layout.ids[layout.is_scored] == switches).any() for layout in layouts):
            raise ValueError(
                f"the protocol {protocol.name} scores the switch, which this model does not predict: train with "
                "predict_switch, or choose a protocol that leaves it out"
            )
    distinct: dict[tuple[bytes, bytes], list[int]] = {}
    for i, layout in enumerate(layouts):
        distinct.setdefault((layout.ids.tobytes(), layout.is_scored.tobytes()), []).append(i)
    copies = list(distinct.values())
    chosen = [layouts[places[0]] for places in copies]
    scores, is_greedy = np.zeros(len(layouts)), np.zeros(len(layouts), dtype=bool)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.autocast):
            for members, found in _log_likelihoods(model, chosen, settings):
                for member, total, num_best in zip(members, found.sums.tolist(), found.num_best.tolist(), strict=True):
                    count = int(chosen[member].is_scored.sum())
                    scores[copies[member]] = total / count if protocol.length_norm == "mean" else total
                    is_greedy[copies[member]] = num_best == count
                if progress is not None:
                    progress(sum(len(copies[member]) for member in members))
    finally:
        model.train(was_training)
    return scores, is_greedy


@dataclass(frozen=True, eq=False)
class _Found:
    """Of sequences: log-likelihood of the scored tokens, and how many of them are the best, (batch,) float64 each."""

    sums: Tensor
    num_best: Tensor

    @classmethod
    def of(cls, output: SmolTolkOutput) -> "_Found":
        assert output.token_losses is not None
        assert output.token_is_best is not None  # no gradients are taken here
        return cls(-output.token_losses.double().sum(1).cpu(), output.token_is_best.double().sum(1).cpu())


def _log_likelihoods(
    model: SmolTolkForCausalLM, layouts: Sequence[Layout], settings: ScoringSettings
) -> Iterator[tuple[list[int], _Found]]:
    """Batches of sequences: which they are, and what was found."""
    window = getattr(model.config.lm_config, "sliding_window", None)
    by_prompt: dict[bytes, list[int]] = {}
    for i, layout in enumerate(layouts):
        by_prompt.setdefault(layout.ids[: layout.num_shared].tobytes(), []).append(i)
    alone: list[int] = []
    shared: list[list[int]] = []
    for members in by_prompt.values():
        longest = max(len(layouts[i].ids) for i in members)
        fits_window = window is None or longest < window  # a cache of a window forgets what padding would need
        is_worth_it = len(members) > 1 and layouts[members[0]].num_shared >= SHORTEST_SHARED
        if settings.shares_prompts and is_worth_it and fits_window:
            size = settings.batch_size
            shared += [members[at : at + size] for at in range(0, len(members), size)]
        else:
            alone += members
    alone.sort(key=lambda i: len(layouts[i].ids))
    for batch in _batches([[i] for i in alone], layouts, settings):
        members = [i for group in batch for i in group]
        yield members, _score_whole(model, [layouts[i] for i in members])
    shared.sort(key=lambda group: (layouts[group[0]].num_shared, max(len(layouts[i].ids) for i in group)))
    for batch in _batches(shared, layouts, settings):
        yield [i for group in batch for i in group], _score_shared(model, [[layouts[i] for i in g] for g in batch])


def _batches(
    groups: Sequence[list[int]], layouts: Sequence[Layout], settings: ScoringSettings
) -> Iterator[list[list[int]]]:
    """Groups side by side, as many as fit and as padding at most doubles; what is read together comes sorted."""
    batch: list[list[int]] = []
    count = longest = most_read = 0
    for group in groups:
        length = max(len(layouts[i].ids) for i in group)
        read = layouts[group[0]].num_shared if len(group) > 1 else length
        more = count + len(group)
        is_full = more > settings.batch_size or more * max(longest, length) > settings.max_batch_tokens
        if batch and (is_full or read > most_read):
            yield batch
            batch, count, longest, more = [], 0, 0, len(group)
        if not batch:
            most_read = max(32, 2 * read)
        batch.append(group)
        count, longest = more, max(longest, length)
    if batch:
        yield batch


def _score_whole(model: SmolTolkForCausalLM, layouts: Sequence[Layout]) -> _Found:
    """Sequences in one forward, padded on the right."""
    input_ids, mask, labels = _rows([layout.ids for layout in layouts], [layout.is_scored for layout in layouts])
    device = model.device
    output = model(
        input_ids.to(device), None if mask.all() else mask.to(device), labels.to(device), return_token_losses=True
    )
    return _Found.of(output)


def _score_shared(model: SmolTolkForCausalLM, groups: Sequence[Sequence[Layout]]) -> _Found:
    """Groups of sequences with one prompt each: prompts are read first, then what follows on their cache.

    Prompts are padded on the left and the rest on the right, so that the real tokens of a row stay together. The last
    token of a prompt is read twice: it predicts the first token of what follows.
    """
    device = model.device
    prompts = [group[0].ids[: group[0].num_shared] for group in groups]
    marks = [group[0].is_scored[: group[0].num_shared] for group in groups]
    input_ids, mask, labels = _rows(prompts, marks, pads_left=True)
    output = model(
        input_ids.to(device),
        None if mask.all() else mask.to(device),
        labels.to(device),
        use_cache=True,
        return_token_losses=True,
    )
    of_prompts = _Found.of(output)
    cache = output.past_key_values
    for layer in cache.layers:
        if layer.is_initialized:  # those of adapters without layers are not
            layer.crop(-1)
    members = [layout for group in groups for layout in group]
    rows = [i for i, group in enumerate(groups) for _ in group]  # of each sequence's prompt
    found = _Found(torch.zeros(len(members), dtype=torch.double), torch.zeros(len(members), dtype=torch.double))
    for chosen in _of_like_length([len(layout.ids) - layout.num_shared for layout in members]):
        row = torch.tensor([rows[i] for i in chosen])
        rest = [members[i].ids[members[i].num_shared - 1 :] for i in chosen]
        rest_ids, rest_mask, rest_labels = _rows(
            rest, [members[i].is_scored[members[i].num_shared - 1 :] for i in chosen]
        )
        rest_labels[:, 0] = -100  # the prompt's last token is among the prompt's
        whole_mask = torch.cat([mask[row, :-1], rest_mask], 1)
        output = model(
            rest_ids.to(device),
            None if whole_mask.all() else whole_mask.to(device),
            rest_labels.to(device),
            past_key_values=_select(cache, row.to(device)),
            return_token_losses=True,
        )
        rest_found = _Found.of(output)
        found.sums[chosen] = of_prompts.sums[row] + rest_found.sums
        found.num_best[chosen] = of_prompts.num_best[row] + rest_found.num_best
    return found


def _of_like_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in groups that padding at most doubles; what is shorter than 32 is one group."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    group: list[int] = []
    for i in order:
        if group and lengths[i] > max(32, 2 * lengths[group[0]]):
            yield group
            group = []
        group.append(i)
    yield group


def _select(cache: Cache, row: Tensor) -> Cache:
    """A cache of some rows, which may come more than once; the given one stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(row)
    return selected


def _rows(
    sequences: Sequence[np.ndarray], marks: Sequence[np.ndarray], *, pads_left: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and labels at the marked places, all (batch, seq)."""
    length = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (ids, is_scored) in enumerate(zip(sequences, marks, strict=True)):
        place = slice(length - len(ids), length) if pads_left else slice(0, len(ids))
        tokens = torch.from_numpy(ids)
        input_ids[row, place], mask[row, place] = tokens, 1
        labels[row, place] = torch.where(torch.from_numpy(is_scored), tokens, -100)
    return input_ids, mask, labels
