"""Cross-modal distillation: a frozen copy of the text LM reads what is said, and teaches where words end.

Speech and text are aligned by words, so the written form of a row (`Transcript`) tells what the text LM would hold in
mind at the end of each spoken word. Four terms, each a mean over its places, are added to the loss:

- `hidden_states`: 1 − cosine between the student's and the teacher's hidden state, mean over all layers, at word ends;
- `next_token`: KL(teacher ‖ student) of the next text token, at word ends;
- `switch`: the same at switches to speech;
- `word`: cross-entropy of the word being said, at its units but the last (supervised, no distillation).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from smoltolk.data.dataset import Batch, Transcripts
from smoltolk.model.configuration_smoltolk import IdSpace, SmolTolkConfig
from smoltolk.model.losses import LOGITS_PER_CHUNK
from smoltolk.model.modeling_smoltolk import check_backbone
from smoltolk.training.config import DistillationSettings
from smoltolk.training.distributed import Ranks, shard_layers
from smoltolk.training.optim import distillation_flops

TextHead = Callable[[Tensor], Tensor]
Indices = tuple[Tensor, Tensor]  # rows and places in them, both (places,)


@dataclass(frozen=True, eq=False)
class Places:
    """Where the terms apply in a batch of rows.

    Args:
        ends: units that end a spoken word, (rows, row_tokens).
        switches: switches to speech, (rows, row_tokens).
        inner: units of a word but its last, (rows, row_tokens).
    """

    ends: Tensor
    switches: Tensor
    inner: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, transcripts: Transcripts, ids: IdSpace) -> "Places":
        """The places of some rows."""
        is_said, is_speech = transcripts.places >= 0, input_ids >= ids.speech_offset
        return cls(is_said & is_speech, is_said & ~is_speech, transcripts.word_ids >= 0)

    def counts(self) -> dict[str, int]:
        """Number of places of each term."""
        ends, switches, inner = (int(places.sum()) for places in (self.ends, self.switches, self.inner))
        return {"hidden_states": ends, "next_token": ends, "switch": switches, "word": inner}


class Teacher:
    """A frozen copy of the text LM.

    Args:
        backbone: the text LM, a folder or a hub name.
        dtype: what its weights are kept and computed in.
        ranks: the processes that share it.

    Raises:
        ValueError: the LM is of no family that SmolTolk takes.
    """

    def __init__(self, backbone: str, dtype: torch.dtype, ranks: Ranks) -> None:
        lm = AutoModelForCausalLM.from_pretrained(backbone, dtype=dtype).eval().requires_grad_(False)
        check_backbone(lm.config)
        self.device = ranks.device
        self.lm = lm.to(ranks.device)
        # The rest stays whole on every rank: the head is used after the forward pass.
        shard_layers(lm.base_model.layers, ranks)

    @torch.no_grad()
    def teach(
        self,
        input_ids: Tensor,
        transcripts: Transcripts,
        ids: IdSpace,
        settings: DistillationSettings,
        counts: Mapping[str, float],
    ) -> "Lesson":
        """Reads rows in writing.

        Args:
            input_ids: the student's rows, (rows, row_tokens).
            transcripts: the same in writing.
            ids: the student's id space.
            settings: weights of the terms.
            counts: number of places that each term is a mean over.
        """
        places = Places.of(input_ids, transcripts, ids)
        # Sharded ranks gather weights together: one without words reads a row for nothing.
        rows = (transcripts.lengths > 0).nonzero()[:, 0]
        rows = rows if len(rows) else torch.zeros(1, dtype=torch.long)
        read = transcripts.text_ids[rows, : max(1, int(transcripts.lengths[rows].max()))]
        output = self.lm.base_model(read.to(self.device), output_hidden_states=True, use_cache=False)
        levels = [*output.hidden_states[1:-1], output.last_hidden_state]  # each (rows, text tokens, dim)

        def said(chosen: Tensor) -> Indices:
            row, _ = chosen[rows].nonzero(as_tuple=True)
            return row.to(self.device), transcripts.places[rows][chosen[rows]].to(self.device)

        ends, switches = said(places.ends), said(places.switches)
        return Lesson(
            settings=settings,
            counts=counts,
            ends=self._indices(places.ends),
            switches=self._indices(places.switches),
            inner=self._indices(places.inner),
            word_ids=transcripts.word_ids[places.inner].to(self.device),
            levels_at_ends=[level[ends] for level in levels] if settings.hidden_states else [],
            last_at_ends=levels[-1][ends],
            last_at_switches=levels[-1][switches],
            text_head=self._text_head,
            vocab_size=ids.text_vocab_size,
        )

    def _indices(self, chosen: Tensor) -> Indices:
        """Where something is, found on the CPU: to look for it in a mask would stall an accelerator, level by level."""
        row, place = chosen.nonzero(as_tuple=True)
        return row.to(self.device), place.to(self.device)

    def _text_head(self, last: Tensor) -> Tensor:
        """Logits as the LM makes them of its last hidden states."""
        config = self.lm.config
        logits = self.lm.get_output_embeddings()(last) / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)


@dataclass(eq=False)
class Lesson:
    """What the teacher says about some rows: a loss for the student's forward pass to add.

    Args:
        settings: weights of the terms.
        counts: number of places that each term is a mean over; those of a whole step.
        ends: word ends.
        switches: switches to speech.
        inner: units of a word but its last.
        word_ids: the word at each of these, (inner places,).
        levels_at_ends: the teacher's levels h¹ … h^L at word ends, each (ends, dim).
        last_at_ends: its last level there, (ends, dim).
        last_at_switches: the same at switches, (switches, dim).
        text_head: the teacher's.
        vocab_size: of both text heads.
        terms: each term's share in the mean over its places, after the student's forward pass, ().
    """

    settings: DistillationSettings
    counts: Mapping[str, float]
    ends: Indices
    switches: Indices
    inner: Indices
    word_ids: Tensor
    levels_at_ends: list[Tensor]
    last_at_ends: Tensor
    last_at_switches: Tensor
    text_head: TextHead
    vocab_size: int
    terms: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, levels: Sequence[Tensor], text_head: TextHead) -> Tensor:
        """The weighted terms of the student's levels h¹ … h^L (rows, row_tokens, dim), under its text head; ()."""
        last = levels[-1]
        sums: dict[str, Tensor] = {}
        if self.settings.hidden_states:
            pairs = zip(levels, self.levels_at_ends, strict=True)
            cosines = [F.cosine_similarity(ours[self.ends].float(), theirs.float(), dim=-1) for ours, theirs in pairs]
            sums["hidden_states"] = sum((1 - cosine).sum() for cosine in cosines) / len(cosines)  # type: ignore[assignment]
        if self.settings.next_token:
            sums["next_token"] = self._divergence(last[self.ends], self.last_at_ends, text_head)
        if self.settings.switch:
            sums["switch"] = self._divergence(last[self.switches], self.last_at_switches, text_head)
        if self.settings.word:
            sums["word"] = in_chunks(
                lambda hidden, words: F.cross_entropy(text_head(hidden).float(), words, reduction="sum"),
                last[self.inner],
                self.word_ids,
                self.vocab_size,
            )
        means = {name: total / max(1.0, self.counts[name]) for name, total in sums.items()}
        self.terms = {name: mean.detach() for name, mean in means.items()}
        return torch.stack([getattr(self.settings, name) * mean for name, mean in means.items()]).sum()

    def _divergence(self, ours: Tensor, theirs: Tensor, text_head: TextHead) -> Tensor:
        def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                taught = self.text_head(theirs).float().log_softmax(-1)
            return F.kl_div(text_head(ours).float().log_softmax(-1), taught, reduction="sum", log_target=True)

        return in_chunks(divergence, ours, theirs, self.vocab_size)


