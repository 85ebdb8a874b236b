"""Recorded pairs: their order, what the player gets, and what is recorded."""

import json

import pytest

from accel.runtime.presets import preset_names
from accel.world.scene import is_held_out, read_caption
from docs.record_pairs import command
from ui.recorded import RECORDINGS, recorded_pairs

REPORT = {
    "prompt": "p", "steps": 6, "steps_a": 50, "methods": {"gpd": {}}, "frames": 2, "height": 16, "width": 32,
    "device": "cpu", "threads": 2, "ssim_frames": [0.9, 1.0],
}  # fmt: skip
RACE = {"times": [1.0], "steps": [1], "total": 1.0, "columns": 8, "width": 32, "height": 16, "frames": 1}


@pytest.fixture
def write(tmp_path):
    """write(name, **changes): record a pair in a folder of that name."""

    def to_folder(name: str, **changes) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({**REPORT, **changes}))

    return to_folder


def test_pairs_come_in_the_order_of_the_list_and_others_by_name_after_them(write, tmp_path):
    for name in ("turbo", "zebra", "apple", "balanced", "gpd"):
        write(name)
    assert [pair.name for pair in recorded_pairs(tmp_path)] == ["balanced", "gpd", "turbo", "apple", "zebra"]


def test_a_pair_says_that_it_is_recorded(write, tmp_path):
    write("gpd")
    (pair,) = recorded_pairs(tmp_path)
    assert pair.banner == "Recorded pair: “p”, measured earlier on cpu, 2 threads. Press Run for a live one."
    assert [p["label"] for p in pair.player["panes"]] == ["baseline, 50 steps (recorded)", "gpd, 6 steps (recorded)"]


def test_the_player_gets_urls_and_the_race_if_it_was_recorded(write, tmp_path):
    write("gpd")
    write("turbo", race={"a": RACE, "b": RACE})
    without, recorded = recorded_pairs(tmp_path)
    assert [pane["race"] for pane in without.player["panes"]] == [None, None]
    assert recorded.player["panes"][1]["video"] == "recorded/turbo/b.mp4"
    assert recorded.player["panes"][1]["race"] == {"sprite": "recorded/turbo/b.jpg", **RACE}
    assert recorded.player["curves"] == [{"pane": 1, "name": "SSIM", "values": [0.9, 1.0]}]


def test_pairs_are_read_once(write, tmp_path):
    write("gpd")
    first = recorded_pairs(tmp_path)
    (tmp_path / "gpd" / "run.json").unlink()
    assert recorded_pairs(tmp_path) == first


def test_shipped_pairs_can_be_read():
    assert all(pair.player["panes"] and pair.report["trace"] for pair in recorded_pairs())


def test_each_recording_is_a_shipped_preset_on_its_own_prompt_that_training_never_saw():
    prompts = [recording.prompt for recording in RECORDINGS.values()]
    assert set(RECORDINGS) <= set(preset_names()) and len(set(prompts)) == len(prompts)
    for prompt in prompts:
        said = read_caption(prompt)
        assert is_held_out(said["colour"], said["shape"], said["motion"]), prompt


def test_the_command_that_records_a_pair_names_its_preset_prompt_and_seed(tmp_path):
    line = command("gpd", tmp_path)
    assert line[1:4] == ["-m", "accel", "compare"] and RECORDINGS["gpd"].prompt in line and str(tmp_path) in line
