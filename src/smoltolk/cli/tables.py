"""What commands print tables with."""

from rich.console import Console
from rich.table import Table


def print_wide(table: Table) -> None:
    """Prints a table; in a file nothing has to be folded."""
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
