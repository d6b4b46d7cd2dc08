"""Commands for speech tokenizers and vocoders."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    tokenizer = commands.add_parser("tokenizer", help="speech tokenizers: fit")
    fit = tokenizer.add_subparsers(dest="action", metavar="ACTION", required=True).add_parser(
        "fit", help="fit a mel speech tokenizer on your own audio"
    )
    fit.add_argument("audio", type=Path, nargs="+", help="audio files, or folders of them")
    fit.add_argument("--output", type=Path, required=True, help="folder of the new tokenizer")
    fit.add_argument("--num-units", type=int, default=64)
    fit.add_argument("--seed", type=int, default=0)
    fit.set_defaults(run=_fit_tokenizer, resume_hint="stopped; nothing was written")


def _fit_tokenizer(options: argparse.Namespace) -> None:
    from smoltolk.data.sources import audio_files
    from smoltolk.speech.audio import load_audio
    from smoltolk.speech.mel import MelTokenizer

    rate = MelTokenizer.sample_rate_hz
    audios = (load_audio(path, sample_rate_hz=rate) for path in audio_files(options.audio))
    tokenizer = MelTokenizer.fit(audios, num_units=options.num_units, seed=options.seed)
    tokenizer.save(options.output)
    print(f"{options.output}: {tokenizer.num_units} units, fingerprint {tokenizer.fingerprint}")
