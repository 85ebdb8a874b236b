"""Who may import whom: tensors <- records <- host <- methods <- runs <- cli, ui, app; methods never each other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ACCEL = ROOT / "accel"
LAYERS = [
    {"files", "spectrum", "tokens", "plans", "budget", "flow"},
    {"trace", "carry", "metrics", "video", "ledger", "weights", "conditioning", "predictor"},
    {"flops", "families", "heads", "hooks", "host", "schedule", "student"},
    {"methods"},
    {"presets", "models", "apply", "world"},
    {"run", "bench", "summary", "profile", "layout"},
    {"training"},
    {"cli", "readme", "__main__", "__init__"},
]


def imports(file: Path) -> set[str]:
    """Absolute names of everything a file imports, inside functions too."""
    package, found = list(file.relative_to(ROOT).parts[:-1]), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def part(name: str) -> str | None:
    """accel.methods.base.Method -> methods"""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "accel" and len(pieces) > 1 else None


@pytest.mark.parametrize("file", sorted(ACCEL.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_imports_only_what_lies_below(file):
    own = file.relative_to(ACCEL).parts[0].removesuffix(".py")
    level = next(i for i, layer in enumerate(LAYERS) if own in layer)
    for name in imports(file):
        assert not name.startswith(("gradio", "ui", "app")), f"{own} imports {name}"
        below = next((i for i, layer in enumerate(LAYERS) if part(name) in layer), None)
        if below is not None and part(name) != own:
            assert below <= level, f"{own} imports {name}"


def test_only_the_command_line_imports_training():
    users = {
        f.name
        for f in ACCEL.rglob("*.py")
        if "training" not in f.parts and any(part(i) == "training" for i in imports(f))
    }
    assert users <= {"cli.py"}


def test_methods_never_import_each_other():
    names = {f.stem for f in (ACCEL / "methods").glob("*.py")} - {"__init__", "base"}
    for file in (ACCEL / "methods").glob("*.py"):
        if file.stem in names:
            others = {i for i in imports(file) if re.match(rf"accel\.methods\.({'|'.join(names - {file.stem})})\b", i)}
            assert names == {file.stem} or not others


def test_files_stay_small():
    long = {
        str(f): n
        for f in (*ACCEL.rglob("*.py"), *(ROOT / "ui").glob("*.py"))
        if (n := len(f.read_text().splitlines())) > 300
    }
    assert long == {}
