"""Commands for stores: check, preview, import of the authors' data."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    data = commands.add_parser("data", help="stores: check, preview, import of the authors' data")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)

    check = actions.add_parser("check", help="read a whole store and say what is wrong or odd")
    check.add_argument("store", type=Path, help="folder of the store")
    check.add_argument("--speech-tokenizer", type=Path, help="folder of the speech tokenizer it should be of")
    check.add_argument("--text-tokenizer", help="folder or name of the text tokenizer it should be of")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(run=_check, resume_hint="stopped; nothing was changed")

    importing = actions.add_parser("import-authors", help="make a store from data in the authors' layout")
    importing.add_argument("source", type=Path, help="folder of a dataset, with a folder for each kind of tokens")
    importing.add_argument("output", type=Path, help="folder of the store")
    importing.add_argument("--speech-tokens", metavar="FOLDER", help="folder of units in it, such as mhubert25hzl11")
    importing.add_argument("--text-tokens", metavar="FOLDER", help="folder of text tokens in it, such as smollm")
    importing.add_argument(
        "--speech-tokenizer-card", type=Path, help="folder of the speech tokenizer, or JSON file of its card"
    )
    importing.add_argument("--text-tokenizer", help="folder or name of the text tokenizer")
    pairs: dict[str, Any] = {"nargs": "+", "metavar": "NAME=VALUE"}
    importing.add_argument("--split", **pairs, help="files to read, and what each becomes, such as large=train")
    importing.add_argument("--speech-meta", **pairs, help="vocab_size, eos, pad, frame_rate, n_q; default: meta.pkl")
    importing.add_argument("--text-meta", **pairs, help="vocab_size and eos; default: meta.pkl")
    importing.add_argument("--dtype", **pairs, help="type of the numbers in a file, such as speech.len=uint16")
    importing.set_defaults(run=_import_authors, resume_hint="stopped; nothing was written")


def _check(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from smoltolk.data.check import check_store
    from smoltolk.speech.units import read_card

    report = check_store(
        options.store,
        speech_fingerprint=options.speech_tokenizer and read_card(options.speech_tokenizer)["fingerprint"],
        text_tokenizer=options.text_tokenizer and AutoTokenizer.from_pretrained(options.text_tokenizer),
        progress=not options.json,
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    else:
        splits = ", ".join(f"{count} {split or 'without a split'}" for split, count in report.splits.items())
        print(f"{options.store}: {report.rows} rows ({splits}), {report.hours:.2f} h, {report.words} words, ", end="")
        print(f"{report.units} units of {report.units_used} kinds")
        table = Table("over rows", "1 %", "50 %", "99 %")
        for name, spread in report.spreads.items():
            table.add_row(name, *(f"{value:.2f}" for value in (spread.low, spread.median, spread.high)))
        console = Console()
        console.print(table)
        table = Table("", "found", "times", "such as", "what to do")
        for found in report.findings:
            cells = (found.kind, str(found.count), "\n".join(found.examples), found.remedy)
            table.add_row("fault" if found.is_fault else "note", *map(escape, cells))
        if report.findings:
            console.print(table)
    faults = [found.kind for found in report.findings if found.is_fault]
    if faults:
        raise ValueError(f"{options.store} has faults: {', '.join(faults)}")
    print("no faults", file=sys.stderr if options.json else sys.stdout)


def _import_authors(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from smoltolk.data.authors import import_authors

    summary = import_authors(
        options.source,
        options.output,
        speech_tokens=options.speech_tokens,
        text_tokens=options.text_tokens,
        speech_tokenizer=options.speech_tokenizer_card and _speech_card(options.speech_tokenizer_card),
        text_tokenizer=options.text_tokenizer and AutoTokenizer.from_pretrained(options.text_tokenizer),
        splits=_pairs(options.split),
        speech_meta=_numbers(options.speech_meta),
        text_meta=_numbers(options.text_meta),
        dtypes=_pairs(options.dtype),
    )
    splits = ", ".join(f"{count} {split}" for split, count in summary.splits.items())
    print(f"{options.output}: {summary.utterances} utterances ({splits})")
    for file, width in summary.widths.items():
        print(f"{file}: {width}")
    if summary.unaligned:
        print(f"{summary.unaligned} have no word times: they serve as speech and as text, not interleaved")
    if summary.quarantined:
        print(f"{summary.quarantined} could not be used, see {options.output / 'quarantine.jsonl'}")


def _speech_card(path: Path) -> dict[str, Any]:
    from smoltolk.speech.units import load_speech_tokenizer

    if path.is_dir():
        return load_speech_tokenizer(path).card()
    try:
        card = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give the card of a speech tokenizer") from None
    if not isinstance(card, dict):
        raise ValueError(f"{path} is not the card of a speech tokenizer: give an object with its fingerprint")
    return card


def _pairs(arguments: list[str] | None) -> dict[str, str] | None:
    if wrong := [argument for argument in arguments or [] if "=" not in argument]:
        raise ValueError(f"{wrong[0]!r} is not of the form NAME=VALUE")
    return None if arguments is None else dict(argument.split("=", 1) for argument in arguments)


def _numbers(arguments: list[str] | None) -> dict[str, float] | None:
    pairs = _pairs(arguments)
    try:
        return None if pairs is None else {name: float(value) for name, value in pairs.items()}
    except ValueError as error:
        raise ValueError(f"{' '.join(arguments or [])}: {error}; give numbers") from None
