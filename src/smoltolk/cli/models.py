"""Commands for models: training, evaluation, generation, import and export, the demo."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
    train = commands.add_parser("train", help="run a training recipe, or go on with it")
    train.add_argument("recipe", type=Path, help="YAML recipe")
    train.add_argument("--no-progress", action="store_true", help="show no progress bar")
    train.set_defaults(run=_train)

    ablate = commands.add_parser("ablate", help="compare variants of a recipe, each with its own learning rate")
    ablate.add_argument("recipe", type=Path, help="YAML recipe with a section ablation")
    ablate.add_argument("--output", type=Path, required=True, help="folder of all runs and of the table")
    ablate.add_argument("--jobs", type=int, default=1, help="runs at a time; they are spread over the GPUs")
    ablate.add_argument("--table-only", action="store_true", help="write the table of what is done so far")
    ablate.set_defaults(run=_ablate)

    report = commands.add_parser("report", help="draw the curves of training runs side by side into one HTML page")
    report.add_argument("runs", type=Path, nargs="+", help="output folders of runs")
    report.add_argument("--output", type=Path, default=Path("report.html"))
    report.set_defaults(run=_report, resume_hint="stopped; nothing was written")

    scaling = commands.add_parser("scaling", help="fit loss and accuracy of runs against compute, with intervals")
    scaling.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="FOLDER or NAME=FOLDER; without NAME the architecture decides what belongs together",
    )
    scaling.add_argument("--output", type=Path, default=Path("scaling.html"), help="HTML page; JSON beside it")
    scaling.set_defaults(run=_scaling, resume_hint="stopped")

    plan = commands.add_parser("plan", help="say what a recipe needs: parameters, tokens, FLOPs, memory, hours")
    plan.add_argument("recipe", type=Path, help="YAML recipe")
    plan.add_argument("--gpus", type=int, default=1)
    plan.add_argument("--memory-gib", type=float, default=80.0, help="memory of a GPU")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    plan.add_argument("--peak-tflops", type=float, default=790.0, help="bf16 peak of a GPU, as H100s reach it")
    plan.add_argument("--lm-config", help="configuration of the text LM, where the backbone itself is not at hand")
    plan.set_defaults(run=_plan, resume_hint="stopped")

    evaluate = commands.add_parser("evaluate", help="score a benchmark, or a cloze task in all modality pairs")
    evaluate.add_argument("model", type=Path, help="folder of a trained model")
    evaluate.add_argument("items", type=Path, help="folder of a benchmark; Parquet, JSONL or CSV file of cloze items")
    evaluate.add_argument("--output", type=Path, required=True, help="folder for the results")
    evaluate.add_argument("--pairs", nargs="+", help="modality pairs, such as S→T or S-T; default: all there are")
    evaluate.add_argument("--task", help="which benchmark the folder is, such as sblimp; auto tells by its layout")
    evaluate.add_argument("--split", help="dev or test, where the folder holds both")
    evaluate.add_argument("--modality", help="speech, or text for the text twins of sWUGGY and sBLIMP")
    evaluate.add_argument("--protocol", help="how to score; default: the benchmark's usual one, continuation-mean")
    evaluate.add_argument(
        "--prefix-tokens",
        type=int,
        default=0,
        help="text tokens of another item before speech prompts in S→T; the authors' 10",
    )
    evaluate.add_argument("--prefix-seed", type=int, default=0, help="seed of the choice of the other item")
    evaluate.add_argument(
        "--truncate-prompts", action="store_true", help="cut the beginning of prompts that are too long, and count them"
    )
    evaluate.add_argument("--batch-size", type=int, default=48)
    evaluate.add_argument("--max-batch-tokens", type=int, default=16384)
    evaluate.add_argument("--autocast", action="store_true", help="compute in bfloat16 by autocast")
    evaluate.add_argument("--device", default="cpu")
    evaluate.set_defaults(run=_evaluate)

    text = commands.add_parser("text-tasks", help="compare models on lm-evaluation-harness tasks: is text retained")
    text.add_argument("before", type=Path, help="folder of the text LM, or of a model, before training")
    text.add_argument("after", type=Path, nargs="+", help="folders of models after training")
    text.add_argument(
        "--tasks", nargs="+", required=True, help="names of the harness's tasks or groups, or of own ones"
    )
    text.add_argument("--output", type=Path, required=True, help="folder for the report")
    text.add_argument("--include-path", type=Path, help="folder with tasks of one's own, in YAML")
    text.add_argument("--num-fewshot", type=int, help="examples in a prompt; default: as the task says")
    text.add_argument("--limit", type=int, help="only so many documents of each task")
    text.add_argument("--batch-size", type=int, default=48)
    text.add_argument("--max-batch-tokens", type=int, default=16384)
    text.add_argument("--autocast", action="store_true", help="compute in bfloat16 by autocast")
    text.add_argument("--device", default="cpu")
    text.set_defaults(run=_text_tasks)

    # No character begins an option here, so that all of them reach the harness.
    harness = commands.add_parser(
        "lm-eval",
        help="lm-evaluation-harness's own command, which knows --model smoltolk",
        prefix_chars="\0",
        add_help=False,
    )
    harness.add_argument("arguments", nargs="*", help="arguments of lm_eval")
    harness.set_defaults(run=_lm_eval, resume_hint="stopped")

    compare = commands.add_parser("compare", help="compare two results on the same items, with error bars")
    compare.add_argument("ours", type=Path, help="folder of a result")
    compare.add_argument("theirs", type=Path, help="folder of the result to subtract")
    compare.set_defaults(run=_compare, resume_hint="stopped")

    leaderboard = commands.add_parser("leaderboard", help="print results beside published ones")
    leaderboard.add_argument("results", type=Path, nargs="*", help="folders of results")
    leaderboard.set_defaults(run=_leaderboard, resume_hint="stopped")

    analyze = commands.add_parser("analyze", help="look into models: layer selector, shared space, abstraction, lens")
    analyze.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="FOLDER, NAME=FOLDER or NAME=FOLDER@STORE; a NAME given again is another seed, the first is the baseline",
    )
    analyze.add_argument("--store", type=Path, help="utterances with text, speech and word times, for all models")
    analyze.add_argument("--output", type=Path, default=Path("analysis.html"), help="HTML page; JSON beside it")
    analyze.add_argument("--utterances", type=int, default=200)
    analyze.add_argument("--words-per-piece", type=int, help="cut utterances every so many words; default: not at all")
    analyze.add_argument("--max-words", type=int, default=2000, help="most words whose states are kept")
    analyze.add_argument("--dimensions", type=int, default=10, help="of the subspaces that are compared")
    analyze.add_argument("--probe-words", type=int, default=50, help="different words the probe tells apart")
    spans = {"type": int, "nargs": 2, "metavar": ("FEWEST", "MOST")}
    analyze.add_argument("--text-words", default=(10, 31), help="text runs in the selector's rows", **spans)
    analyze.add_argument("--speech-words", default=(5, 16), help="speech runs in the selector's rows", **spans)
    analyze.add_argument("--split", default="validation")
    analyze.add_argument("--seed", type=int, default=0)
    analyze.add_argument("--batch-size", type=int, default=16)
    analyze.add_argument("--device", default="cpu")
    analyze.add_argument("--no-progress", action="store_true", help="show no progress bar")
    analyze.set_defaults(run=_analyze)

    continuing = commands.add_parser("evaluate-generation", help="continue prompts and measure what comes of it")
    continuing.add_argument("model", type=Path, help="folder of a trained model")
    continuing.add_argument("prompts", type=Path, help="JSONL or CSV manifest of prompts, or cloze items")
    continuing.add_argument("--to", choices=("text", "speech"), required=True)
    continuing.add_argument("--from", dest="modality", choices=("text", "speech"), help="where prompts have both")
    continuing.add_argument("--output", type=Path, required=True, help="folder of the continuations and the result")
    continuing.add_argument("--asr", help="folder or name of a Whisper or CTC model that hears the speech")
    continuing.add_argument("--language", help='what is spoken, such as "en", for recognisers of many languages')
    continuing.add_argument("--lm", help="folder or name of a text LM that scores the words")
    continuing.add_argument("--max-new-tokens", type=int, default=256)
    continuing.add_argument("--temperature", type=float, default=0.8, help="0 for the best token at each step")
    continuing.add_argument("--top-k", type=int, default=0)
    continuing.add_argument("--top-p", type=float, default=1.0)
    continuing.add_argument("--seed", type=int, default=0)
    continuing.add_argument("--samples", type=int, default=1, help="continuations of each prompt")
    continuing.add_argument("--no-audio", action="store_true", help="write no WAV files")
    continuing.add_argument("--device", default="cpu")
    continuing.set_defaults(run=_evaluate_generation)

    generate = commands.add_parser("generate", help="continue a prompt of text and audio")
    generate.add_argument("model", type=Path, help="folder of a trained model")
    generate.add_argument("--text", dest="prompt", action=_PromptPart, help="a part of the prompt; in order")
    generate.add_argument("--audio", dest="prompt", action=_PromptPart, type=Path, help="a part of the prompt")
    generate.add_argument("--to", choices=("text", "speech"), required=True)
    generate.add_argument("--output", type=Path, help="WAV file for speech")
    generate.add_argument("--stream", action="store_true", help="print text while it comes")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 for the best token at each step")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--device", default="cpu")
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
    export.add_argument("--results", type=Path, nargs="+", default=[], help="result.json of evaluations of the model")
    export.add_argument("--license", help="licence of the weights; none is stated by default")
    export.set_defaults(run=_export, resume_hint="stopped; nothing was written")

    demo = commands.add_parser("demo", help="the whole story in miniature, with a report")
    demo.add_argument("--output", type=Path, default=Path("demo-run"))
    demo.add_argument("--seeds", type=int, default=1, help="repeat everything with so many seeds")
    demo.add_argument("--quick", action="store_true", help="a smoke run of about a minute")
    demo.add_argument("--data-only", action="store_true", help="make the data, and a recipe for smoltolk ablate")
    demo.set_defaults(run=_demo)


class _PromptPart(argparse.Action):
    """Collects texts and audio files in the order they are given."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


