"""Where the time of a training step goes: shares of the model's parts, forward and backward.

python -m benchmarks.profile_step --help
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from benchmarks.train_step import shape, training_step
from benchmarks.workload import interleaved_rows, make_model, option_parser, print_table, start
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from smoltolk import SmolTolkForCausalLM

PREFIX = "part: "
TEXT_HEAD, REST, ACCUMULATION, OPTIMIZER = (
    "text head, cross-entropy",
    "unit head, embeddings, rest",
    "gradient accumulation",
    "optimizer",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("Profile of one training step of SmolTolk on a CPU, optimizer included.")
    parser.add_argument("--shape", type=shape, default=(2, 512), help="rows x tokens")
    options = parser.parse_args(arguments)
    start(options)
    model = make_model(options).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    input_ids, labels = interleaved_rows(model.ids, *options.shape)
    for dtype in options.dtype:
        step = training_step(model, input_ids, labels, options, dtype)
        step()  # warms up
        optimizer.step()
        optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler, named_parts(model):
            step()
            with record_function(PREFIX + OPTIMIZER):
                optimizer.step()
        optimizer.zero_grad()
        forward, backward = time_by_part(profiler.events(), model.ids.text_vocab_size)
        both = forward + backward
        total = both.total()
        rows = [
            [part, *(f"{100 * times[part] / total:.1f}" for times in (forward, backward, both))]
            for part, _ in both.most_common()
        ]
        print(f"{dtype}, {'x'.join(map(str, options.shape))}: {total / 1e6:.1f} s, of which")
        print_table(["part", "forward, %", "backward, %", "sum, %"], rows)
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40)
        print("\n".join(line[:100] for line in table.splitlines()))


@contextmanager
def named_parts(model: SmolTolkForCausalLM) -> Iterator[None]:
    """Names what the profiler sees by the model's parts."""
    parts: dict[str, nn.Module] = {
        "input adapter": model.input_adapter,
        "backbone": model.body,
        "layer mix": model.layer_selector,
        "output adapter": model.output_adapter,
    }
    with ExitStack() as hooks:
        for name, module in parts.items():
            ranges: list[record_function] = []

            def enter(_: nn.Module, __: object, ranges: list = ranges, name: str = name) -> None:
                ranges.append(record_function(PREFIX + name))
                ranges[-1].__enter__()

            def leave(_: nn.Module, __: object, ___: object, ranges: list = ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


def time_by_part(events: Sequence[FunctionEvent], text_vocab_size: int) -> tuple[Counter[str], Counter[str]]:
    """Microseconds of each part, forward and backward.

    A backward node belongs to the operator that made it: the last one to see its sequence number as the next. What
    no module owns is the text head's if an operand is as wide as the text vocabulary.
    """
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    owner: dict[int, str] = {}
    tops = [event for event in events if event.cpu_parent is None or event.cpu_parent.name.startswith(PREFIX)]
    nodes = []
    for event in sorted(tops, key=lambda event: event.time_range.start):
        if event.name.startswith("autograd::engine"):
            nodes.append(event)
        elif not event.name.startswith(PREFIX):
            part = part_of(event, text_vocab_size)
            forward[part] += event.cpu_time_total
            for inner in (event, *descendants(event)):
                if inner.sequence_nr >= 0:
                    owner[inner.sequence_nr] = part
    for node in nodes:
        is_leaf = "AccumulateGrad" in node.name
        backward[ACCUMULATION if is_leaf else owner.get(node.sequence_nr, REST)] += node.cpu_time_total
    return forward, backward


def part_of(event: FunctionEvent, text_vocab_size: int) -> str:
    """The part that an operator of the forward belongs to."""
    if event.cpu_parent is not None:
        return event.cpu_parent.name.removeprefix(PREFIX)
    shapes = [dims for e in (event, *descendants(event)) for dims in e.input_shapes or [] if isinstance(dims, list)]
    is_head = any(text_vocab_size in dims for dims in shapes) and "embedding" not in event.name
    return TEXT_HEAD if is_head else REST


def descendants(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """All operators that an operator calls."""
    for child in event.cpu_children:
        yield child
        yield from descendants(child)


if __name__ == "__main__":
    main()
