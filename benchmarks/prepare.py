"""`prepare` end to end from FLAC files to a store, on one core, with a mel tokenizer: times real time.

    python -m benchmarks.prepare

The audio is made here: voiced and unvoiced stretches with pauses, at the rate of the corpora. Each length has about the
same audio in all. The parts are timed one by one, as the work does them: reading and decoding, resampling (for files of
another rate), mel bands, distances to the centroids with the path through them, text, and the shards.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from benchmarks.workload import print_table, spread
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smoltolk.data.prepare import prepare
from smoltolk.data.store import write_store
from smoltolk.data.text import encode_words
from smoltolk.data.utterance import Utterance
from smoltolk.speech.audio import load_audio
from smoltolk.speech.mel import MelTokenizer

WORDS_PER_S = 2.5


def make_audio(seconds: float, rate_hz: int, rng: np.random.Generator) -> np.ndarray:
    """A waveform (samples,) with the rough spectrum and rhythm of speech: FLAC packs it about as well."""
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    phase = 2 * np.pi * np.cumsum(120 + 30 * np.sin(2 * np.pi * 0.7 * t + rng.uniform(0, 6))) / rate_hz
    voice = sum(np.sin(k * phase) / k for k in range(1, 9))
    syllables = np.clip(np.sin(2 * np.pi * 4 * t + rng.uniform(0, 6)) + 0.3, 0, 1)
    noise = rng.standard_normal(len(t)) * np.clip(np.sin(2 * np.pi * 1.3 * t), 0, 1)
    return (0.08 * voice * syllables + 0.02 * noise + 1e-4 * rng.standard_normal(len(t))).astype(np.float32)


def text_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words."""
    vocabulary = {f"w{number}": number for number in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def write_corpus(folder: Path, seconds: float, total_s: float, rate_hz: int, seed: int) -> Path:
    """FLAC files of one length, and their manifest."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = []
    for number in range(max(1, round(total_s / seconds))):
        soundfile.write(folder / f"{number}.flac", make_audio(seconds, rate_hz, rng), rate_hz)
        num_words = max(1, int(seconds * WORDS_PER_S))
        text = " ".join(f"w{word}" for word in rng.integers(1000, size=num_words))
        ends = np.linspace(0, seconds, num_words + 1)[1:].round(3).tolist()
        rows.append(json.dumps({"audio": f"{number}.flac", "text": text, "word_ends_s": ends}) + "\n")
    path = folder / "manifest.jsonl"
    path.write_text("".join(rows))
    return path


def cpu_seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of CPU that an action took, and its result."""
    started = time.process_time()
    result = action()
    return time.process_time() - started, result


def parts(folder: Path, tokenizer: MelTokenizer, words: PreTrainedTokenizerFast, output: Path) -> dict[str, float]:
    """Seconds of CPU of each part of the work."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    rate_hz = tokenizer.sample_rate_hz
    took: dict[str, float] = {}
    own_rate_hz = soundfile.info(folder / rows[0]["audio"]).samplerate
    took["decode"], audios = cpu_seconds(
        lambda: [load_audio(folder / row["audio"], sample_rate_hz=own_rate_hz) for row in rows]
    )
    took["resample"] = 0.0
    if own_rate_hz != rate_hz:
        took["resample"], audios = cpu_seconds(lambda: [soxr.resample(audio, own_rate_hz, rate_hz) for audio in audios])
    extract = tokenizer.settings.log_mel()
    took["mel"], _ = cpu_seconds(lambda: [extract(audio) for audio in audios])
    encode, units = cpu_seconds(lambda: tokenizer.encode_batch(audios))
    took["k-means, path"] = max(0.0, encode - took["mel"])
    took["text"], texts = cpu_seconds(lambda: [encode_words(words, row["text"]) for row in rows])
    utterances = [
        Utterance(
            id=row["audio"],
            text=row["text"],
            text_ids=text[0],
            word_token_counts=text[1],
            units=unit.units,
            unit_durations=unit.durations,
            seconds=len(audio) / rate_hz,
        )
        for row, text, unit, audio in zip(rows, texts, units, audios, strict=True)
    ]
    took["shard"], _ = cpu_seconds(
        lambda: write_store(output, utterances, text_tokenizer_fingerprint="t", speech_tokenizer=tokenizer.card())
    )
    return took


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=float, nargs="+", default=[3, 15, 60, 600], help="seconds of a file")
    parser.add_argument("--rates", type=int, nargs="+", default=[16_000, 44_100], help="sampling rates of the files")
    parser.add_argument("--total", type=float, default=600, help="seconds of audio for each length")
    parser.add_argument("--num-units", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    tokenizer = MelTokenizer.fit((make_audio(20, 16_000, rng) for _ in range(10)), num_units=options.num_units)
    words = text_tokenizer()
    print(f"CPU seconds of one thread; {options.num_units} units; least – median – greatest of {options.repeats}\n")
    end_to_end, shares = [], []
    with tempfile.TemporaryDirectory() as folder:
        for rate_hz in options.rates:
            for seconds in options.lengths:
                corpus = Path(folder) / f"{rate_hz}-{seconds}"
                source = write_corpus(corpus, seconds, options.total, rate_hz, seed=1)
                speeds, breakdown = [], []
                for repeat in range(options.repeats):
                    settings = {"speech_tokenizer": tokenizer, "text_tokenizer": words, "progress": False}
                    output = corpus / f"store-{repeat}"
                    took, summary = cpu_seconds(lambda o=output, s=source, k=settings: prepare(s, o, **k))
                    speeds.append(summary.seconds / took)
                    breakdown.append(parts(corpus, tokenizer, words, corpus / f"parts-{repeat}"))
                end_to_end.append((f"{seconds:g} s", f"{rate_hz} Hz", str(summary.utterances), spread(speeds, 0)))
                names = breakdown[0]
                median = {name: float(np.median([took[name] for took in breakdown])) for name in names}
                hour = 3600 / summary.seconds
                shares.append((f"{seconds:g} s", f"{rate_hz} Hz", *(f"{hour * median[n]:.2f}" for n in names)))
    print_table(("file", "rate", "files", "× real time per core, end to end"), end_to_end)
    print("seconds of CPU for an hour of audio, medians")
    print_table(("file", "rate", *names), shares)


if __name__ == "__main__":
    main()
