"""The package's shape: imports point one way, and what it exports is what it says."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import smoltolk
from smoltolk.model.export import CODE

SOURCE = Path(smoltolk.__file__).parent
LEVELS = [
    {"model", "terminal"},
    {"speech"},
    {"data", "pages"},
    {"generation"},
    {"training", "evaluation", "analysis"},
    {"experiments"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def imported_parts(path):
    """Parts of the package that a file imports: folders, or modules at the top."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative
                parts = path.relative_to(SOURCE).parts
                module = ".".join(["smoltolk", *parts[: len(parts) - node.level], module]).rstrip(".")
            if module == "smoltolk":
                yield from (alias.name for alias in node.names)
            elif module.startswith("smoltolk."):
                yield module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("smoltolk."))


def test_imports_point_down_only():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        here = path.relative_to(SOURCE).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for part in imported_parts(path):
            if part != here and LEVEL[part] >= LEVEL[here]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {part}")
    assert wrong == []


def imported_files(path):
    """Files of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1] if node.level else SOURCE.parent
            module = folder.joinpath(*(node.module or "").split("."))
            for target in (module, *(module / alias.name for alias in node.names)):
                if target.with_suffix(".py").exists():
                    yield target.with_suffix(".py")


def test_no_files_import_each_other_in_a_circle():
    files = {path: set(imported_files(path)) for path in SOURCE.rglob("*.py")}
    assert files[SOURCE / "speech" / "mel.py"] == {
        SOURCE / "speech" / name for name in ("audio.py", "clustering.py", "units.py")
    }
    TopologicalSorter(files).prepare()  # raises for a circle, and names it


def test_the_model_files_import_siblings_only_so_that_they_can_travel_with_a_model():
    for name in CODE:
        for node in ast.walk(ast.parse((SOURCE / "model" / name).read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1
                assert not (node.module or "").startswith("smoltolk")


def test_exported_members():
    assert sorted(smoltolk.__all__) == [
        "SmolTolkConfig",
        "SmolTolkForCausalLM",
        "SmolTolkOutput",
        "SmolTolkPipeline",
        "export_model",
        "import_checkpoint",
    ]
    assert all(hasattr(smoltolk, name) for name in smoltolk.__all__)
    assert (SOURCE / "py.typed").exists()
