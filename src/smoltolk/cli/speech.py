"""Commands for speech tokenizers and vocoders."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltolk.terminal import progress_bar

if TYPE_CHECKING:
    from smoltolk.speech.units import SpeechTokenizer

_DTYPES = ("float32", "bfloat16", "float16")
_PRESET = "mhubert-25hz"
_MEL_UNITS, _HUBERT_UNITS = 64, 500


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    _add_tokenizer(commands)


def _add_tokenizer(commands: Any) -> None:
    tokenizer = commands.add_parser("tokenizer", help="speech tokenizers: fit, import, encode")
    actions = tokenizer.add_subparsers(dest="action", metavar="ACTION", required=True)

    fit = actions.add_parser("fit", help="fit a speech tokenizer on your own audio")
    fit.add_argument("audio", type=Path, nargs="+", help="audio files, or folders of them")
    fit.add_argument("--output", type=Path, required=True, help="folder of the new tokenizer")
    fit.add_argument("--kind", choices=("mel", "hubert"), default="mel")
    fit.add_argument("--num-units", type=int, help=f"default: {_MEL_UNITS} for mel, {_HUBERT_UNITS} for hubert")
    fit.add_argument("--seed", type=int, default=0)
    _add_model(fit)
    _add_device(fit)
    fit.set_defaults(run=_fit_tokenizer, resume_hint="stopped; nothing was written")

    importing = actions.add_parser("import", help="make a speech tokenizer of a model that is there already")
    importing.add_argument("--output", type=Path, required=True, help="folder of the new tokenizer")
    importing.add_argument("--kind", choices=("hubert", "mimi"), help="what the model is")
    importing.add_argument("--preset", choices=(_PRESET,), help="the paper's: mHuBERT, layer 11, 500 units")
    _add_model(importing)
    importing.add_argument("--kmeans", type=Path, help="k-means of hubert: joblib, .npy or .safetensors file")
    importing.set_defaults(run=_import_tokenizer, resume_hint="stopped; nothing was written")

    encode = actions.add_parser("encode", help="print the units of audio files, a line of JSON for each")
    encode.add_argument("tokenizer", type=Path, help="folder of a speech tokenizer")
    encode.add_argument("audio", type=Path, nargs="+", help="audio files, or folders of them")
    _add_device(encode)
    encode.set_defaults(run=_encode, resume_hint="stopped")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or name of a model of transformers")
    parser.add_argument("--layer", type=int, help="transformer layer of hubert, counted from 1")
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="whether hubert hears normalised audio; default: as its preprocessor_config.json says",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="where a network runs")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="what a network computes in")


def _fit_tokenizer(options: argparse.Namespace) -> None:
    from smoltolk.data.recordings import stream_usable
    from smoltolk.data.sources import audio_files
    from smoltolk.model.export import new_folder

    paths = audio_files(options.audio)
    left_out = _LeftOut(len(paths))

    def audios(sample_rate_hz: int) -> Any:
        with progress_bar(transient=True) as bar:
            tracked = bar.track(paths, description="frames")
            yield from stream_usable(tracked, sample_rate_hz=sample_rate_hz, on_failure=left_out.add)

    tokenizer: SpeechTokenizer
    num_units = options.num_units
    if num_units is None:
        num_units = _MEL_UNITS if options.kind == "mel" else _HUBERT_UNITS
    if options.kind == "mel":
        from smoltolk.speech.mel import MelTokenizer

        _refuse_options(options, "--kind mel", "model", "layer", "normalize")
        if (options.device, options.dtype) != ("cpu", "float32"):
            raise ValueError("--device and --dtype are for --kind hubert: a mel tokenizer has no network")
        with new_folder(options.output) as folder:
            tokenizer = MelTokenizer.fit(audios(MelTokenizer.sample_rate_hz), num_units=num_units, seed=options.seed)
            tokenizer.save(folder)
    else:
        from smoltolk.speech.hubert import HubertTokenizer, load_hubert

        _require_options(options, "--kind hubert", "model", "layer")
        with new_folder(options.output) as folder:
            model, settings = load_hubert(options.model, layer=options.layer, is_normalized=options.normalize)
            tokenizer = HubertTokenizer.fit(
                audios(settings.sample_rate_hz),
                model,
                settings,
                num_units=num_units,
                seed=options.seed,
                device=options.device,
                dtype=options.dtype,
            )
            tokenizer.save(folder)
    _print_made(tokenizer, options.output)
    left_out.print_count()


def _import_tokenizer(options: argparse.Namespace) -> None:
    from smoltolk.model.export import new_folder

    with new_folder(options.output) as folder:
        tokenizer = _imported(options)
        tokenizer.save(folder)
    _print_made(tokenizer, options.output)


def _imported(options: argparse.Namespace) -> "SpeechTokenizer":
    if options.preset is not None:
        from smoltolk.speech.hubert import HubertTokenizer

        _refuse_options(options, f"--preset {options.preset}", "kind", "model", "layer", "normalize")
        return HubertTokenizer.mhubert_25hz(options.kmeans)
    if options.kind == "hubert":
        from smoltolk.speech.hubert import HubertTokenizer

        _require_options(options, "--kind hubert", "model", "layer", "kmeans")
        return HubertTokenizer.from_pretrained(
            options.model, layer=options.layer, kmeans=options.kmeans, is_normalized=options.normalize
        )
    if options.kind == "mimi":
        from smoltolk.speech.mimi import MimiTokenizer

        _refuse_options(options, "--kind mimi", "layer", "normalize", "kmeans")
        _require_options(options, "--kind mimi", "model")
        return MimiTokenizer.from_pretrained(options.model)
    raise ValueError(f"nothing to import: give --kind, or --preset {_PRESET}")


def _encode(options: argparse.Namespace) -> None:
    from smoltolk.data.sources import audio_files
    from smoltolk.speech.audio import stream_audio
    from smoltolk.speech.kinds import load_speech_tokenizer

    tokenizer = load_speech_tokenizer(options.tokenizer, device=options.device, dtype=options.dtype)
    paths = audio_files(options.audio)
    left_out = _LeftOut(len(paths))
    for path in paths:
        try:
            encoded = tokenizer.encode_stream(stream_audio(path, sample_rate_hz=tokenizer.sample_rate_hz))
        except ValueError as error:
            left_out.add(path, str(error))
            continue
        line = {"audio": str(path), "units": encoded.units.tolist(), "durations": encoded.durations.tolist()}
        print(json.dumps(line, ensure_ascii=False), flush=True)
    left_out.print_count()
    if left_out.count == len(paths):
        raise ValueError("no audio file can be used: give audio files, or folders of them")


class _LeftOut:
    """Says which files were left out, and why, and how many of `num_files` they were."""

    def __init__(self, num_files: int) -> None:
        self.num_files, self.count = num_files, 0

    def add(self, path: Path, reason: str) -> None:
        self.count += 1
        print(f"left out {path}: {reason}", file=sys.stderr)

    def print_count(self) -> None:
        if self.count:
            print(f"{self.count} of {self.num_files} files left out as unusable", file=sys.stderr)


def _print_made(tokenizer: "SpeechTokenizer", output: Path) -> None:
    print(
        f"{output}: {tokenizer.num_units} units at {tokenizer.unit_rate_hz:g} Hz, fingerprint {tokenizer.fingerprint}"
    )


def _refuse_options(options: argparse.Namespace, what: str, *names: str) -> None:
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        raise ValueError(f"--{given[0]} has no effect with {what}: leave it out")


def _require_options(options: argparse.Namespace, what: str, *names: str) -> None:
    missing = [name for name in names if getattr(options, name) is None]
    if missing:
        raise ValueError(f"{what} needs --{missing[0]}")
