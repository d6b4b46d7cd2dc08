"""Commands of models: generate, import, export; and the demo."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    generate = commands.add_parser("generate", help="continue a prompt of text and audio")
    generate.add_argument("model", type=Path, help="folder of a trained model")
    generate.add_argument(
        "--text",
        dest="prompt",
        action=_PromptPart,
        metavar="TEXT",
        help="a part of the prompt; may be repeated, parts are read in the order given",
    )
    generate.add_argument(
        "--audio", dest="prompt", action=_PromptPart, type=Path, metavar="FILE", help="the same, of speech"
    )
    generate.add_argument("--to", choices=("text", "speech"), required=True, help="what to say it in")
    generate.add_argument("--output", type=Path, help="WAV file to write, with --to speech")
    generate.add_argument("--stream", action="store_true", help="print text while it comes")
    generate.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest continuation, in text tokens or units; default: 128"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="default: 0.8; 0 for the best token at each step"
    )
    generate.add_argument("--top-k", type=int, default=0, help="sample from so many best tokens; default: all")
    generate.add_argument("--seed", type=int, default=0, help="another one, another continuation")
    generate.add_argument("--speech-tokenizer", type=Path, help="default: the one that was kept with the model")
    generate.add_argument("--vocoder", type=Path, help="default: the one that was kept with the model")
    generate.add_argument("--device", default="cpu", help="such as cuda, or auto; default: cpu")
    generate.set_defaults(run=_generate, resume_hint="stopped")

    importing = commands.add_parser("import-checkpoint", help="make a model folder from a checkpoint of the authors")
    importing.add_argument("source", type=Path, help="checkpoint file of the authors' code")
    importing.add_argument("output", type=Path, help="folder to make")
    importing.add_argument(
        "--lm-config", help="configuration of the text LM: file, folder or name; default: as it says"
    )
    importing.set_defaults(run=_import_checkpoint, resume_hint="stopped; nothing was written")

    export = commands.add_parser("export", help="make a folder to share from a model: code, safetensors, card")
    export.add_argument("model", type=Path, help="folder of a trained or imported model")
    export.add_argument("output", type=Path, help="folder to make")
    export.add_argument(
        "--results", type=Path, nargs="+", default=[], help="result folders of evaluations of the model"
    )
    export.add_argument("--license", help="licence of the weights; none is stated by default")
    export.set_defaults(run=_export, resume_hint="stopped; nothing was written")

    demo = commands.add_parser("demo", help="the whole story in miniature, with a report")
    demo.add_argument("--output", type=Path, default=Path("demo-run"))
    demo.add_argument("--seeds", type=int, default=1, help="repeat everything with so many seeds")
    demo.add_argument("--quick", action="store_true", help="a smoke run of about a minute")
    demo.add_argument("--data-only", action="store_true", help="make the data, and a recipe for smoltolk ablate")
    demo.add_argument("--width", type=int, help="with --data-only: width of the text LM")
    demo.add_argument("--layers", type=int, help="with --data-only: layers of the text LM")
    demo.add_argument("--device", help="with --data-only: where to train the text LM, and the models of the recipe")
    demo.set_defaults(run=_demo)


class _PromptPart(argparse.Action):
    """Collects texts and audio files in the order they are given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


def _generate(options: argparse.Namespace) -> None:
    from smoltolk.generation.pipeline import SmolTolkPipeline
    from smoltolk.speech.audio import check_output

    if options.to == "speech" and options.output is None:
        raise ValueError("--to speech needs --output, the WAV file to write")
    if options.to == "text" and options.output is not None:
        raise ValueError(f"--output is {options.output}, but --to text prints the text: leave --output out")
    if options.output is not None:
        if options.output.suffix.lower() != ".wav":
            raise ValueError(f"--output is {options.output}, but what is written is WAV: give a name that ends in .wav")
        check_output(options.output)
    pipeline = SmolTolkPipeline.from_pretrained(
        options.model, options.device, speech_tokenizer=options.speech_tokenizer, vocoder=options.vocoder
    )
    if options.to == "speech" and pipeline.vocoder is None:
        raise ValueError(
            f"{options.model} was kept without a vocoder, so units cannot become audio: give --vocoder, one of its "
            "speech tokenizer"
        )
    sampling = {
        "to": options.to,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "seed": options.seed,
    }
    if options.stream:
        if options.to != "text":
            raise ValueError("--stream prints text as it comes: give --to text, or leave it out")
        for piece in pipeline.stream(options.prompt or [], **sampling):
            print(piece.text, end="", flush=True)
        print()
        return
    continuation = pipeline(options.prompt or [], **sampling)
    if continuation.text is not None:
        print(continuation.text)
    elif continuation.audio is not None:
        continuation.save(options.output)
        print(options.output)
    else:
        raise ValueError("the model ended at once and said nothing: try another --seed or prompt")


def _import_checkpoint(options: argparse.Namespace) -> None:
    from smoltolk.model.card import describe, parameter_counts
    from smoltolk.model.checkpoints import import_checkpoint
    from smoltolk.model.export import new_folder

    with new_folder(options.output) as folder:
        model = import_checkpoint(options.source, options.lm_config)
        model.save_pretrained(folder)
    print(f"{options.output}: {describe(model.config)}")  # type: ignore[arg-type]
    print(f"{model.ids.num_units} units, {model.ids.text_vocab_size} text tokens, {model.dtype}")
    for part, count in parameter_counts(model).items():
        print(f"{part}: {count:,} parameters")


def _export(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.results import read_result
    from smoltolk.model.export import export_model
    from smoltolk.model.fingerprint import checkpoint_fingerprint

    checkpoint = checkpoint_fingerprint(options.model) if options.results else ""
    results = [read_result(path, checkpoint) for path in options.results]
    print(export_model(options.model, options.output, results=results, license=options.license))


def _demo(options: argparse.Namespace) -> None:
    from smoltolk.demo.run import make_ablation_data, run_demo

    if options.data_only:
        recipe = make_ablation_data(
            options.output,
            seeds=options.seeds,
            quick=options.quick,
            width=options.width,
            layers=options.layers,
            device=options.device or "cpu",
        )
        print(f"data made; to go on: smoltolk ablate {recipe} --output {options.output / 'ablation'}")
        return
    if (options.width, options.layers, options.device) != (None, None, None):
        raise ValueError("--width, --layers and --device belong to --data-only: add it, or leave them out")
    report = run_demo(options.output, seeds=options.seeds, quick=options.quick)
    print(f"report: {report}")
