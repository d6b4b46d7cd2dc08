"""How fast rows are drawn, by task, length of a row and size of the store: one core, no model.

A store of many utterances is simulated: its shards are hard links to one file (or copies of it, `--copy`). Opening,
index and page tables are those of the real thing; with links the bytes are not, they fit the file cache.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from benchmarks.workload import print_table, spread

from smoltolk.data.dataset import TASKS, BatchSource, TaskMixture
from smoltolk.data.policies import CoinPolicy, PoissonPolicy, Policy, SentencePolicy, SpanPolicy
from smoltolk.data.store import ROWS_PER_SHARD, Store, write_manifest, write_store
from smoltolk.data.utterance import Utterance
from smoltolk.model.configuration_smoltolk import IdSpace

IDS = IdSpace(text_vocab_size=49152, num_units=500, end_of_text_id=0)
CARD = {"fingerprint": "benchmark", "unit_rate_hz": 25.0, "num_units": 500}
POLICIES: dict[str, Policy] = {
    "alternate": SpanPolicy(),
    "poisson": PoissonPolicy(),
    "coin": CoinPolicy(),
    "sentence": SentencePolicy(),
}
GOAL = 20  # times what the model eats
FLOPS_PER_TOKEN = 6 * 135e6
MODEL_TOKENS_PER_S = 0.4 * 790e12 / FLOPS_PER_TOKEN  # 40 % of what one H100 or H200 does in dense bfloat16


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--utterances", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048], help="tokens of a row")
    parser.add_argument("--rows", type=int, default=500, help="rows of a timed batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--copy", action="store_true", help="copy the shard instead of linking it: needs the disk space"
    )
    parser.add_argument("--folder", type=Path, help="where the stores are made for the time of the run")
    options = parser.parse_args(arguments)
    print(
        f"One core, CPU time, {options.rows} rows a batch, {options.repeats} batches: least – median – greatest. "
        f"Python {platform.python_version()}, NumPy {np.__version__}, PyArrow {pyarrow.__version__}\n"
    )
    found = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        shard = write_store(
            Path(folder) / "base",
            (random_utterance(number) for number in range(ROWS_PER_SHARD)),
            text_tokenizer_fingerprint="benchmark",
            speech_tokenizer=CARD,
        )
        size = sum(entry.bytes for entry in shard.shards) / len(shard)
        print(f"An utterance has {size:.0f} bytes in its shard.\n")
        for count in options.utterances:
            path = Path(folder) / f"of-{count}"
            simulate_store(shard, path, count, copy=options.copy)
            # A process of its own: what it gets in memory is this store's.
            with multiprocessing.get_context("fork").Pool(1) as pool:
                found[count] = pool.apply(measure, (path, options.lengths, options.rows, options.repeats))
            shutil.rmtree(path)
            print(json.dumps({"utterances": count, **found[count]}), flush=True)
    print()
    print_tables(found, options.lengths)


def random_utterance(number: int) -> Utterance:
    """About 13 s of speech at 2.8 words and 12.5 units a second, sentences of about nine words."""
    rng = np.random.default_rng(number)
    num_words = int(rng.integers(15, 56))
    num_units = int(num_words * 12.5 / 2.8)
    durations = rng.integers(1, 4, num_units)
    seconds = float(durations.sum()) / CARD["unit_rate_hz"]
    counts = 1 + (rng.random(num_words) < 0.3)
    words = ["word." if is_end else "word" for is_end in rng.random(num_words) < 1 / 9]
    return Utterance(
        id=f"utterance-{number}",
        text=" ".join(words),
        text_ids=rng.integers(1, IDS.text_vocab_size, counts.sum()),
        units=rng.integers(0, IDS.num_units, num_units),
        unit_durations=durations,
        word_ends_s=np.sort(rng.uniform(0, seconds, num_words)),
        word_token_counts=counts,
        seconds=seconds,
        split="train",
    )


def simulate_store(base: Store, path: Path, count: int, *, copy: bool) -> None:
    """A store of (nearly) so many utterances that has the same shard many times."""
    path.mkdir()
    if count < len(base):
        shutil.rmtree(path)
        rows = (base[row] for row in range(count))
        write_store(path, rows, text_tokenizer_fingerprint="benchmark", speech_tokenizer=CARD)
        return
    shards = []
    for number in range(round(count / len(base))):
        shards.append(replace(base.shards[0], file=f"shard-{number:05d}.parquet"))
        (shutil.copyfile if copy else os.link)(base.path / base.shards[0].file, path / shards[-1].file)
    write_manifest(path, shards)


def measure(path: Path, lengths: list[int], rows: int, repeats: int) -> dict[str, Any]:
    """Opens a store and draws from it, in a process that has done nothing else."""
    gc.freeze()  # as the loader's processes do
    memory, started = own_memory_mib(), time.perf_counter()
    store = Store(path)
    opened = time.perf_counter() - started
    sources = {name: source_of(store, name, lengths[-1]) for name in ("interleaved", "speech")}
    indexed = time.perf_counter() - started - opened
    result: dict[str, Any] = {
        "open_s": opened,
        "index_s": indexed,
        "memory_mib": own_memory_mib() - memory,
    }
    started = time.perf_counter()
    sources["interleaved"].batch(0, 0, rows=rows)
    result["first_batch_s"] = time.perf_counter() - started
    result["tokens_per_s"] = {
        f"{name} {length}": tokens_per_s(source_of(store, name, length), length, rows, repeats)
        for length in lengths
        for name in (*POLICIES, *TASKS[1:])
    }
    return result


def source_of(store: Store, name: str, row_tokens: int) -> BatchSource:
    """Rows of one task, or interleaved by one policy."""
    task = name if name in TASKS else "interleaved"
    return BatchSource(
        {task: [(store, 1.0)]},
        mixture=TaskMixture(**{other: float(other == task) for other in asdict(TaskMixture())}),
        ids=IDS,
        row_tokens=row_tokens,
        policy=POLICIES.get(name),
    )


def tokens_per_s(source: BatchSource, row_tokens: int, rows: int, repeats: int) -> list[float]:
    """Tokens a second of CPU, for each of some batches after the first one."""
    found = []
    for step in range(repeats + 1):
        started = time.process_time()
        source.batch(1, step, rows=rows)
        found.append(rows * row_tokens / (time.process_time() - started))
    return found[1:]


def own_memory_mib() -> float:
    """Memory of this process that is no file's: mapped shards are the file cache's, shared by all processes."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) / 1024


