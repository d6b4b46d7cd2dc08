"""Commands for data."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    prepare = commands.add_parser("prepare", help="make a store of units and text from recordings")
    prepare.add_argument("source", type=Path, help="JSONL or CSV manifest, or a folder of audio and .txt files")
    prepare.add_argument("output", type=Path, help="folder of the store")
    prepare.add_argument("--speech-tokenizer", type=Path, required=True, help="folder of the speech tokenizer")
    prepare.add_argument("--text-tokenizer", required=True, help="folder or name of the text LM's tokenizer")
    prepare.add_argument("--validation-share", type=float, default=0.0, help="share of rows for validation")
    prepare.add_argument("--workers", type=int, default=1, help="processes")
    prepare.set_defaults(run=_prepare)


def _prepare(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from smoltolk.data.prepare import prepare
    from smoltolk.speech.units import load_speech_tokenizer

    summary = prepare(
        options.source,
        options.output,
        speech_tokenizer=load_speech_tokenizer(options.speech_tokenizer),
        text_tokenizer=AutoTokenizer.from_pretrained(options.text_tokenizer),
        validation_share=options.validation_share,
        workers=options.workers,
    )
    splits = ", ".join(f"{count} {split}" for split, count in summary.splits.items())
    print(
        f"{options.output}: {summary.utterances} utterances ({splits}), {summary.hours:.2f} h, {summary.words} words, "
        f"{summary.units_per_s:.1f} units/s"
    )
    if summary.unaligned:
        print(f"{summary.unaligned} of them have no word times: they serve as speech and as text, not interleaved")
    if summary.quarantined:
        print(f"{summary.quarantined} rows could not be used, see {options.output / 'quarantine.jsonl'}")
