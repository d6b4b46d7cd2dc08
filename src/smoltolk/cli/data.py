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
    _add_align(commands)


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


def _add_align(commands: Any) -> None:
    align = commands.add_parser("align", help="find when each word of the transcripts is spoken")
    align.add_argument("source", type=Path, help="JSONL or CSV manifest, or a folder of audio and .txt files")
    align.add_argument("output", type=Path, help="the new manifest, with word_ends_s (.jsonl)")
    align.add_argument("--aligner", choices=("pocketsphinx", "ctc"), required=True)
    align.add_argument("--model", help="name or folder of the CTC model")
    align.add_argument("--min-confidence", type=float, help="refuse utterances with less")
    align.add_argument("--workers", type=int, default=1, help="processes")
    align.set_defaults(run=_align)


def _align(options: argparse.Namespace) -> None:
    from smoltolk.data.align import align_source, confidence_path, quarantine_path
    from smoltolk.speech.alignment import make_aligner

    aligner = make_aligner(options.aligner, options.model, options.min_confidence)
    summary = align_source(options.source, options.output, aligner, workers=options.workers)
    print(f"{options.output}: {summary.aligned} rows aligned, {summary.kept} kept as they were")
    if summary.confidence_quantiles:
        low, lower, median = summary.confidence_quantiles
        print(
            f"confidence {median:.2f} at the median, {lower:.2f} and {low:.2f} for the lowest 5 and 1 %, "
            f"see {confidence_path(options.output)}"
        )
    if summary.quarantined:
        print(f"{summary.quarantined} rows could not be aligned, see {quarantine_path(options.output)}")