def _train(options: argparse.Namespace) -> None:
    from smoltolk.training.config import load_recipe
    from smoltolk.training.trainer import Trainer

    print(f"trained model: {Trainer(load_recipe(options.recipe), progress=not options.no_progress).run()}")


def _ablate(options: argparse.Namespace) -> None:
    from smoltolk.experiments.ablation import load_ablation
    from smoltolk.experiments.schedule import agree, run_ablation
    from smoltolk.experiments.table import write_tables

    ablation = load_ablation(options.recipe)
    if options.table_only:
        agree(ablation, options.output, is_running=False)
    else:
        run_ablation(ablation, options.output, jobs=options.jobs)
    path, tables = write_tables(ablation, options.output)
    for table in tables:
        _print_wide(table)
    print(path)


def _report(options: argparse.Namespace) -> None:
    from smoltolk.training.report import write_report

    print(write_report(options.runs, options.output))


def _scaling(options: argparse.Namespace) -> None:
    from smoltolk.experiments.scaling import compare_scaling
    from smoltolk.experiments.scaling_page import tables, write_page

    scaling = compare_scaling(options.runs)
    for found in tables(scaling):
        table = Table(*map(escape, found.columns), title=found.caption)
        for row in found.rows:
            table.add_row(*map(escape, row))
        _print_wide(table)
    for note in scaling.notes:
        print(f"note: {note}")
    print(write_page(scaling, options.output))


