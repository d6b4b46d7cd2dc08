"""Speed and peak memory of a training step, against the reference implementation and against early fusion.

python -m benchmarks.train_step --help
"""

import argparse
import multiprocessing
import re
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from benchmarks.reference import ReferenceModel
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
from torch import Tensor, nn

from smoltolk import SmolTolkForCausalLM
from smoltolk.training.optim import training_flops

VARIANTS = ("ours", "reference", "early fusion")
SPEED_GOALS = {"fp32": 1.2, "bf16": 1.5}
EARLY_FUSION_GOAL = 0.9
MEMORY_GOALS = {(2, 512): 0.7, (1, 2048): 0.6}
MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("Forward and backward of SmolTolk on rows of half speech.")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(2, 512), (1, 2048)], help="rows x tokens")
    parser.add_argument("--measure", nargs="+", choices=("speed", "memory"), default=["speed", "memory"])
    parser.add_argument("--optimizer", action="store_true", help="time the step of AdamW too")
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="of the GPU, for MFU (H200 in bf16: 790)")
    options = parser.parse_args(arguments)
    start(options)
    if "memory" in options.measure:
        measure_memory(options)
    if "speed" in options.measure:
        measure_speed(options)


def shape(text: str) -> tuple[int, int]:
    """'2x512' → (2, 512)."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 2x512")
    return int(found[1]), int(found[2])


def measure_speed(options: argparse.Namespace) -> None:
    """Times the variants in turn and prints the ratio of each round."""
    models = make_variants(options)
    ours = models["ours"]
    parameters = list({parameter for model in models.values() for parameter in model.parameters()})
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True) if options.optimizer else None
    is_cuda = torch.device(options.device).type == "cuda"
    rows = []
    for batch, seq in options.shapes:
        input_ids, labels = (ids.to(options.device) for ids in interleaved_rows(ours.ids, batch, seq))
        check_equality(ours, models["reference"], input_ids, labels)
        for dtype in options.dtype:
            steps = {name: training_step(models[name], input_ids, labels, options, dtype) for name in VARIANTS}
            taken = time_in_turn(steps, parameters, optimizer, options)
            tokens_per_s = [batch * seq / s for s in taken["ours"]]
            row = [f"{batch}x{seq}", dtype, spread(tokens_per_s, 0)]
            for name, goal in (("reference", SPEED_GOALS[dtype]), ("early fusion", EARLY_FUSION_GOAL)):
                ratios = [other / own for other, own in zip(taken[name], taken["ours"], strict=True)]
                row += [spread(ratios), f"≥ {goal}"]
            if is_cuda:
                flops = step_flops(ours, input_ids, labels) / median(taken["ours"])
                row.append(f"{100 * flops / options.peak_tflops / 1e12:.1f} %")
            rows.append(row)
    print(f"Speed, {'with' if options.optimizer else 'without'} the optimizer: least – median – greatest")
    header = ["shape", "dtype", "ours, tokens/s", "ours / reference", "goal", "ours / early fusion", "goal"]
    print_table([*header, "MFU"] if is_cuda else header, rows)


def measure_memory(options: argparse.Namespace) -> None:
    """Measures each variant in a process of its own and prints the ratios."""
    rows = []
    for batch, seq in options.shapes:
        for dtype in options.dtype:
            peaks = []
            for name in VARIANTS:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    peaks.append(max(1, fresh.submit(peak_memory, name, options, batch, seq, dtype).result()))
            goal = MEMORY_GOALS.get((batch, seq))
            shares = [f"{peaks[0] / peaks[1]:.2f}", f"≤ {goal}" if goal else "–", f"{peaks[0] / peaks[2]:.2f}"]
            rows.append([f"{batch}x{seq}", dtype, *(f"{peak / MIB:.0f}" for peak in peaks), *shares])
    print("Peak memory of a step, gradients included, above that of the built model")
    header = ["shape", "dtype", *(f"{name}, MiB" for name in VARIANTS)]
    print_table([*header, "ours / reference", "goal", "ours / early fusion"], rows)


def make_variants(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The three variants on one and the same backbone; compiled ones keep it to themselves."""
    ours, early = make_model(options), make_model(options, early_fusion=True)
    early.lm = ours.lm
    plain = make_model(options, compiled=False) if options.compile else ours  # the same weights, by its seed
    return {"ours": ours.train(), "reference": ReferenceModel(plain).train(), "early fusion": early.train()}


