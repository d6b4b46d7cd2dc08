"""Commands of evaluation and analysis."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from smoltolk.terminal import error_console, print_table, progress_bar


def add_commands(commands: Any) -> None:
    """Adds the commands of this part to the subparsers of the command line."""
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


def _evaluate(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.benchmarks.reading import open_benchmark
    from smoltolk.evaluation.pairs import score_task
    from smoltolk.evaluation.protocols import CONTINUATION, find_protocol
    from smoltolk.evaluation.results import cells
    from smoltolk.evaluation.scoring import ScoringSettings
    from smoltolk.evaluation.tasks import cloze_task, load_cloze
    from smoltolk.generation.pipeline import SmolTolkPipeline
    from smoltolk.model.fingerprint import checkpoint_fingerprint
    from smoltolk.speech.audio import check_output

    check_output(options.output, is_folder=True)
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
    with progress_bar(transient=True) as bar:
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
    print_table(table)
    if result.num_truncated:
        print(f"{result.num_truncated} of {len(result.table)} prompts were cut")
    if benchmark is not None and (submission := benchmark.write_submission(options.output / "submission", result)):
        print(submission)
    print(path)


def _analyze(options: argparse.Namespace) -> None:
    from smoltolk.analysis.analyze import AnalysisSettings, Subject, compare
    from smoltolk.analysis.page import write_page
    from smoltolk.pages import check_page

    check_page(options.output)
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
    changes = evaluate_text_tasks(
        [options.before, *options.after],
        settings,
        options.output,
        device=options.device,
        progress=error_console().print,
    )
    for model in options.after:
        table = Table(*COLUMNS, title=f"{options.before} → {model}")
        for change in changes:
            if change.model == str(model):
                table.add_row(*cells(change))
        print_table(table)
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
    print_table(table)
    for note in comparison.notes:
        print(f"note: {note}")


def _leaderboard(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.leaderboard import UNKNOWN, make_leaderboard

    board = make_leaderboard(options.results)
    table = Table("model", "size", "tokens", *board.columns, "protocol", "source", title="accuracy %")
    for row in board.rows:
        scores = [row.scores.get(column, UNKNOWN) for column in board.columns]
        table.add_row(row.model, row.size, row.tokens, *scores, row.protocol, row.source)
    print_table(table)
    if board.others:
        more = Table(
            "result", "task", "group", "name", "n", "accuracy %", "protocol", title="without a published number"
        )
        for cells in board.others:
            more.add_row(*cells)
        print_table(more)


def _evaluate_generation(options: argparse.Namespace) -> None:
    from smoltolk.evaluation.generation import Sampling, TextScorer, evaluate_generation, load_prompts
    from smoltolk.generation.pipeline import SmolTolkPipeline
    from smoltolk.model.fingerprint import checkpoint_fingerprint
    from smoltolk.speech.asr import Transcriber
    from smoltolk.speech.audio import check_output

    check_output(options.output, is_folder=True)
    names = ("to", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "samples")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    if options.language is not None and options.asr is None:
        raise ValueError(f"language is {options.language!r}, but there is no recogniser: give --asr, or leave it out")
    pipeline = SmolTolkPipeline.from_pretrained(options.model, device=options.device)
    prompts = load_prompts(options.prompts, pipeline.speech_tokenizer, modality=options.modality)
    with progress_bar() as bars:
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
    print_table(_generation_table(result))
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