def print_tables(found: dict[int, dict[str, Any]], lengths: list[int]) -> None:
    print(
        f"The 135M model eats {MODEL_TOKENS_PER_S:,.0f} tokens/s at 40 % of 790 TFLOP/s; the goal is {GOAL} × that.\n"
    )
    header = ["utterances", "open, s", "index, s", "memory, MiB", "first batch, s"]
    print_table(
        header,
        [
            [f"{count:,}", *(f"{row[key]:.2f}" for key in ("open_s", "index_s", "memory_mib", "first_batch_s"))]
            for count, row in found.items()
        ],
    )
    counts = list(found)
    rows = []
    for key in found[counts[0]]["tokens_per_s"]:
        rates = {count: found[count]["tokens_per_s"][key] for count in counts}
        medians = [float(np.median(rates[count])) for count in counts]
        rows.append(
            [
                *key.split(),
                *(spread([rate / 1e6 for rate in rates[count]]) for count in counts),
                f"{min(medians) / medians[0]:.2f}",
                f"{GOAL * MODEL_TOKENS_PER_S / min(medians):.1f}",
            ]
        )
    header = ["rows", "tokens", *(f"{count:,}: million tokens/s" for count in counts), "slowest / first", "cores"]
    print_table(header, rows)
    print(f'"cores": how many of them draw {GOAL} × what the model eats, at the slowest size.')


if __name__ == "__main__":
    main()
