"""What commands show: tables on the output, and bars on the error output, so that programs can read the output.

Nothing here is read as markup of rich: names and paths are the user's, and may hold square brackets.
"""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table


def print_table(table: Table) -> None:
    """Prints a table; in a file nothing has to be folded."""
    width = None if Console().is_terminal else 200
    Console(width=width, markup=False, emoji=False).print(table)


def error_console() -> Console:
    """The error output, for messages while a command works."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def progress_bar(*columns: ProgressColumn, transient: bool = False, disable: bool = False) -> Progress:
    """A bar on the error output with descriptions of its tasks.

    Args:
        columns: what stands right of the bar; by default what is done, of how much, and the time that is left.
        transient: whether the bar goes away at its end.
        disable: whether to show nothing.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *(columns or (MofNCompleteColumn(), TimeRemainingColumn())),
        console=error_console(),
        transient=transient,
        disable=disable,
    )
