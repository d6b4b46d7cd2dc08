"""The command line: parse, call one function, return an exit code.

Heavy modules are imported by the command that needs them.
"""

import argparse
import sys
from collections.abc import Sequence

from transformers.utils.logging import disable_progress_bar

from smoltolk.cli import data, evaluation, models, speech, stores, training, vocoders

PATH_ERRORS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
INTERRUPTED = 130  # what shells report for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0 when it worked, 1 for bad input, 130 when it was stopped."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    called = " ".join(("smoltolk", options.command, *filter(None, [options.action])))
    disable_progress_bar()  # of weights being loaded and saved, which comes between what commands say
    try:
        options.run(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"{called}: {_described(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"{called}: {str(stop) or options.resume_hint}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _described(error: Exception) -> str:
    """An error in words; those of the system itself name no remedy."""
    if isinstance(error, PATH_ERRORS) and error.filename is not None:
        return f"{error.filename} cannot be read or written ({error.strerror}): correct the path, or its permissions"
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="smoltolk", description="Text-speech language models.")
    parser.set_defaults(action=None, resume_hint="stopped; run the same command to go on")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    for part in (speech, vocoders, data, stores, training, evaluation, models):
        part.add_commands(commands)
    return parser
