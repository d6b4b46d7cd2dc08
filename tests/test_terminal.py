"""What commands show: where, and that names stay as they are."""

import ast
from pathlib import Path

from rich.table import Table

import smoltolk
from smoltolk.terminal import error_console, print_table, progress_bar

NAME = "[bold]a[/] [b] :dog:"  # what rich would read as markup


def test_tables_go_to_the_output_with_names_as_they_are(capsys):
    table = Table(f"column {NAME}", title=f"title {NAME}", caption=f"caption {NAME}")
    table.add_row(f"cell {NAME}")
    print_table(table)
    printed = capsys.readouterr()
    assert printed.err == ""
    for part in ("column", "title", "caption", "cell"):
        assert f"{part} {NAME}" in printed.out


def test_wide_tables_are_not_folded_in_files(capsys):
    table = Table("column")
    table.add_row("a b " * 45)
    print_table(table)
    assert " ".join(["a b"] * 45) in capsys.readouterr().out


def test_bars_and_messages_go_to_the_error_output_with_names_as_they_are(capsys):
    with progress_bar() as bar:
        bar.update(bar.add_task(NAME, total=2), completed=2)
    error_console().print(f"message {NAME}")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert NAME in printed.err
    assert "2/2" in printed.err
    assert f"message {NAME}" in printed.err


def test_nothing_shows_a_bar_or_a_table_by_other_means():
    package, wrong = Path(smoltolk.__file__).parent, []
    for path in sorted(package.rglob("*.py")):
        if path.name == "terminal.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                given = {keyword.arg for keyword in node.keywords}
                if node.func.id in ("Progress", "track") and "console" not in given:
                    wrong.append(f"{path.relative_to(package)}:{node.lineno} shows a bar on the output")
                if node.func.id == "Console" and "markup" not in given:
                    wrong.append(f"{path.relative_to(package)}:{node.lineno} reads names as markup")
    assert wrong == []