def _plan(options: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from smoltolk.training.config import load_recipe
    from smoltolk.training.plan import GIB, make_plan

    lm_config = None if options.lm_config is None else AutoConfig.from_pretrained(options.lm_config)
    plan = make_plan(
        load_recipe(options.recipe),
        gpus=options.gpus,
        memory_gib=options.memory_gib,
        mfu=options.mfu,
        peak_tflops=options.peak_tflops,
        lm_config=lm_config,
    )
    for part, count in (plan.parts | {"all": sum(plan.parts.values())}).items():
        print(f"{part:<20}{count:>16,} parameters")
    units = f"{plan.num_units} units" + (" (the paper's: no store is there yet)" if plan.is_assumed else "")
    print(f"{units}; {options.gpus} GPUs of {options.memory_gib:g} GiB, {100 * options.mfu:g} % MFU")
    columns = ("stage", "trained", "frozen", "tokens/step", "steps", "tokens", "FLOPs", "GiB per GPU", "hours")
    table = Table(*columns)
    for number, stage in enumerate(plan.stages, start=1):
        row = (f"{stage.trained:,}", f"{stage.frozen:,}", f"{stage.tokens_per_step:,}", f"{stage.steps:,}")
        more = (f"{stage.tokens:.3g}", f"{stage.flops:.3g}", f"{stage.memory_bytes / GIB:.1f}", f"{stage.hours:.2f}")
        table.add_row(str(number), *row, *more)
    Console().print(table)


def _evaluate(options: argparse.Namespace) -> None:
    from rich.progress import Progress

    from smoltolk.evaluation.benchmarks.reading import open_benchmark
    from smoltolk.evaluation.pairs import score_task
    from smoltolk.evaluation.protocols import CONTINUATION, find_protocol
    from smoltolk.evaluation.results import cells
    from smoltolk.evaluation.scoring import ScoringSettings
    from smoltolk.evaluation.tasks import cloze_task, load_cloze
    from smoltolk.generation.pipeline import SmolTolkPipeline
    from smoltolk.model.fingerprint import checkpoint_fingerprint

    named = None if options.protocol is None else find_protocol(options.protocol)
    prefix = {"num_prefix_tokens": options.prefix_tokens, "prefix_seed": options.prefix_seed}
    settings = ScoringSettings(
        batch_size=options.batch_size,
        max_batch_tokens=options.max_batch_tokens,
        autocast=options.autocast,
        truncates_prompts=options.truncate_prompts,
    )
    pairs = options.pairs and [pair.replace("-", "→") for pair in options.pairs]
    chosen = {key: getattr(options, key) for key in ("task", "split", "modality")}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    benchmark = open_benchmark(options.items, pairs=pairs, **chosen) if options.items.is_dir() else None
    if benchmark is None and chosen:
        key, value = next(iter(chosen.items()))
        raise ValueError(f"--{key} is {value}, but {options.items} is no folder of a benchmark: leave it out")
    pipeline = SmolTolkPipeline.from_pretrained(options.model, device=options.device)
    checkpoint = checkpoint_fingerprint(options.model)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        files = None if benchmark is None else len(benchmark.audio_files())
        encoding = bar.add_task("audio files tokenized", total=files, visible=False)  # until there is one

        def tokenized(count: int) -> None:
            bar.update(encoding, advance=count, visible=True)

        if benchmark is None:
            protocol = replace(named or CONTINUATION, **prefix)
            items = load_cloze(options.items, pipeline.speech_tokenizer, tokenized=tokenized)
            task = cloze_task(pipeline.model, items, pipeline.text_ids, pairs=pairs, protocol=protocol)
            total = 2 * len(items) * len({average.group for average in task.averages})
        else:
            protocol = replace(named or benchmark.protocol, **prefix)
            task = benchmark.task(pipeline, pairs=pairs, protocol=protocol, tokenized=tokenized)
            total = benchmark.num_sequences(pairs)
        scored = bar.add_task("sequences scored", total=total)
        result = score_task(
            pipeline.model,
            task,
            protocol=protocol,
            settings=settings,
            folder=options.output,
            checkpoint=checkpoint,
            progress=lambda count: bar.advance(scored, count),
        )
    path = result.save(options.output, items=str(options.items), checkpoint=checkpoint)
    columns = ("group", "name", "n", "accuracy %", "standard error", "95 % interval", "ties")
    about = " ".join(filter(None, (result.task, result.split)))
    table = Table(*columns, title=f"{about}: {protocol.name}, {result.precision}")
    for group, names in result.summary().items():
        for name, accuracy in names.items():
            table.add_row(group, name, *cells(accuracy))
    Console().print(table)
    if result.num_truncated:
        print(f"{result.num_truncated} of {len(result.table)} prompts were cut")
    if benchmark is not None and (submission := benchmark.write_submission(options.output / "submission", result)):
        print(submission)
    print(path)


def _analyze(options: argparse.Namespace) -> None:
    from smoltolk.analysis.analyze import AnalysisSettings, Subject, compare
    from smoltolk.analysis.page import write_page

    settings = AnalysisSettings(
        utterances=options.utterances,
        words_per_piece=options.words_per_piece,
        max_words=options.max_words,
        dimensions=options.dimensions,
        probe_words=options.probe_words,
        text_words=tuple(options.text_words),
        speech_words=tuple(options.speech_words),
        split=options.split,
        seed=options.seed,
    )
    comparison = compare(
        [Subject.parse(model, options.store) for model in options.models],
        settings,
        options.output.with_suffix(".models"),
        device=options.device,
        batch_size=options.batch_size,
        progress=not options.no_progress,
    )
    print(write_page(comparison, options.output))


def _text_tasks(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.scoring import ScoringSettings
    from smoltolk.evaluation.text_tasks import COLUMNS, MARKDOWN_FILE, TextTaskSettings, cells, evaluate_text_tasks

    settings = TextTaskSettings(
        tasks=tuple(options.tasks),
        include_path=options.include_path,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        scoring=ScoringSettings(
            batch_size=options.batch_size, max_batch_tokens=options.max_batch_tokens, autocast=options.autocast
        ),
    )
    console = Console(stderr=True)
    changes = evaluate_text_tasks(
        [options.before, *options.after], settings, options.output, device=options.device, progress=console.print
    )
    for model in options.after:
        table = Table(*COLUMNS, title=f"{options.before} → {model}")
        for change in changes:
            if change.model == str(model):
                table.add_row(*cells(change))
        _print_wide(table)
    print(options.output / MARKDOWN_FILE)


def _lm_eval(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.harness import run_lm_eval

    run_lm_eval(options.arguments)


def _compare(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.comparison import compare

    comparison = compare(options.ours, options.theirs)
    columns = ("group", "name", "items", "couples", "ours %", "theirs %", "difference", "95 % interval", "p", "test")
    table = Table(*columns)
    for d in comparison.differences:
        shares = (f"{100 * d.ours:.1f}", f"{100 * d.theirs:.1f}", f"{100 * d.mean:+.1f}")
        interval = f"{100 * d.low:+.1f} … {100 * d.high:+.1f}"
        table.add_row(
            d.group, d.name, str(d.num_items), str(d.num_couples), *shares, interval, f"{d.p_value:.2g}", d.test
        )
    _print_wide(table)
    for note in comparison.notes:
        print(f"note: {note}")


def _leaderboard(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.leaderboard import UNKNOWN, make_leaderboard

    board = make_leaderboard(options.results)
    table = Table("model", "size", "tokens", *board.columns, "protocol", "source", title="accuracy %")
    for row in board.rows:
        scores = [row.scores.get(column, UNKNOWN) for column in board.columns]
        table.add_row(row.model, row.size, row.tokens, *scores, row.protocol, row.source)
    _print_wide(table)
    if board.others:
        more = Table(
            "result", "task", "group", "name", "n", "accuracy %", "protocol", title="without a published number"
        )
        for cells in board.others:
            more.add_row(*cells)
        _print_wide(more)


def _print_wide(table: Table) -> None:
    """Prints a table; in a file nothing has to be folded."""
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def _evaluate_generation(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.generation import Sampling, TextScorer, evaluate_generation, load_prompts
    from smoltolk.generation.pipeline import SmolTolkPipeline
    from smoltolk.model.fingerprint import checkpoint_fingerprint
    from smoltolk.speech.asr import Transcriber

    names = ("to", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "samples")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    if options.language is not None and options.asr is None:
        raise ValueError(f"language is {options.language!r}, but there is no recogniser: give --asr, or leave it out")
    pipeline = SmolTolkPipeline.from_pretrained(options.model, device=options.device)
    prompts = load_prompts(options.prompts, pipeline.speech_tokenizer, modality=options.modality)
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task("continue prompts", total=len(prompts) * sampling.samples)
        result = evaluate_generation(
            pipeline,
            prompts,
            options.output,
            sampling,
            transcriber=options.asr and Transcriber(options.asr, device=options.device, language=options.language),
            scorer=options.lm and TextScorer(options.lm, device=options.device),
            keep_audio=not options.no_audio,
            record={
                "checkpoint": checkpoint_fingerprint(options.model),
                "asr": options.asr,
                "language": options.language,
                "lm": options.lm,
            },
            progress=lambda done: bars.advance(task, done),
        )
    Console().print(_generation_table(result))
    print(options.output / "result.json")


def _generation_table(result: dict[str, Any]) -> Table:
    """The metrics that there are, one in a row."""
    table = Table("metric", "n", "value", "95 % interval", title=result["protocol"])
    diversity = result["diversity"] or {"without_words": 0}
    rows = {name: result[name] for name in ("empty", "never_ending", "units_per_second", "words_per_second")}
    rows |= {name: diversity[name] for name in diversity if name != "without_words"}
    rows |= {name: result[name] for name in ("word_error_rate", "generative_perplexity")}
    for name, found in rows.items():
        if found is None:
            continue
        value = next((found[key] for key in ("mean", "value", "rate", "perplexity") if key in found), None)
        low_high = "–" if found["interval"] is None else "{:.4g} … {:.4g}".format(*found["interval"])
        n = found.get("n", found.get("num_words", found.get("nll", {}).get("n")))
        table.add_row(name, str(n), "–" if value is None else f"{value:.4g}", low_high)
    return table


def _generate(options: argparse.Namespace) -> None:
    from smoltolk.generation.pipeline import SmolTolkPipeline

    if options.to == "speech" and options.output is None:
        raise ValueError("--to speech needs --output, the WAV file to write")
    pipeline = SmolTolkPipeline.from_pretrained(options.model, device=options.device)
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
    elif pipeline.vocoder is None:
        raise ValueError(f"{options.model} was kept without a vocoder: units cannot become audio")
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
        recipe = make_ablation_data(options.output, seeds=options.seeds, quick=options.quick)
        print(f"data made; to go on: smoltolk ablate {recipe} --output {options.output / 'ablation'}")
        return
    report = run_demo(options.output, seeds=options.seeds, quick=options.quick)
    print(f"report: {report}")