def training_step(
    model: nn.Module, input_ids: Tensor, labels: Tensor, options: argparse.Namespace, dtype: str
) -> Callable[[], None]:
    """Forward and backward as the trainer runs them."""

    def step() -> None:
        with precision(options, dtype):
            loss = model(input_ids, labels=labels).loss
        loss.backward()

    return step


def time_in_turn(
    steps: dict[str, Callable[[], None]],
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    options: argparse.Namespace,
) -> dict[str, list[float]]:
    """Seconds of each variant, one after the other in every round so that a round's ratios share their conditions.

    The first round warms up and is not counted; the order turns around from round to round.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.repeats + 1):
        for name in sorted(steps, reverse=repeat % 2 == 1):
            for parameter in parameters:
                parameter.grad = None

            def whole(step: Callable[[], None] = steps[name]) -> None:
                step()
                if optimizer is not None:
                    optimizer.step()

            duration = seconds(whole, options)
            if repeat:
                taken[name].append(duration)
    return taken


@torch.no_grad()
def check_equality(ours: SmolTolkForCausalLM, reference: nn.Module, input_ids: Tensor, labels: Tensor) -> None:
    """Asserts that both implementations give the same losses in float32."""
    own, other = ours(input_ids, labels=labels), reference(input_ids, labels=labels)
    for name in ("text_loss", "speech_loss"):
        torch.testing.assert_close(getattr(own, name), getattr(other, name), rtol=0, atol=1e-4)
    print(
        f"{'x'.join(map(str, input_ids.shape))}: losses equal the reference's in fp32 within 1e-4 "
        f"(text {own.text_loss:.4f}, speech {own.speech_loss:.4f})\n"
    )


def peak_memory(name: str, options: argparse.Namespace, batch: int, seq: int, dtype: str) -> int:
    """Bytes by which the first step of a variant raises the peak above the built model's memory.

    On a CPU this is the resident memory of the process, so it is to be called in a fresh one; a step of a tiny
    model comes first, so that what PyTorch loads on the way is not counted.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    for size in ("tiny", options.size):
        sized = argparse.Namespace(**vars(options) | {"size": size})
        model = make_model(sized, early_fusion=name == "early fusion", compiled=name != "reference").train()
        input_ids, labels = (ids.to(options.device) for ids in interleaved_rows(model.ids, batch, seq))
        step = training_step(ReferenceModel(model) if name == "reference" else model, input_ids, labels, options, dtype)
        before = reset_peak(options.device)
        step()
    return read_peak(options.device) - before


def reset_peak(device: str) -> int:
    """Bytes in use now, from which on the peak is watched."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError):  # without it the peak goes on from the start of the process
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is resident
    return read_peak(device)


def read_peak(device: str) -> int:
    """Most bytes in use since the peak was reset."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def step_flops(model: SmolTolkForCausalLM, input_ids: Tensor, labels: Tensor) -> int:
    """Floating-point operations of a step of our model."""
    target, ids = labels[:, 1:], model.ids
    return training_flops(
        model.config,
        num_tokens=input_ids.numel(),
        num_speech_tokens=int((input_ids >= ids.speech_offset).sum()),
        num_text_labels=int(((target >= 0) & (target < ids.text_vocab_size)).sum()),
        num_speech_labels=int((target >= ids.speech_offset).sum()),
        row_tokens=input_ids.shape[1],
        is_backbone_trained=True,
    )


if __name__ == "__main__":
    main()
