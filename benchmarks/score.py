"""Speed and memory of the scorer: batches and shared prompts against one forward for each sequence.

python -m benchmarks.score --help
"""

import argparse
import resource
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from benchmarks.workload import make_model, option_parser, print_table, seconds, spread, start

from smoltolk import SmolTolkForCausalLM
from smoltolk.evaluation.pairs import PairItem, PairTask, score_task
from smoltolk.evaluation.protocols import CONTINUATION, PROTOCOLS, Candidate, lay_out
from smoltolk.evaluation.scoring import ScoringSettings
from smoltolk.evaluation.tasks import PAIRS
from smoltolk.model.configuration_smoltolk import IdSpace

GOAL = 5
CHOICES = [name for name, protocol in PROTOCOLS.items() if not protocol.scores_switch]
MIB = 2**10  # ru_maxrss counts KiB
# Shortest and longest prompt and ending: StoryCloze's four sentences and one, as text tokens and as units at 25 Hz.
LENGTHS = {"T": ((35, 60), (8, 16)), "S": ((200, 320), (40, 90))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = option_parser("Scores of StoryCloze-like items in all four modality pairs, random weights and ids.")
    parser.set_defaults(dtype=["fp32"], repeats=3)
    parser.add_argument("--protocols", nargs="+", choices=CHOICES, default=[CONTINUATION.name])
    parser.add_argument("--items", type=int, default=16, help="items to time")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[48])
    parser.add_argument("--memory-items", nargs="+", type=int, default=[], help="sizes of sets to measure memory with")
    options = parser.parse_args(arguments)
    start(options)
    model = make_model(options).eval()
    for dtype in options.dtype:
        measure_speed(model, options, dtype)
    if options.memory_items:
        measure_memory(model, options)


def measure_speed(model: SmolTolkForCausalLM, options: argparse.Namespace, dtype: str) -> None:
    """Times all items in both ways in turn; in fp32 the scores must be the same."""
    is_bf16 = dtype == "bf16"
    rows = []
    for name in options.protocols:
        one_by_one: list[np.ndarray] = []

        def plainly(name: str = name, found: list[np.ndarray] = one_by_one) -> None:
            with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=is_bf16):
                found[:] = [score_one_by_one(model, options.items, name)]

        for batch_size in options.batch_sizes:
            for shares in (False, True):
                settings = ScoringSettings(batch_size=batch_size, autocast=is_bf16, shares_prompts=shares)
                score = partial(score_set, model, options.items, name, settings)
                score()  # warms up
                ours, plain = [], []
                for _ in range(options.repeats):
                    ours.append(seconds(score, options))
                    plain.append(seconds(plainly, options))
                if not is_bf16:
                    np.testing.assert_allclose(score(), one_by_one[0], rtol=1e-5, atol=1e-4)
                rows.append(
                    [
                        name,
                        dtype,
                        str(batch_size),
                        "yes" if shares else "no",
                        spread([options.items / s for s in ours]),
                        spread([options.items / s for s in plain]),
                        spread([a / b for a, b in zip(plain, ours, strict=True)]),
                        f"≥ {GOAL}" if shares else "",
                    ]
                )
    print("items/s, each of four pairs with two endings: least – median – greatest; fp32 scores are the same")
    columns = ["protocol", "dtype", "batch", "shared prompts", "ours, items/s", "one by one, items/s", "ratio", "goal"]
    print_table(columns, rows)


def make_items(ids: IdSpace, count: int, seed: int = 0) -> Iterator[PairItem]:
    """Random items, each in all four pairs."""
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        parts = {}
        for side, lengths in LENGTHS.items():
            low, high = (ids.speech_offset, ids.end_of_speech_id) if side == "S" else (1, ids.text_vocab_size)
            parts[side] = [
                generator.integers(low, high, generator.integers(shortest, longest + 1))
                for shortest, longest in (lengths[0], lengths[1], lengths[1])
            ]
        for pair in PAIRS:
            prompt, endings = parts[pair[0]][0], parts[pair[-1]][1:]
            both = [Candidate(prompt, ending) for ending in endings]
            yield PairItem(str(number), both[0], both[1], {"pair": pair})


def score_set(model: SmolTolkForCausalLM, count: int, name: str, settings: ScoringSettings) -> np.ndarray:
    """Scores of the right sequences, (items · pairs,), by the scorer."""
    task = PairTask("benchmark", make_items(model.ids, count), [])
    return score_task(model, task, protocol=PROTOCOLS[name], settings=settings).table["positive_score"].to_numpy()


@torch.no_grad()
def score_one_by_one(model: SmolTolkForCausalLM, count: int, name: str) -> np.ndarray:
    """The same as one would write it first: whole logits of one sequence at a time."""
    protocol, ids = PROTOCOLS[name], model.ids
    scores = []
    for item in make_items(ids, count):
        for candidate in (item.positive, item.negative):
            layout = lay_out(candidate, protocol, ids)
            sequence = torch.from_numpy(layout.ids).to(model.device)
            logits = model(sequence[None]).logits[0].float()  # (seq, vocab_size)
            text = logits[:, : ids.text_vocab_size].log_softmax(-1)
            units = logits[:, ids.speech_offset :].log_softmax(-1)
            both = torch.cat([text, torch.zeros_like(logits[:, :3]), units], -1)
            found = both[:-1].gather(1, sequence[1:, None])[:, 0]
            chosen = found[torch.from_numpy(layout.is_scored[1:]).to(model.device)].double()
            scores.append(float(chosen.mean() if protocol.length_norm == "mean" else chosen.sum()))
    return np.array(scores[0::2])


def measure_memory(model: SmolTolkForCausalLM, options: argparse.Namespace) -> None:
    """Peak memory of sets of growing size, the smallest first; a peak never falls."""
    settings = ScoringSettings(batch_size=options.batch_sizes[0], chunk_items=64)
    rows = []
    for count in sorted(options.memory_items):
        score_set(model, count, options.protocols[0], settings)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows.append([str(count), str(8 * count), f"{peak / MIB:.0f}"])
    print("peak resident memory of the process after each set")
    print_table(["items", "sequences", "MiB"], rows)


if __name__ == "__main__":
    main()
