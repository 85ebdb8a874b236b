"""The Results tab: every committed suite is shown, sorted by numbers, without torch."""

import json
import subprocess
import sys
from types import SimpleNamespace

import gradio as gr
import pytest

from accel.evaluation.suites import OVERVIEW, RESULTS, SUITES
from ui.measured import ALL, Order, about, differences, plot, read, suite_names, table
from ui.results_tab import LABEL, ResultsTab

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def tab() -> ResultsTab:
    with gr.Blocks():
        tab = ResultsTab(SimpleNamespace())
        tab.wire(SimpleNamespace(tabs=gr.Tabs()))
    return tab


def names(html: str) -> list[str]:
    """The settings of a table from top to bottom."""
    return [part.split("<")[0] for part in html.split('<th scope="row">')[1:]]


@pytest.mark.parametrize("suite", suite_names())
def test_every_suite_is_shown_with_its_conditions(suite):
    found = read(suite)
    assert names(table(found, Order())) == list(found["rows"])
    lines = " ".join(about(suite, found))
    assert found["device"] in lines and ("toy model" in lines or "Random weights" in lines)


def test_all_presets_are_shown_with_the_baseline_of_the_same_time():
    html = table(read(ALL), Order())
    assert names(html) == list(OVERVIEW)
    assert "SSIM of the baseline in the same time" in html and html.count("x)</td>") == len(OVERVIEW) - 1


def test_a_column_is_sorted_by_its_numbers_best_first_and_then_the_other_way(tab):
    click = SimpleNamespace(_data={"id": "2"})  # speed-up
    update = tab.sort("gpd-guidance", Order(), click)
    speeds = [read("gpd-guidance")["rows"][name]["speedup"] for name in names(update[tab.table])]
    assert speeds == pytest.approx(sorted(speeds, reverse=True), abs=0.01) and speeds[0] > 10
    assert 'aria-sort="descending"' in update[tab.table]
    again = tab.sort("gpd-guidance", list(update[tab.order]), click)
    assert names(again[tab.table])[0] == "baseline, 48 steps" and 'aria-sort="ascending"' in again[tab.table]


def test_equal_videos_are_sorted_above_every_number():
    assert names(table(read("base"), Order(7)))[0] == "baseline"
    assert names(table(read("gpd-guidance"), Order(7)))[0] == "baseline, 48 steps"  # PSNR: bit-equal


def test_the_plot_has_a_point_for_each_setting_that_was_measured():
    found = read("disca")
    assert plot(found, "ssim").count('class="mark"') == len(found["rows"])
    assert "turbo\n17.04×, SSIM 0.8984 [0.8766, 0.9198]" in plot(found, "ssim")
    assert plot(read("wan-1.3b"), "ssim") == ""


def test_differences_of_pairs_are_shown_with_their_signs():
    html = differences(read("disca"))
    assert html.count("<tr>") == 1 + len(read("disca")["pairs"]) and "+0.0754 [+0.0446, +0.1082]" in html
    assert differences({**read("disca"), "pairs": []}) == ""


def test_the_results_are_read_when_the_tab_is_opened(tab):
    assert tab.table.value == ""
    assert tab.open(ALL, "ssim", SimpleNamespace(value="Compare")) == {tab.order: gr.skip()}
    assert names(tab.open(ALL, "ssim", SimpleNamespace(value=LABEL))[tab.table]) == list(OVERVIEW)


@pytest.mark.parametrize("suite", ["../results/disca", "/etc", "", EVIL, None])
def test_a_name_that_is_not_offered_is_never_a_path(suite):
    assert list(read(suite)["rows"]) == list(OVERVIEW)


def test_without_results_the_tab_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr("ui.measured.RESULTS", tmp_path)
    with gr.Blocks():
        tab = ResultsTab(SimpleNamespace())
    assert "docs/results" in tab.about.value and not tab.suite.visible


def test_names_of_settings_are_escaped(monkeypatch, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    found = json.loads((RESULTS / "disca" / "results.json").read_text())
    row = found["rows"]["baseline"]
    found["rows"] = {"baseline": row, EVIL: row}
    found["pairs"][0]["a"] = EVIL
    (folder / "results.json").write_text(json.dumps(found))
    monkeypatch.setattr("ui.measured.RESULTS", tmp_path)
    html = "".join(make(read("base")) for make in (lambda f: table(f, Order()), lambda f: plot(f, "ssim"), differences))
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_every_suite_of_bench_that_was_measured_is_offered():
    assert set(suite_names()) >= {name for name in SUITES if (RESULTS / name / "results.json").is_file()}


def test_showing_results_loads_no_torch():
    code = "import sys, ui.measured as m; m.table(m.read('disca'), m.Order()); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
