"""Commands for data."""

import argparse
from pathlib import Path
from typing import Any

NUM_REASONS = 5  # that are printed of rows in quarantine; all are in summary.json


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    _add_prepare(commands)


def _add_prepare(commands: Any) -> None:
    prepare = commands.add_parser("prepare", help="make a store of units and text from recordings, datasets, corpora")
    prepare.add_argument(
        "source",
        help="manifest (.jsonl, .csv), folder of audio and .txt files, or KIND:… such as librispeech:PATH, "
        "hf:NAME:CONFIG:SPLIT, text:PATH; see docs/data.md",
    )
    prepare.add_argument("output", type=Path, help="folder of the store")
    prepare.add_argument("--speech-tokenizer", type=Path, help="folder of the speech tokenizer; for audio")
    prepare.add_argument("--text-tokenizer", help="folder or name of the text LM's tokenizer; for text")
    prepare.add_argument(
        "--columns", nargs="+", type=_pair, metavar="OURS=THEIRS", help="columns to read, such as text=sentence"
    )
    prepare.add_argument(
        "--split", nargs="+", type=_pair, metavar="THEIRS=OURS", help="what splits become, such as dev=validation"
    )
    prepare.add_argument("--audio-folder", type=Path, help="folder with all audio; default: where the manifest is")
    prepare.add_argument("--validation-share", type=float, default=0.0, help="share of rows for validation")
    prepare.add_argument("--rows-per-shard", type=int, help="rows of a shard, the most a kill can lose per worker")
    prepare.add_argument("--aligner", choices=("pocketsphinx", "ctc"), help="find word times where there are none")
    prepare.add_argument("--aligner-model", help="folder or name of the aligner's model")
    prepare.add_argument("--min-confidence", type=float, help="quarantine alignments below this")
    prepare.add_argument("--workers", type=int, default=1, help="processes, or Ray actors")
    prepare.add_argument("--device", help="where a neural speech tokenizer runs in each worker, such as cuda")
    prepare.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="what it computes in"
    )
    prepare.add_argument("--batch-seconds", type=float, help="audio that is encoded together")
    prepare.add_argument("--engine", choices=("local", "ray"), default="local")
    prepare.add_argument("--gpus-per-worker", type=float, default=0.0, help="for each Ray actor")
    prepare.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="do part I of N, such as 3/8")
    prepare.add_argument("--join", type=Path, nargs="+", default=[], metavar="FOLDER", help="outputs of finished parts")
    prepare.set_defaults(run=_prepare)


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (name and separator and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form text=sentence")
    return name, value


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 3/8")
    return int(number), int(count)


def _prepare(options: argparse.Namespace) -> None:
    from smoltolk.data.corpora import open_source
    from smoltolk.data.prepare import prepare
    from smoltolk.data.store import MANIFEST
    from smoltolk.data.summary import PICTURE, draw
    from smoltolk.data.text import load_text_tokenizer
    from smoltolk.speech.kinds import load_speech_tokenizer

    if len(dict(options.columns or ())) < len(options.columns or ()):
        raise ValueError(f"--columns names one of our columns twice: {' '.join('='.join(c) for c in options.columns)}")
    if len(dict(options.split or ())) < len(options.split or ()):
        raise ValueError(f"--split names one of their splits twice: {' '.join('='.join(s) for s in options.split)}")
    if (options.output / MANIFEST).exists():
        print(f"{options.output} was finished before, and rows in quarantine stay there: delete it to prepare it again")
    optional = {"rows_per_shard": options.rows_per_shard, "batch_s": options.batch_seconds}
    summary = prepare(
        open_source(
            options.source,
            columns=None if options.columns is None else dict(options.columns),
            audio_folder=options.audio_folder,
            splits=None if options.split is None else dict(options.split),
        ),
        options.output,
        speech_tokenizer=None if options.speech_tokenizer is None else load_speech_tokenizer(options.speech_tokenizer),
        text_tokenizer=options.text_tokenizer and load_text_tokenizer(options.text_tokenizer),
        aligner=_make_aligner(options),
        validation_share=options.validation_share,
        workers=options.workers,
        engine=options.engine,
        gpus_per_worker=options.gpus_per_worker,
        device=options.device,
        dtype=options.dtype,
        part=options.part,
        join=options.join,
        **{name: value for name, value in optional.items() if value is not None},
    )
    if summary is None:
        print(f"{options.output}: part {options.part[0]}/{options.part[1]} is done, other parts are not")
        return
    splits = ", ".join(f"{count} {split}" for split, count in summary.splits.items())
    print(
        f"{options.output}: {summary.utterances} utterances ({splits}), {_duration(summary.seconds)}, "
        f"{summary.words} words, {summary.units_per_s:.1f} units/s"
    )
    if summary.unaligned:
        print(f"{summary.unaligned} of them have no word times: they serve as speech and as text, not interleaved")
    if summary.quarantined:
        print(
            f"{summary.quarantined} rows ({summary.share_quarantined:.2%}) could not be used, see "
            f"{options.output / 'quarantine.jsonl'}:"
        )
        shown = list(summary.reasons.items())[:NUM_REASONS]
        for reason, count in shown:
            print(f"  {count} × {reason}")
        if len(shown) < len(summary.reasons):
            print(f"  and {summary.quarantined - sum(count for _, count in shown)} rows for other reasons")
    try:
        draw(summary, options.output / PICTURE)
    except ImportError as error:
        print(f"no picture: {error}")


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _make_aligner(options: argparse.Namespace) -> Any:
    if options.aligner is None:
        if options.aligner_model is not None or options.min_confidence is not None:
            raise ValueError("--aligner-model and --min-confidence belong to an aligner: give --aligner")
        return None
    from smoltolk.speech.kinds import make_aligner

    return make_aligner(
        options.aligner,
        model=options.aligner_model,
        min_confidence=options.min_confidence,
        device=options.device or "cpu",
    )