class StepLessons:
    """What is taught in one step of a run, micro-batch by micro-batch.

    Args:
        teacher: the text LM.
        settings: weights of the terms.
        batch: this rank's rows of the step, with their transcripts.
        ids: the student's id space.
        ranks: the ranks that share the step.
    """

    def __init__(
        self, teacher: Teacher, settings: DistillationSettings, batch: Batch, ids: IdSpace, ranks: Ranks
    ) -> None:
        self.teacher, self.settings, self.ids, self.ranks = teacher, settings, ids, ranks
        transcripts = _transcripts(batch)
        counts = Places.of(batch.input_ids, transcripts, ids).counts()
        lengths = transcripts.lengths
        *sums, self.num_read, self.num_read_squared = ranks.sum(
            *counts.values(), int(lengths.sum()), int(lengths.square().sum())
        )
        self.counts = dict(zip(counts, sums, strict=True))
        self._given: list[Lesson] = []

    def lesson(self, part: Batch) -> Lesson:
        """The loss to add for a micro-batch of the step."""
        lesson = self.teacher.teach(part.input_ids, _transcripts(part), self.ids, self.settings, self.counts)
        self._given.append(lesson)
        return lesson

    def terms(self) -> dict[str, float]:
        """Mean of each term over its places in the step, after all forward passes."""
        names = [name for name, weight in self.settings.weights.items() if weight]
        sums = self.ranks.sum(*(sum(lesson.terms[name].item() for lesson in self._given) for name in names))
        return dict(zip(names, sums, strict=True))

    def flops(self, config: SmolTolkConfig, *, is_backbone_trained: bool) -> int:
        """Training FLOPs of the step's lessons, see `distillation_flops`."""
        return distillation_flops(
            config,
            weights=self.settings.weights,
            counts=self.counts,
            num_read=int(self.num_read),
            num_read_squared=int(self.num_read_squared),
            is_backbone_trained=is_backbone_trained,
        )


def _transcripts(batch: Batch) -> Transcripts:
    assert batch.transcripts is not None  # the trainer asks for them where a stage distils
    return batch.transcripts


def in_chunks(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, target: Tensor, vocab_size: int) -> Tensor:
    """Sum of a loss over places (places, …); where there are many, their logits are made in chunks, and twice."""
    places_per_chunk = max(1, LOGITS_PER_CHUNK // vocab_size)
    if len(hidden) <= places_per_chunk:
        return loss(hidden, target)
    chunks = zip(hidden.split(places_per_chunk), target.split(places_per_chunk), strict=True)
    sums = [checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(sums).sum()
