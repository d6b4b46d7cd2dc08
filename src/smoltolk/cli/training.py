"""Commands of training: train, ablate, report, scaling, plan."""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from smoltolk.terminal import print_table


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
    report.add_argument("--output", type=Path, default=Path("report.html"), help="HTML page; default: report.html")
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
    plan.add_argument("--gpus", type=int, default=1, help="how many share the work; default: 1")
    plan.add_argument("--memory-gib", type=float, default=80.0, help="memory of a GPU; default: 80")
    plan.add_argument("--mfu", type=float, default=0.3, help="share of the peak that training reaches; default: 0.3")
    plan.add_argument("--peak-tflops", type=float, help="bf16 peak of a GPU; default: the recipe's, or an H100's 989.5")
    plan.add_argument("--lm-config", help="configuration of the text LM, where the backbone itself is not at hand")
    plan.set_defaults(run=_plan, resume_hint="stopped")


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
        print_table(table)
    print(path)


def _report(options: argparse.Namespace) -> None:
    from smoltolk.training.report import write_report

    print(write_report(options.runs, options.output))


def _scaling(options: argparse.Namespace) -> None:
    from smoltolk.experiments.scaling import compare_scaling
    from smoltolk.experiments.scaling_page import tables, write_page
    from smoltolk.pages import check_page

    check_page(options.output)
    scaling = compare_scaling(options.runs)
    for found in tables(scaling):
        table = Table(*found.columns, title=found.caption)
        for row in found.rows:
            table.add_row(*row)
        print_table(table)
    for note in scaling.notes:
        print(f"note: {note}")
    print(write_page(scaling, options.output))


def _plan(options: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from smoltolk.training.config import load_recipe
    from smoltolk.training.plan import GIB, make_plan, peak_of

    lm_config = None if options.lm_config is None else AutoConfig.from_pretrained(options.lm_config)
    recipe = load_recipe(options.recipe)
    plan = make_plan(
        recipe,
        gpus=options.gpus,
        memory_gib=options.memory_gib,
        mfu=options.mfu,
        peak_tflops=options.peak_tflops,
        lm_config=lm_config,
    )
    for part, count in (plan.parts | {"all": sum(plan.parts.values())}).items():
        print(f"{part:<20}{count:>16,} parameters")
    units = f"{plan.num_units} units" + (" (the paper's: no store is there yet)" if plan.is_assumed else "")
    speed = f"{100 * options.mfu:g} % MFU of {peak_of(recipe, options.peak_tflops):g} TFLOP/s"
    print(f"{units}; {options.gpus} GPUs of {options.memory_gib:g} GiB, {speed}")
    columns = ("stage", "trained", "frozen", "tokens/step", "steps", "tokens", "FLOPs", "GiB per GPU", "hours")
    table = Table(*columns)
    for number, stage in enumerate(plan.stages, start=1):
        row = (f"{stage.trained:,}", f"{stage.frozen:,}", f"{stage.tokens_per_step:,}", f"{stage.steps:,}")
        more = (f"{stage.tokens:.3g}", f"{stage.flops:.3g}", f"{stage.memory_bytes / GIB:.1f}", f"{stage.hours:.2f}")
        table.add_row(str(number), *row, *more)
    print_table(table)
