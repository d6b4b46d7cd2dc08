"""Commands for stores and benchmarks: check, preview, spoken cloze items, import of the authors' data."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from smoltolk.terminal import print_table


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    data = commands.add_parser("data", help="check, preview, spoken cloze items, import of the authors' data")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)

    check = actions.add_parser("check", help="read a whole store or benchmark and say what is wrong or odd")
    check.add_argument("store", type=Path, help="folder of the store, or of a benchmark")
    check.add_argument("--speech-tokenizer", type=Path, help="folder of the speech tokenizer it should be of")
    check.add_argument("--text-tokenizer", help="folder or name of the text tokenizer it should be of")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(run=_check, resume_hint="stopped; nothing was changed")

    preview = actions.add_parser("preview", help="show and play training rows as one HTML page")
    preview.add_argument("store", type=Path, help="folder of the store")
    preview.add_argument("--output", type=Path, required=True, help="HTML file to write")
    preview.add_argument("--rows", type=int, default=20)
    preview.add_argument("--seed", type=int, help="default: the recipe's, or 0")
    preview.add_argument("--recipe", type=Path, help="draw as a stage of this recipe does; default: the paper's policy")
    preview.add_argument("--stage", type=int, help="number of the stage, from 1; default: the last")
    preview.add_argument("--row-tokens", type=int, help="length of a row; default: the recipe's, or 256")
    preview.add_argument("--split", default="train")
    preview.add_argument("--text-tokenizer", help="folder or name of the text tokenizer, to show each token")
    preview.add_argument("--speech-tokenizer", type=Path, help="folder of the speech tokenizer, to check that it fits")
    preview.add_argument("--vocoder", type=Path, help="folder of a vocoder that speaks the units")
    preview.add_argument("--audio-folder", type=Path, help="folder of the recordings, to play them")
    preview.set_defaults(run=_preview, resume_hint="stopped; nothing was written")

    cloze = actions.add_parser("speak-cloze", help="make a cross-modal benchmark from texts: speak prompts and endings")
    cloze.add_argument(
        "texts", type=Path, help="CSV or JSONL of id, prompt_text, true_text, false_text; or Story Cloze"
    )
    cloze.add_argument("--output", type=Path, required=True, help="folder of the benchmark")
    cloze.add_argument(
        "--tts", metavar="COMMAND", help="such as 'tts --out {output} {text}'; default: built-in espeak-ng"
    )
    cloze.add_argument("--voice", nargs="+", default=[], help="voices, one for each item; for COMMAND what {voice} is")
    cloze.add_argument("--jobs", type=int, default=1, help="commands that run at once")
    cloze.set_defaults(run=_speak_cloze)

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
    from smoltolk.data.check import check_store
    from smoltolk.data.store import MANIFEST
    from smoltolk.data.text import load_text_tokenizer
    from smoltolk.evaluation.benchmarks.reading import find_benchmarks
    from smoltolk.speech.units import read_card

    if not (options.store / MANIFEST).exists() and find_benchmarks(options.store):
        _check_benchmarks(options)
        return
    report = check_store(
        options.store,
        speech_fingerprint=options.speech_tokenizer and read_card(options.speech_tokenizer)["fingerprint"],
        text_tokenizer=options.text_tokenizer and load_text_tokenizer(options.text_tokenizer),
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
        print_table(table)
        table = Table("", "found", "times", "such as", "what to do")
        for found in report.findings:
            cells = (found.kind, str(found.count), "\n".join(found.examples), found.remedy)
            table.add_row("fault" if found.is_fault else "note", *cells)
        if report.findings:
            print_table(table)
    faults = [found.kind for found in report.findings if found.is_fault]
    if faults:
        raise ValueError(f"{options.store} has faults: {', '.join(faults)}")
    print("no faults", file=sys.stderr if options.json else sys.stdout)


def _check_benchmarks(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.benchmarks.reading import check_benchmarks

    if given := [key for key in ("speech_tokenizer", "text_tokenizer") if getattr(options, key)]:
        raise ValueError(f"{given[0]} is given, but {options.store} is a benchmark, which has no tokens: leave it out")
    faulty, records = [], []
    for checked in check_benchmarks(options.store):
        found, count = checked.found, checked.benchmark.num_sequences()
        name = f"{found.task} {found.split}" if found.split else found.task
        about = {"task": found.task, "split": found.split, "folder": str(found.place), "sequences": count}
        findings = {"faults": checked.faults, "notes": checked.notes}
        records.append(about | {key: [asdict(fault) for fault in some] for key, some in findings.items()})
        if not options.json:
            print(f"{found.place}: {name}, {count} sequences, {len(checked.faults)} faults")
            for fault in checked.faults:
                print(f"  {fault}")
            for note in checked.notes:
                print(f"  note: {note}")
        if checked.faults:
            faulty.append(f"{name} ({len(checked.faults)})")
    if options.json:
        print(json.dumps(records, indent=1, ensure_ascii=False))
    if faulty:
        raise ValueError(f"{options.store} has faults: {', '.join(faulty)}")
    print("no faults", file=sys.stderr if options.json else sys.stdout)


def _speak_cloze(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.benchmarks.spoken_cloze import read_cloze_texts, speak_cloze

    items = read_cloze_texts(options.texts)
    made = speak_cloze(items, options.output, tts=options.tts, voices=options.voice, jobs=options.jobs)
    print(
        f"{options.output}: {made.items} items, {made.num_spoken} texts spoken ({made.seconds / 60:.1f} min), "
        f"{made.num_kept} kept"
    )


def _preview(options: argparse.Namespace) -> None:
    from smoltolk.data.preview import preview
    from smoltolk.data.store import Store
    from smoltolk.data.text import load_text_tokenizer
    from smoltolk.speech.kinds import load_speech_tokenizer, load_vocoder

    store = Store(options.store)
    tokenizer = options.speech_tokenizer and load_speech_tokenizer(options.speech_tokenizer)
    if tokenizer:
        store.require(speech_fingerprint=tokenizer.fingerprint)
    settings = _recipe_settings(options.recipe, options.stage)
    given = {"seed": options.seed, "row_tokens": options.row_tokens}
    rows = preview(
        store,
        options.output,
        rows=options.rows,
        split=options.split,
        text_tokenizer=options.text_tokenizer and load_text_tokenizer(options.text_tokenizer),
        vocoder=options.vocoder and load_vocoder(options.vocoder, tokenizer),
        audio_folder=options.audio_folder,
        **(settings | {name: value for name, value in given.items() if value is not None}),
    )
    print(f"{options.output}: {len(rows)} rows, {options.output.stat().st_size / 1e6:.1f} MB")


def _recipe_settings(path: Path | None, stage: int | None) -> dict[str, Any]:
    """How a recipe's stage draws rows."""
    from smoltolk.training.config import load_recipe

    if path is None:
        if stage is not None:
            raise ValueError(f"--stage {stage} is that of a recipe: give --recipe too")
        return {}
    recipe = load_recipe(path)
    if stage is not None and not 1 <= stage <= len(recipe.stages):
        raise ValueError(f"--stage is {stage}: {path} has stages 1 to {len(recipe.stages)}")
    settings = recipe.stages[-1 if stage is None else stage - 1]
    return {
        "seed": recipe.seed,
        "row_tokens": settings.row_tokens,
        "mixture": settings.mixture.tasks,
        "policy": recipe.data.policy.make(),
        "predict_switch": recipe.model.predict_switch,
    }


def _import_authors(options: argparse.Namespace) -> None:
    from smoltolk.data.authors import import_authors
    from smoltolk.data.text import load_text_tokenizer

    summary = import_authors(
        options.source,
        options.output,
        speech_tokens=options.speech_tokens,
        text_tokens=options.text_tokens,
        speech_tokenizer=options.speech_tokenizer_card and _speech_card(options.speech_tokenizer_card),
        text_tokenizer=options.text_tokenizer and load_text_tokenizer(options.text_tokenizer),
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
    from smoltolk.speech.kinds import load_speech_tokenizer

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
