"""Speed of the speech tokenizers, in seconds of audio for each second of work.

python -m benchmarks.tokenize_speech --help
"""

import argparse
import io
import platform
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import soundfile
import torch
import transformers
from benchmarks.workload import print_table, seconds, spread
from transformers import HubertConfig, HubertModel

from smoltolk.speech.audio import load_audio
from smoltolk.speech.hubert import HubertSettings, HubertTokenizer
from smoltolk.speech.mel import MelTokenizer

# name → width, feed-forward width, layers, heads, convolution channels
SIZES = {"tiny": (16, 32, 3, 2, 16), "base": (768, 3072, 12, 12, 512)}
KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2, 2), (5, 2, 2, 2, 2, 2, 2, 2)  # 25 Hz
NUM_UNITS = 500
RATE_HZ = 16_000
GPU_GOAL = 1500
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    is_cuda = torch.device(options.device).type == "cuda"
    device = torch.cuda.get_device_name(options.device) if is_cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"HuBERT {options.size} at 25 Hz, random weights, {device}, {'CPU' if options.cpu_time else 'wall'} time; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n"
    )
    model, centroids = make_model(options)
    measure_hubert(model, centroids, options)
    if not options.skip_rest:
        measure_rest(options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Speech tokenizers.", formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    on_cuda = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="base", help="sizes of HuBERT, random weights")
    parser.add_argument("--layer", type=int, default=11)
    parser.add_argument("--device", default="cuda" if on_cuda else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"] if on_cuda else ["fp32"])
    parser.add_argument("--windows-s", nargs="+", type=float, default=[10, 20], help="lengths of windows")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8], help="full windows at once")
    parser.add_argument("--files-s", nargs="+", type=float, default=[3, 12], help="lengths of short files")
    parser.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="count the seconds of CPU, not of the clock")
    parser.add_argument("--skip-rest", action="store_true", help="leave out the mel tokenizer and the loader")
    return parser.parse_args(arguments)


def make_model(options: argparse.Namespace) -> tuple[HubertModel, np.ndarray]:
    """A model with random weights, and centroids from among its frames, float32 (num_units, dim)."""
    dim, intermediate, layers, heads, channels = SIZES[options.size]
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        conv_dim=(channels,) * len(STRIDES),
        conv_kernel=KERNELS,
        conv_stride=STRIDES,
        num_conv_pos_embedding_groups=min(16, dim // 2),
    )
    model = HubertModel(config).eval()
    with torch.inference_mode():
        audio = torch.from_numpy(speech_like(NUM_UNITS / 25 + 1))
        frames = model(audio[None], output_hidden_states=True).hidden_states[options.layer][0]
    return model, frames[:NUM_UNITS].numpy()


def measure_hubert(model: HubertModel, centroids: np.ndarray, options: argparse.Namespace) -> None:
    """Times long audio in windows, several at once, and short files, which are computed one by one."""
    rows = []
    exact: dict[float, np.ndarray] = {}  # frames of each length of window in the first precision, one by one
    for dtype in options.dtype:
        for window_s in options.windows_s:
            # Whole batches of full windows, and the first and the last, which have less context.
            audio = speech_like(window_s * (max(options.batch_sizes) + 2))
            for batch_size in options.batch_sizes:
                settings = HubertSettings(options.layer, is_normalized=False, window_s=window_s)
                tokenizer = HubertTokenizer(
                    model, centroids, settings, device=options.device, dtype=DTYPES[dtype], batch_size=batch_size
                )
                frames = tokenizer.encode(audio).frames()  # warms up
                reference = exact.setdefault(window_s, frames)
                speeds = real_times(partial(tokenizer.encode, audio), len(audio), options)
                unlike = f"{100 * np.mean(frames != reference):.2f} %"
                rows.append([f"windows of {window_s:g} s", dtype, str(batch_size), spread(speeds, 1), unlike])
        tokenizer = HubertTokenizer(
            model,
            centroids,
            HubertSettings(options.layer, is_normalized=False),
            device=options.device,
            dtype=DTYPES[dtype],
        )
        for file_s in options.files_s:
            files = [speech_like(file_s, seed) for seed in range(4)]
            tokenizer.encode_batch(files)  # warms up
            speeds = real_times(partial(tokenizer.encode_batch, files), sum(map(len, files)), options)
            rows.append([f"files of {file_s:g} s", dtype, "1", spread(speeds, 1), "–"])
    goal = f"; goal ≥ {GPU_GOAL}" if torch.device(options.device).type == "cuda" else ""
    print(f"HuBERT, × real time: least – median – greatest{goal}. Unlike: frames with another unit than the first row")
    print("of these windows has")
    print_table(["audio", "dtype", "batch", "× real time", "unlike"], rows)


def measure_rest(options: argparse.Namespace) -> None:
    """Times the mel tokenizer and the audio loader on a minute of audio."""
    audio = speech_like(60)
    mel = MelTokenizer.fit([audio], num_units=64)
    rows = [["mel tokenizer", spread(real_times(partial(mel.encode, audio), len(audio), options), 0)]]
    for name, rate_hz, format_ in (("WAV, 16 kHz", RATE_HZ, "WAV"), ("FLAC, 44.1 kHz", 44_100, "FLAC")):
        file = io.BytesIO()
        soundfile.write(file, speech_like(60, rate_hz=rate_hz), rate_hz, format=format_)
        load = partial(load_audio, file.getvalue(), sample_rate_hz=RATE_HZ)
        rows.append([f"load_audio, {name}", spread(real_times(load, len(audio), options), 0)])
    print("Beside it, × real time: least – median – greatest")
    print_table(["what", "× real time"], rows)


def real_times(action: partial, num_samples: int, options: argparse.Namespace) -> list[float]:
    return [num_samples / RATE_HZ / seconds(action, options) for _ in range(options.repeats)]


def speech_like(length_s: float, seed: int = 0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """Noise that changes colour and loudness ten times a second, float32 (samples,)."""
    return np.concatenate(list(_syllables(round(length_s * rate_hz), rate_hz, seed)))


def _syllables(num_samples: int, rate_hz: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for start in range(0, num_samples, rate_hz // 10):
        sound = rng.standard_normal(min(rate_hz // 10, num_samples - start))
        smooth = np.convolve(sound, np.ones(rng.integers(1, 12)), mode="same")
        yield (rng.uniform(0, 0.2) * smooth / np.abs(smooth).max()).astype(np.float32)


if __name__ == "__main__":
    main()
