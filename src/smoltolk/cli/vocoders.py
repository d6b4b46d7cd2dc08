"""Commands for vocoders and resynthesis."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from smoltolk.terminal import progress_bar


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    _add_vocoder(commands)
    _add_resynthesize(commands)


def _add_vocoder(commands: Any) -> None:
    vocoder = commands.add_parser("vocoder", help="vocoders: fit, import, mimi")
    actions = vocoder.add_subparsers(dest="action", metavar="ACTION", required=True)

    fit = actions.add_parser("fit", help="train a decoder for your own units and voice, in minutes")
    fit.add_argument("audio", type=Path, nargs="+", help="recordings of one voice: files, folders or manifests")
    fit.add_argument("--kind", choices=("mel",), default="mel", help="kind of vocoder; mel: log-mel and Griffin-Lim")
    fit.add_argument("--max-minutes", type=float, default=30.0, help="use at most so much audio")
    fit.add_argument("--steps", type=int, default=300, help="training steps")
    fit.add_argument("--seed", type=int, default=0)
    fit.set_defaults(run=_fit_vocoder)

    importing = actions.add_parser("import", help="make a vocoder of a published unit HiFi-GAN")
    importing.add_argument("--config", type=Path, required=True, help="its config.json")
    importing.add_argument("--checkpoint", type=Path, required=True, help="its weights, such as g_00500000")
    importing.add_argument("--speaker", type=int, help="which voice, where it has several")
    importing.add_argument("--style", type=int, help="which style, where it has several")
    importing.set_defaults(run=_import_vocoder)

    mimi = actions.add_parser("mimi", help="make a vocoder of the decoder of Mimi")
    mimi.add_argument("--model", help="folder or name of the Mimi; default: the one in the tokenizer's folder")
    mimi.set_defaults(run=_make_mimi_vocoder)

    for action in (fit, importing, mimi):
        action.add_argument("--tokenizer", type=Path, required=True, help="folder of the speech tokenizer")
        action.add_argument("--output", type=Path, required=True, help="folder of the new vocoder")
        action.set_defaults(resume_hint="stopped; nothing was written")


def _add_resynthesize(commands: Any) -> None:
    resynthesize = commands.add_parser("resynthesize", help="audio to units and back; with a recogniser, its errors")
    resynthesize.add_argument("source", type=Path, help="an audio file, a folder of them, or a manifest")
    resynthesize.add_argument("output", type=Path, help="WAV file; for a folder or a manifest, a folder")
    resynthesize.add_argument("--tokenizer", type=Path, required=True, help="folder of the speech tokenizer")
    resynthesize.add_argument("--vocoder", type=Path, required=True, help="folder of its vocoder")
    resynthesize.add_argument(
        "--predict-durations", action="store_true", help="let the vocoder predict how long each unit lasts"
    )
    resynthesize.add_argument("--asr", help="folder or name of a Whisper or CTC model: count word errors")
    resynthesize.add_argument("--language", help='what is spoken, such as "en", for recognisers of many languages')
    resynthesize.add_argument(
        "--text", type=Path, help="text file with what is said in a single audio file; default: the .txt beside it"
    )
    resynthesize.add_argument("--device", default="cpu")
    resynthesize.set_defaults(run=_resynthesize, resume_hint="stopped; the audio files written so far are whole")


def _fit_vocoder(options: argparse.Namespace) -> None:
    from smoltolk.data.recordings import find_recordings, fit_mel_vocoder
    from smoltolk.model.export import new_folder
    from smoltolk.speech.kinds import load_speech_tokenizer

    tokenizer = load_speech_tokenizer(options.tokenizer)
    with new_folder(options.output) as folder, progress_bar() as bars:
        encoding = bars.add_task("encode, s of audio", total=60 * options.max_minutes)
        training = bars.add_task("train, steps", total=options.steps)
        fitted = fit_mel_vocoder(
            find_recordings(options.audio),
            tokenizer,
            max_seconds=60 * options.max_minutes,
            steps=options.steps,
            seed=options.seed,
            encoding=lambda seconds: bars.advance(encoding, seconds),
            progress=lambda done: bars.advance(training, done),
        )
        bars.update(encoding, total=fitted.seconds, completed=fitted.seconds)
        fitted.vocoder.save(folder)
    for path, reason in fitted.failed:
        print(f"left out {path}: {reason}", file=sys.stderr)
    print(
        f"{options.output}: trained on {fitted.seconds / 60:.1f} minutes in {fitted.num_files} files, "
        f"{len(fitted.failed)} left out as unusable"
    )


def _import_vocoder(options: argparse.Namespace) -> None:
    from smoltolk.model.export import new_folder
    from smoltolk.speech.hifigan import import_unit_hifigan
    from smoltolk.speech.kinds import load_speech_tokenizer

    with new_folder(options.output) as folder:
        vocoder = import_unit_hifigan(
            options.config,
            options.checkpoint,
            load_speech_tokenizer(options.tokenizer),
            speaker=options.speaker,
            style=options.style,
        )
        vocoder.save(folder)
    durations = "predicts durations" if vocoder.settings.duration_dim else "predicts no durations"
    print(f"{options.output}: {vocoder.num_units} units to audio at {vocoder.sample_rate_hz} Hz, {durations}")


def _make_mimi_vocoder(options: argparse.Namespace) -> None:
    from smoltolk.model.export import new_folder
    from smoltolk.speech.kinds import load_speech_tokenizer
    from smoltolk.speech.mimi_vocoder import MimiVocoder

    with new_folder(options.output) as folder:
        model = options.model or options.tokenizer / "model"
        vocoder = MimiVocoder.from_pretrained(model, load_speech_tokenizer(options.tokenizer))
        vocoder.save(folder)
    print(f"{options.output}: {vocoder.num_units} units to audio at {vocoder.sample_rate_hz} Hz")


def _resynthesize(options: argparse.Namespace) -> None:
    from smoltolk.data.recordings import find_recordings
    from smoltolk.speech.asr import Transcriber
    from smoltolk.speech.audio import check_output, write_atomically
    from smoltolk.speech.kinds import load_speech_tokenizer, load_vocoder
    from smoltolk.speech.resynthesis import resynthesize_files

    recordings = find_recordings([options.source])
    folder = options.output
    is_single = not options.source.is_dir() and options.source.suffix not in (".jsonl", ".csv")
    if is_single:
        if options.output.suffix != ".wav":
            raise ValueError(f"output is {options.output}: give the name of a .wav file for a single recording")
        text = recordings[0].text if options.text is None else options.text.read_text(encoding="utf-8")
        recordings = [replace(recordings[0], name=options.output.name, text=text)]
        folder = options.output.parent
    elif options.output.resolve().is_relative_to(options.source.resolve()):
        raise ValueError(f"output {options.output} is in {options.source}: give a folder outside of it")
    elif options.text is not None:
        raise ValueError(f"text is {options.text}: it is for a single recording; give texts beside the files")
    if options.language is not None and options.asr is None:
        raise ValueError(f"language is {options.language!r}, but there is no recogniser: give --asr, or leave it out")
    check_output(folder, is_folder=True)
    tokenizer = load_speech_tokenizer(options.tokenizer)
    with progress_bar() as bars:
        task = bars.add_task("resynthesize, files", total=len(recordings))
        results = resynthesize_files(
            recordings,
            folder,
            tokenizer,
            load_vocoder(options.vocoder, tokenizer, device=options.device),
            transcriber=options.asr and Transcriber(options.asr, device=options.device, language=options.language),
            with_durations=not options.predict_durations,
            progress=lambda done: bars.advance(task, done),
        )
    results |= {"asr": options.asr}
    if not is_single:
        written = folder / "resynthesis.json"
        write_atomically(written, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
        counts = {"files": len(results["files"]), "failed": len(results["failed"]), "written": str(written)}
        results |= counts
    print(json.dumps(results, indent=2, ensure_ascii=False))
