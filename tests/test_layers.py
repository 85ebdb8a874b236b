"""Which package may import which, read from the folders of `accel/`."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ACCEL = ROOT / "accel"
# A package imports what stands before it or in its own group.
ORDER = [("errors",), ("files",), ("ops",), ("core", "families"), ("methods", "students"), ("world",), ("runtime",)]
ORDER += [("evaluation",), ("training",), ("cli", "__main__", "__init__")]
WORLD_USERS = {"world", "evaluation", "training", "cli"}


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


def package_of(name: str) -> str | None:
    """accel.methods.base.Method -> methods, accel.errors.AccelError -> errors"""
    parts = name.split(".")
    is_part = parts[0] == "accel" and len(parts) > 1 and any((ACCEL / n).exists() for n in (parts[1], f"{parts[1]}.py"))
    return parts[1] if is_part else None


def rank(package: str) -> int:
    return next(i for i, group in enumerate(ORDER) if package in group)


FILES = sorted(ACCEL.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_package_imports_only_those_below(file):
    own = file.relative_to(ACCEL).parts[0].removesuffix(".py")
    for name in imports(file):
        assert not name.startswith(("gradio", "ui", "app")), f"{own} imports {name}"
        other = package_of(name)
        assert other is None or rank(other) <= rank(own), f"{own} imports {name}"
        assert other != "world" or own in WORLD_USERS, f"{own} imports {name}"
        assert other != "training" or own in ("training", "cli"), f"{own} imports {name}"


def test_methods_never_import_each_other():
    methods = ACCEL / "methods"
    names = {p.stem for p in methods.iterdir()} - {"__init__", "base", "__pycache__"}
    for file in methods.rglob("*.py"):
        own = file.relative_to(methods).parts[0].removesuffix(".py")
        for name in imports(file) if own in names else ():
            parts = name.split(".")
            other = parts[2] if parts[:2] == ["accel", "methods"] else own
            assert other in (own, "base"), f"{file.name} imports {name}"


def test_no_module_name_stands_for_two_things():
    files = [f for f in (*FILES, *(ROOT / "ui").glob("*.py")) if f.stem not in ("__init__", "__main__", "base")]
    stems = [f.stem for f in FILES if f in files]
    assert len(stems) == len(set(stems))
    assert not {f.stem for f in files} & (sys.stdlib_module_names - {"trace"})
