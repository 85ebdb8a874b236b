"""Commands, options, snippets, paths and links in README, docs, the model card and CONTRIBUTING exist and work."""

import re
import shlex

import pytest
import typer.main
from typer.exceptions import TyperException

import accel
from accel.cli import app
from accel.evaluation.suites import SUITES
from accel.runtime import models
from accel.runtime.paths import ROOT
from accel.runtime.presets import build_methods, preset_names

RESULTS = ROOT / "docs" / "results"  # reports that `bench` writes
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models" / "tiny-wan" / "README.md"]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if not page.is_relative_to(RESULTS))
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
CASES = pytest.mark.parametrize("name", TEXTS)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
STEPS = "num_inference_steps=50"
SMALL = ["--steps", "2", "--height", "32", "--width", "32", "--frames", "5"]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language."""
    return [code for found, code in FENCE.findall(text) if found == language]


def commands(text: str) -> list[list[str]]:
    """Words after `python -m accel` of each such command, in fenced blocks and inline code."""
    inline = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    lines = [line for code in blocks(text, "") for line in code.splitlines()] + [" ".join(c.split()) for c in inline]
    parts = [part.strip() for line in lines for part in re.split(r"&&|  +#", line)]
    return [shlex.split(part)[3:] for part in parts if part.startswith("python -m accel ") and not part.endswith("...")]


def filled(words: list[str]) -> list[str]:
    """Words of a command with a number for the placeholders N and K."""
    return [{"N": "1", "K": "1"}.get(word, word) for word in words]


def parse(command, words: list[str]) -> None:
    """Parse a command line without running it. Raises TyperException for an unknown command, option or value."""
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"unknown command {words}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, list(words))


def values(words: list[str], option: str) -> list[str]:
    """The values of an option; names in capitals are placeholders."""
    found = [words[i + 1] for i, word in enumerate(words[:-1]) if word == option]
    return [value for value in found if not value.isupper()]


@CASES
def test_every_command_parses(name):
    for words in commands(TEXTS[name]):
        try:
            parse(typer.main.get_command(app), filled(words))
        except TyperException as error:
            raise AssertionError(f"{' '.join(words)}: {error.format_message()}") from None
        assert set(values(words, "--preset")) <= {*preset_names(), "none"}
        assert set(values(words, "--suite")) <= set(SUITES)


@CASES
def test_every_changed_parameter_exists(name):
    for target, value in re.findall(r"--set ([a-z_]+\.[a-z_]+)=(\w+)", TEXTS[name]):
        method, parameter = target.split(".")
        assert parameter in accel.METHODS[method].model_fields
        if not value.isupper():
            build_methods({method: {parameter: int(value)}})


@pytest.fixture(scope="module")
def ablations() -> dict[str, set[str]]:
    """The ablations of each distilled method, from the message that refuses another one."""
    names = {}
    for method in ("gpd", "meanflow", "predictor"):
        with pytest.raises(ValueError, match="unknown") as error:
            app(["train", method, "--ablation", "moon"], standalone_mode=False)
        names[method] = {name.split()[-1] for name in str(error.value).split("; ")[1].split(", ")}
    return names


@CASES
def test_every_ablation_exists(name, ablations):
    for words in commands(TEXTS[name]):
        assert all(ablation in ablations[words[1]] for ablation in values(words, "--ablation"))
    assert set(re.findall(r"--ablation ([a-z][\w-]*)", TEXTS[name])) <= set.union(*ablations.values())


def test_training_page_names_every_ablation(ablations):
    named = set(re.findall(r"`([\w-]+)`", TEXTS["docs/training.md"]))
    assert (ablations["gpd"] | ablations["meanflow"]) - {"gpd", "meanflow"} <= named


def test_readme_commands_work_on_the_shipped_model(tmp_path, monkeypatch, tiny_wan):
    monkeypatch.setattr(models, "load_pipeline", lambda model: tiny_wan)
    monkeypatch.chdir(tmp_path)
    more = {"run": SMALL, "compare": [*SMALL, "--repeats", "1"]}
    ran = [words for words in commands(TEXTS["README.md"]) if words[0] in more]
    assert [words[0] for words in ran] == ["run", "compare", "run"]
    for words in ran:
        app([*words, *([] if "--from" in words else more[words[0]])], standalone_mode=False)
    assert (tmp_path / "runs/x/b.mp4").is_file() and (tmp_path / "runs/run/video.mp4").is_file()


WITH_SNIPPETS = [name for name in TEXTS if blocks(TEXTS[name], "python")]


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_every_python_snippet_runs(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for code in blocks(TEXTS[name], "python"):
        assert STEPS in code
        variables = {}
        exec(compile(code.replace(STEPS, "num_inference_steps=2"), name, "exec"), variables)
        assert variables["video"].shape == (17, 96, 96, 3)


def test_the_first_page_and_the_model_card_show_code():
    assert {"README.md", "models/tiny-wan/README.md"} <= {*WITH_SNIPPETS}


@CASES
def test_every_link_resolves(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", TEXTS[name])):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file.read_text()), f"{target}: no such heading"


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@CASES
def test_every_named_path_exists(name):
    for path in re.findall(r"`((?:accel|ui|tests|docs|presets|models|examples)/[\w./-]*)`", TEXTS[name]):
        if not re.search(r"[A-Z]{4}", path):
            assert (ROOT / path).exists(), f"{path} does not exist"


def test_contributing_lists_every_package():
    tree = next(code for code in blocks(TEXTS["CONTRIBUTING.md"], "") if "accel/\n" in code)
    packages = {folder.parent.name for folder in (ROOT / "accel").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^  (\w+)/ ", tree, re.M))


def test_every_method_has_a_page():
    ours = {name for name, method in accel.METHODS.items() if not method.peer}
    assert {page.stem for page in (ROOT / "docs" / "methods").glob("*.md")} == ours | {"peers"}
