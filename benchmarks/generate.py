"""Speed of generation: with a cache against without one, and the cost of a token at growing context.

python -m benchmarks.generate --help
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from benchmarks.workload import (
    interleaved_rows,
    make_model,
    option_parser,
    precision,
    print_table,
    seconds,
    spread,
    start,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from smoltolk import SmolTolkForCausalLM
from smoltolk.generation.sampling import continue_ids

CACHE_GOAL = 30
GROWTH_GOAL = 1.3
ATTENTION_OPS = ("aten::scaled_dot_product_attention", "aten::cat")  # attending, and lengthening the cache
PROFILED_TOKENS = 4
TOKEN = "one token"  # noqa: S105


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("Greedy generation with SmolTolk.")
    parser.set_defaults(dtype=["fp32"], repeats=3)
    parser.add_argument("--batches", nargs="+", type=int, default=[1], help="rows generated at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 512, 1024, 2048])
    parser.add_argument("--timed-tokens", type=int, default=16, help="tokens to time at each context")
    parser.add_argument("--skip-uncached", action="store_true", help="leave out the loop without a cache")
    options = parser.parse_args(arguments)
    start(options)
    model = make_model(options).eval()
    for dtype in options.dtype:
        with precision(options, dtype):
            if not options.skip_uncached:
                measure_cache(model, options, dtype)
            measure_context(model, options, dtype)


def measure_cache(model: SmolTolkForCausalLM, options: argparse.Namespace, dtype: str) -> None:
    """Times the same continuation with and without a cache; the tokens must be the same in fp32."""
    rows = []
    for batch in options.batches:
        prompts = interleaved_rows(model.ids, batch, options.prompt_tokens)[0].to(options.device)
        uncached_rows: list[list[int]] = []
        cached_rows: list[list[int]] = []

        def cached(prompts: Tensor = prompts, found: list[list[int]] = cached_rows) -> None:
            found[:] = continue_ids(
                model,
                prompts,
                max_new_tokens=options.new_tokens,
                min_new_tokens=options.new_tokens,
                temperature=0,
            )

        cached()  # warms up
        with_cache = [seconds(cached, options) for _ in range(options.repeats)]
        uncached = partial(continue_without_cache, model, prompts, options.new_tokens, uncached_rows)
        without_cache = seconds(uncached, options)  # once: it takes long
        if dtype == "fp32":
            assert cached_rows == uncached_rows, "the tokens with and without a cache differ"
            print(f"batch {batch}: the same {options.new_tokens} tokens with and without a cache\n")
        tokens = batch * options.new_tokens
        rows.append(
            [
                str(batch),
                dtype,
                spread([tokens / s for s in with_cache], 1),
                f"{tokens / without_cache:.2f}",
                spread([without_cache / s for s in with_cache], 1),
                f"≥ {CACHE_GOAL}",
            ]
        )
    print(f"{options.new_tokens} tokens after {options.prompt_tokens}, prompt included: least – median – greatest")
    print_table(["batch", "dtype", "cached, tokens/s", "uncached, tokens/s", "ratio", "goal at batch 1"], rows)


@torch.no_grad()
def continue_without_cache(
    model: SmolTolkForCausalLM, prompts: Tensor, new_tokens: int, found: list[list[int]]
) -> None:
    """The loop one would write first: the whole forward for every token, best id of the modality (batch, seq)."""
    ids, seen = model.ids, prompts
    for _ in range(new_tokens):
        scores = model(seen).logits[:, -1]  # (batch, vocab_size)
        last, before = seen[:, -1], seen[:, -2]
        told_by = torch.where(last == ids.switch_id, before, last)
        is_speech = (told_by >= ids.speech_offset) != (last == ids.switch_id)
        column = torch.arange(scores.shape[1], device=scores.device)
        is_unit = (column >= ids.speech_offset) & (column < ids.end_of_speech_id)
        is_word = (column < ids.text_vocab_size) & (column != ids.end_of_text_id)
        allowed = torch.where(is_speech[:, None], is_unit, is_word)
        seen = torch.cat([seen, scores.masked_fill(~allowed, float("-inf")).argmax(-1, keepdim=True)], dim=1)
    found[:] = seen[:, prompts.shape[1] :].tolist()


@torch.no_grad()
def measure_context(model: SmolTolkForCausalLM, options: argparse.Namespace, dtype: str) -> None:
    """Times decoding after prompts of growing length; attention's share comes from PyTorch's profiler."""
    for batch in options.batches:
        rows, first_rest = [], None
        for context in options.contexts:
            prompts = interleaved_rows(model.ids, batch, context)[0].to(options.device)
            decoder = Decoder(model, prompts)
            decoder.step()  # warms up
            taken = [1e3 * seconds(decoder.step, options) for _ in range(options.timed_tokens)]
            share = attention_share(decoder.step, options)
            rest = sorted(taken)[len(taken) // 2] * (1 - share)
            first_rest = first_rest or rest
            rows.append([str(batch), dtype, str(context), spread(taken, 1), f"{100 * share:.0f} %", f"{rest:.1f}"])
            rows[-1] += [f"{rest / first_rest:.2f}", f"≤ {GROWTH_GOAL}"]
        print("One token after a context, ms: least – median – greatest")
        header = ["batch", "dtype", "context", "ms", "attention and cache", "rest, ms", "rest / first", "goal"]
        print_table(header, rows)


class Decoder:
    """Decodes one token after another, as `generate` does.

    Args:
        model: the model.
        prompts: (batch, seq), run through the model at once.
    """

    def __init__(self, model: SmolTolkForCausalLM, prompts: Tensor) -> None:
        self.model = model
        self.seen = torch.ones_like(prompts)
        self.next = prompts[:, -1:]
        self.cache = model(prompts, attention_mask=self.seen, use_cache=True, logits_to_keep=1).past_key_values

    def step(self) -> None:
        """One more token; the id is that of the prompt's end again, which costs the same."""
        self.seen = torch.cat([self.seen, self.seen[:, :1]], dim=1)
        self.model(
            self.next, attention_mask=self.seen, past_key_values=self.cache, use_cache=True, logits_to_keep=1
        ).logits.argmax(-1)


def attention_share(step: Callable[[], None], options: argparse.Namespace) -> float:
    """Share of the time of some tokens that goes into attention and into lengthening the cache."""
    is_cuda = torch.device(options.device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_TOKENS):
            with record_function(TOKEN):
                seconds(step, options)  # waits for the device
    events = {event.key: event for event in profiler.key_averages()}
    found = [events[op] for op in ATTENTION_OPS if op in events]
    spent = sum(event.device_time_total if is_cuda else event.cpu_time_total for event in found)
    return spent / events[TOKEN].cpu_time_total


if __name__ == "__main__":
    main()
