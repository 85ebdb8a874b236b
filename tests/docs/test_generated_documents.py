"""What the pages say is what was measured, and their commands are the ones that exist."""

import re

import pytest

from accel.evaluation.docs import fill, pages
from accel.methods import METHODS
from accel.runtime.models import ROOT
from accel.runtime.presets import preset_names


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_marked_parts_are_what_the_measurements_say(page):
    assert fill(page.read_text()) == page.read_text()


def test_readme_names_every_method_and_no_preset_that_does_not_exist():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in METHODS)
    assert set(re.findall(r"--preset (\w+)", text)) <= set(preset_names())


def test_there_is_one_command_to_start_and_one_to_test():
    commands = re.findall(r"^python3\.11 .*$", (ROOT / "README.md").read_text(), re.M)
    assert [c.rsplit(".venv/bin/python ")[-1] for c in commands] == ["app.py", "-m pytest"]
