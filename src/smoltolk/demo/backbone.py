"""The miniature's text backbone: a tiny Llama trained on stories from scratch."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from smoltolk.data.dataset import BatchSource, TaskMixture
from smoltolk.data.store import Store
from smoltolk.model.configuration_smoltolk import IdSpace


@dataclass(frozen=True)
class BackboneSettings:
    """Size and training of the tiny text LM.

    Args:
        hidden_size: width.
        num_layers: layers.
        num_heads: attention heads.
        steps: optimizer steps.
        rows_per_step: rows in a step.
        row_tokens: length of a row.
        learning_rate: peak rate; it falls to 0 over the last 30 %.
        device: where to train, in bfloat16.
    """

    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    steps: int = 1200
    rows_per_step: int = 16
    row_tokens: int = 64
    learning_rate: float = 1.5e-3
    device: str = "cpu"

    @property
    def head_size(self) -> int:
        """Width of an attention head."""
        return self.hidden_size // self.num_heads

    def resized(self, hidden_size: int, num_layers: int) -> "BackboneSettings":
        """One of another size: heads are as wide, and the rate is in inverse proportion to the width.

        The rate's rule is that of Adam for matrices in µP (Yang et al. 2022, arXiv 2203.03466).

        Raises:
            ValueError: there are no layers, or the width is not that of some heads.
        """
        if hidden_size < 1 or hidden_size % self.head_size:
            raise ValueError(f"width is {hidden_size}: give a multiple of a head's {self.head_size}")
        if num_layers < 1:
            raise ValueError(f"layers is {num_layers}: give 1 or more")
        return replace(
            self,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=hidden_size // self.head_size,
            learning_rate=self.learning_rate * self.hidden_size / hidden_size,
        )


MAX_POSITIONS = 1024
MAX_STRETCH = 5.0


def pretrain_backbone(
    text_store: Path,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    settings: BackboneSettings,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains the text LM and saves it with its tokenizer; returns the loss of every step.

    Speech says the same in several times as many tokens, so positions are stretched in every other row, by a
    random factor of up to 5: distances of speech length are then nothing new to the backbone. Weights start at a
    standard deviation of dim^−0.5, those that write to the residual stream divided by √(2 · layers); for so
    small a model the usual 0.02 takes more than twice the tokens.
    """
    torch.manual_seed(seed)
    dim = settings.hidden_size
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=3 * dim,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=dim**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).train().to(settings.device)
    device = model.device
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # at this size, faster than the fused kernels
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight /= (2 * settings.num_layers) ** 0.5
    source = BatchSource(
        {"text": [(Store(text_store), 1.0)]},
        mixture=TaskMixture(interleaved=0, speech=0, text=1),
        ids=IdSpace(config.vocab_size, num_units=1, end_of_text_id=tokenizer.eos_token_id),
        row_tokens=settings.row_tokens,
    )
    matrices = [p for p in model.model.layers.parameters() if p.ndim >= 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator()
    generator.manual_seed(seed)
    warmup, decay = max(1, settings.steps // 20), max(1, 3 * settings.steps // 10)
    losses = []
    for step in range(settings.steps):
        batch = source.batch(seed, step, rows=settings.rows_per_step)
        share = min(1.0, (step + 1) / warmup, (settings.steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = share * settings.learning_rate
        positions = stretched_positions(settings.rows_per_step, settings.row_tokens, generator)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(
                batch.input_ids.to(device), labels=batch.labels.to(device), position_ids=positions.to(device)
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if progress is not None:
            progress(1)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return losses


def stretched_positions(rows: int, row_tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Rising positions (rows, row_tokens): plain in half of the rows, stretched by 1 … `MAX_STRETCH` in others."""
    stretch = 1 + (MAX_STRETCH - 1) * torch.rand(rows, 1, generator=generator)
    is_plain = torch.rand(rows, 1, generator=generator) < 0.5
    return (torch.arange(row_tokens) * torch.where(is_plain, 1.0, stretch)).round().long()
