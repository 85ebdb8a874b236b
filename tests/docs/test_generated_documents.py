"""Generated parts of the documents are current, and the commands of the README exist."""

import re

import pytest

from accel.evaluation.docs import PARTS, fill, pages
from accel.evaluation.suites import SUITES, results
from accel.methods import METHODS
from accel.runtime.paths import ROOT
from accel.runtime.presets import preset_names


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_parts_are_current(page):
    """If this fails: `python -m accel docs`."""
    assert fill(page.read_text()) == page.read_text()


def test_a_part_is_replaced_and_the_text_around_it_stays():
    text = "before\n<!-- methods -->\nstale\n<!-- /methods -->\nafter\n"
    assert fill(text) == f"before\n<!-- methods -->\n{PARTS['methods']()}<!-- /methods -->\nafter\n"


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="unknown generated part 'moon'; there are overview"):
        fill("<!-- moon -->\n<!-- /moon -->\n")


@pytest.mark.parametrize("name", PARTS)
def test_every_part_is_a_table(name):
    """Also of those that no document holds at present, where they were measured."""
    suite = re.sub("-(details|pairs)$", "", name)
    assert "\n|---|" in PARTS[name]() or (suite in SUITES and not results(suite))


def test_the_overview_has_a_row_for_each_measured_preset_with_the_baseline_at_matched_time():
    rows = {row.split("`")[1]: row for row in PARTS["overview"]().splitlines() if "`" in row}
    assert len(rows) == 11 and rows.keys() - {"baseline"} <= set(preset_names())
    assert all("x)" in rows[name] for name in rows.keys() - {"baseline"})


def test_readme_names_every_method_and_no_preset_that_does_not_exist():
    text = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in text for name in METHODS)
    assert set(re.findall(r"--preset (\w+)", text)) <= set(preset_names())


def test_there_is_one_command_to_start_and_one_to_test():
    commands = re.findall(r"^python3\.11 .*$", (ROOT / "README.md").read_text(), re.M)
    assert [c.rsplit(".venv/bin/python ")[-1] for c in commands] == ["app.py", "-m pytest"]
