"""What the benchmarks share: sizes, models, rows of ids, options, clocks and tables."""

import argparse
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig

from smoltolk import SmolTolkConfig, SmolTolkForCausalLM
from smoltolk.model.configuration_smoltolk import IdSpace

# name → width, feed-forward width, layers, heads, key and value heads, text vocabulary
SIZES = {
    "tiny": (32, 48, 3, 4, 2, 300),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "1.7b": (2048, 8192, 24, 32, 32, 49152),
}
EARLY_FUSION = {
    "num_input_adapter_layers": 0,
    "num_output_adapter_layers": 0,
    "layer_mixing": "last",
    "speech_residual": False,
}
SPAN_TOKENS = (30, 100)  # shortest and longest run of one modality


def option_parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=SIZES, default="135m", help="sizes of the SmolLM backbone, random weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice if not given")
    parser.add_argument("--attention", choices=("eager", "sdpa", "flash_attention_2", "flex_attention"), default="sdpa")
    parser.add_argument("--compile", action="store_true", help="compile our decoder layers, not the reference's")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the seconds of CPU, not of the clock: steadier where other work shares the cores",
    )
    return parser


def start(options: argparse.Namespace) -> None:
    """Sets the number of threads and prints what the figures were measured with."""
    if options.threads:
        torch.set_num_threads(options.threads)
    is_cuda = torch.device(options.device).type == "cuda"
    device = torch.cuda.get_device_name(options.device) if is_cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    clock = "CPU" if options.cpu_time else "wall"
    compiled = "compiled" if options.compile else "not compiled"
    print(
        f"size {options.size}, {device}, attention {options.attention}, {compiled}, {clock} time; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )


def make_model(
    options: argparse.Namespace, *, early_fusion: bool = False, compiled: bool = True
) -> SmolTolkForCausalLM:
    """A model of SmolLM's sizes with random weights and 500 units, compiled if the options ask for it."""
    dim, intermediate, layers, heads, kv_heads, vocab = SIZES[options.size]
    lm_config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        model = SmolTolkForCausalLM(SmolTolkConfig(lm_config=lm_config, **(EARLY_FUSION if early_fusion else {})))
    model.set_attn_implementation(options.attention)
    if options.compile and compiled:
        model.compile_layers()
    return model


def interleaved_rows(ids: IdSpace, batch: int, seq: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random rows that alternate runs of text and of speech, half of each, with a switch between.

    Returns:
        Ids and labels, both (batch, seq); switches are not predicted.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    rows = []
    for first in range(batch):
        parts: list[Tensor] = []
        is_speech = first % 2 == 0
        while sum(map(len, parts)) < seq:
            count = int(draw(SPAN_TOKENS[0], SPAN_TOKENS[1] + 1, 1))
            low, high = (ids.speech_offset, ids.end_of_speech_id) if is_speech else (1, ids.text_vocab_size)
            parts += [draw(low, high, count), torch.tensor([ids.switch_id])]
            is_speech = not is_speech
        rows.append(torch.cat(parts)[:seq])
    input_ids = torch.stack(rows)
    return input_ids, input_ids.masked_fill(input_ids == ids.switch_id, -100)


def precision(options: argparse.Namespace, dtype: str) -> AbstractContextManager[Any]:
    """What the trainer computes in: float32, or bfloat16 with float32 weights."""
    is_bf16 = dtype == "bf16"
    return torch.autocast(torch.device(options.device).type, torch.bfloat16) if is_bf16 else nullcontext()


def seconds(action: Callable[[], Any], options: argparse.Namespace) -> float:
    """Time that an action takes, the device's work included."""
    clock = time.process_time if options.cpu_time else time.perf_counter

    def now() -> float:
        if torch.device(options.device).type == "cuda":
            torch.cuda.synchronize(options.device)
        return clock()

    started = now()
    action()
    return now() - started


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Least, median and greatest of some values."""
    return " – ".join(f"{value:.{digits}f}" for value in (min(values), median(values), max(values)))


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table, columns of like width."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    padded.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(padded), flush=True)
    print()
