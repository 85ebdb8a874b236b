"""Groups of settings against each other: the best at each speed, their differences, the area under their fronts."""

import pytest

from accel.evaluation import suites
from accel.evaluation.front import (
    best_settings,
    finalists,
    front_overview,
    front_table,
    hypervolume,
    plot_summary,
    with_front,
)  # fmt: skip
from accel.evaluation.report import summarize
from accel.methods import METHODS, StepCache

GROUPS = {"ours": ("o2", "o5", "not measured"), "peers": ("p2",), "plain": ("s2", "s3")}
ROWS = {  # FLOPs and SSIM of two prompts; the baseline has 30 FLOPs
    "baseline": (30, 1.0, 1.0), "o2": (15, 0.9, 0.8), "o5": (6, 0.7, 0.6), "p2": (12, 0.8, 0.9), "s2": (15, 0.6, 0.6),
    "s3": (10, 0.8, 0.7), suites.NOISE_FLOOR: (30, 0.9, 0.95), suites.NEUTRAL: (30, 1.0, 1.0),
}  # fmt: skip


@pytest.fixture
def summary():
    same = {"denoise": 1.0, "baseline_denoise": 1.0, "decode": 0.1, "ssim_worst": 0.5}
    line = lambda flops, ssim: {**same, "flops": flops, "ssim": ssim}
    cases = [
        {"prompt": prompt, "rows": {name: line(row[0], row[1 + i]) for name, row in ROWS.items()}}
        for i, prompt in enumerate(("first", "second"))
    ]
    about = {"device": "cpu", "threads": 1, "dtype": "float32", "refused": {"p3": "P3 cannot run here"}}
    about |= {"tried": 6, "tuning_prompts": 3, "finalists": 4, "final_prompts": 8}
    found = summarize(cases)
    known = {group: [name for name in names if name in ROWS] for group, names in GROUPS.items()}
    return with_front({**about, **found}, cases, GROUPS, best_settings(found["rows"], known), overhead=(0.0, 0.1))


def test_the_best_of_a_class_is_at_least_so_fast_and_has_the_highest_ssim(summary):
    best = {found["speed"]: found["best"] for found in best_settings(summary["rows"], summary["groups"])}
    assert best[1.5] == best[2] == {"ours": "o2", "peers": "p2", "plain": "s3"}  # 3 times as fast and still better
    assert best[2.5] == {"ours": "o5", "peers": "p2", "plain": "s3"}
    assert best[3.5] == best[5] == {"ours": "o5"} and best[8] == {}


def test_the_finalists_are_the_first_of_each_class_and_group(summary):
    assert finalists(summary["rows"], summary["groups"], 1) == {"o2", "o5", "p2", "s3"}
    assert finalists(summary["rows"], summary["groups"], 2) == {"o2", "o5", "p2", "s2", "s3"}


def test_ours_is_compared_with_the_others_prompt_by_prompt(summary):
    pairs = {(pair["a"], pair["b"]): pair["ssim"] for pair in summary["pairs"]}
    assert pairs.keys() == {("o2", "p2"), ("o2", "s3"), ("o5", "p2"), ("o5", "s3")}
    assert pairs["o2", "p2"] == pytest.approx((0.0, -0.1, 0.1)) and pairs["o2", "s3"] == pytest.approx((0.1, 0.1, 0.1))


def test_the_table_has_a_row_for_each_group_in_each_class(summary, tmp_path):
    rows = [line.split(" | ") for line in front_table(summary).splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 8 * 3
    assert rows[2][:4] == ["| 1.5x", "plain", "s3", "3.00"] and rows[2][-1] == "0.1000 [0.1000, 0.1000]; 2 of 2 |"
    assert rows[10][1:3] == ["peers", "none is so fast"]
    assert "by mean SSIM on other prompts: all 6 settings on 3, then 4 finalists on 8\n" in front_table(summary)
    assert "noise, has SSIM 0.9250 [0.9000, 0.9500], worst frame 0.500\n" in front_table(summary)
    assert "model: +5.00% [+0.00%, +10.00%] of the stock pipeline's time, by the extra seconds in 2 pairs" in (
        front_table(summary)
    )
    assert front_table(summary).endswith("\nNot measured: P3 cannot run here\n")
    plot_summary(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_the_overview_has_a_row_for_each_class_and_says_how_much_ours_is_ahead(summary):
    rows = [line.strip("| ").split(" | ") for line in front_overview(summary).splitlines() if line.startswith("| ")]
    assert rows[0] == [
        "speed by work, at least",
        "ours",
        "peers",
        "plain",
        *(f"ours - {g}; ours is closer for" for g in ("peers", "plain")),
    ]
    assert len(rows) == 1 + 8
    assert rows[1][:2] == ["1.5x", "o2 (2.00x): 0.8500 [0.8000, 0.9000]"]
    assert rows[1][4:] == ["0.0000 [-0.1000, 0.1000]; 1 of 2", "0.1000 [0.1000, 0.1000]; 2 of 2"]
    assert rows[5] == ["5x", "o5 (5.00x): 0.6500 [0.6000, 0.7000]", "-", "-", "-", "-"]


def test_the_hypervolume_is_the_area_under_the_front_over_the_logarithm_of_speed():
    assert hypervolume([]) == 0 and hypervolume([(16, 1.0)]) == hypervolume([(99, 1.0)]) == 1
    assert hypervolume([(4, 0.8)]) == pytest.approx(0.4)
    assert hypervolume([(2, 1.0), (8, 0.6), (4, 0.5)]) == pytest.approx((1.0 + 2 * 0.6) / 4)


def test_methods_marked_as_peers_are_a_group_around_their_defaults(monkeypatch):
    class Peer(StepCache):
        peer = True
        basic = ("threshold",)

    monkeypatch.setitem(METHODS, "peer", Peer)
    suite = suites._front()
    assert {name.rpartition(",")[0] for name in suite.groups["peers"] if name.startswith("peer,")} == {
        f"peer, threshold {threshold}" for threshold in (0.1, 0.2, 0.4)
    }
    assert suite.settings["peer, threshold 0.4, 50 steps"].settings()["methods"] == {"peer": {"threshold": 0.4}}
    assert "peer" not in suite.settings[suites.NEUTRAL].settings()["methods"]
