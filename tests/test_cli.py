"""Commands as a user types them, on the shipped model: files, the JSON last line, exit codes."""

import json
import sys

import numpy as np
import pytest
import torch

from accel.cli import main
from accel.cli.options import parse_settings
from accel.evaluation import compare as compare_module
from accel.files import only_writer
from accel.runtime import models, video
from accel.runtime.video import read_settings, write_mp4

PROMPT = "a large red star spins slowly over a cloudy navy background"


@pytest.fixture
def accel(monkeypatch, capsys, tiny_wan):
    """accel("run", ...) -> exit code, JSON of the last line of stdout (None if there is none), stderr."""
    load = models.load_pipeline
    monkeypatch.setattr(models, "load_pipeline", lambda model: tiny_wan if model == models.TINY else load(model))

    def command(*args: str):
        monkeypatch.setattr(sys, "argv", ["accel", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        last = out.strip().splitlines()[-1:]
        return ended.value.code, json.loads(last[0]) if last and last[0].startswith("{") else None, err

    return command


def test_compare_writes_both_videos_and_a_complete_report(accel, tmp_path):
    args = ("--prompt", PROMPT, "--seed", "3", "--steps", "12", "--preset", "fastercache", "--repeats", "1")
    args += ("--height", "64", "--width", "64", "--frames", "9")
    code, document, _ = accel("compare", *args, "--out", str(tmp_path))
    report = json.loads((tmp_path / "run.json").read_text())
    assert code == 0 and report == document
    keys = "model prompt seed steps guidance methods device threads dtype a b speedup_denoise speedup_total work_ratio "
    keys += "efficiency psnr ssim ssim_worst motion_ratio bit_equal adherence_a adherence_b trace"
    assert set(keys.split()) <= set(report)
    for pane in "ab":
        frames = np.load(tmp_path / f"{pane}.npy")
        assert frames.dtype == np.uint8 and frames.shape == (9, 64, 64, 3)
        assert set(report[pane]) == {"text", "denoise", "decode", "encode"} | ({"load"} if pane == "b" else set())
        assert (tmp_path / f"{pane}.jpg").read_bytes()[:2] == b"\xff\xd8"
        assert report["race"][pane]["steps"] == list(range(1, 13))
    assert read_settings(tmp_path / "b.mp4")["methods"] == report["methods"]
    assert report["work_ratio"] < 1 and 0 <= report["adherence_b"] <= 1


def test_a_student_runs_in_its_own_steps_and_the_baseline_in_the_given_ones(accel, tmp_path):
    args = ("--prompt", PROMPT, "--preset", "gpd", "--set", "fastercache.attention=true", "--steps", "4")
    args += ("--height", "64", "--width", "64", "--frames", "9")
    code, report, _ = accel("compare", *args, "--repeats", "1", "--out", str(tmp_path))
    assert code == 0 and report["steps"] == 6 and report["steps_a"] == 4 and report["methods"]["gpd"]["steps"] == 6
    assert report["work_ratio"] == pytest.approx(6 / 8, abs=0.01)
    assert read_settings(tmp_path / "b.mp4")["steps"] == 6 and read_settings(tmp_path / "b.mp4")["guidance"] == 1


@pytest.mark.slow
def test_run_repeats_a_video_from_the_file_alone(accel, tmp_path):
    common = ("--prompt", PROMPT, "--seed", "5", "--steps", "10", "--set", "fastercache.attention_interval=3")
    _, first, _ = accel("run", *common, "--out", str(tmp_path / "one"))
    _, again, _ = accel("run", "--from", str(tmp_path / "one" / "video.mp4"), "--out", str(tmp_path / "two"))
    assert first["methods"] == again["methods"] and first["methods"]["fastercache"]["attention_interval"] == 3
    one, two = (np.load(tmp_path / name / "frames.npy") for name in ("one", "two"))
    assert np.array_equal(one, two)


def test_samples_that_were_stopped_leave_the_ones_before(accel, tmp_path, monkeypatch):
    more = ("--size", "16", "--frames", "1", "--out", str(tmp_path))
    sample = lambda n, seed: accel("world", "sample", "--n", n, "--seed", seed, *more)
    sample("3", "0")
    (tmp_path / "mine.mp4").write_bytes(b"mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    written, write = [], video.write_mp4

    def stop_at_the_second(file, *rest):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(write(file, *rest))

    monkeypatch.setattr(video, "write_mp4", stop_at_the_second)
    assert sample("2", "1")[0] == 130
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    monkeypatch.undo()
    sample("2", "1")
    assert {file.name for file in tmp_path.iterdir()} == {
        "000.mp4", "001.mp4", "captions.json", "sheet.png", "mine.mp4",
    }  # fmt: skip


def test_a_file_that_is_no_video_is_not_judged(accel, tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "captions.json").write_text('{"a.mp4": "a red star"}')
    code, _, err = accel("world", "judge", str(tmp_path))
    assert code == 2 and err == f"error: {tmp_path / 'a.mp4'} cannot be read as a video\n"


def test_world_sample_and_judge_agree(accel, tmp_path):
    accel("world", "sample", "--n", "2", "--size", "96", "--frames", "17", "--out", str(tmp_path))
    assert (tmp_path / "sheet.png").is_file() and len(list(tmp_path.glob("*.mp4"))) == 2
    assert accel("world", "judge", str(tmp_path))[1]["mean"] > 0.9


@pytest.mark.parametrize(
    "args, sentence",
    [
        (("run", "--prompt", " "), "the prompt is empty"),
        (("run", "--prompt", "x", "--seed", "1.5"), "Invalid value for '--seed'"),
        (("compare",), "Missing option '--prompt'"),
        (("run",), "give a --prompt, or a video to repeat with --from"),
        (("run", "--prompt", "x", "--preset", "warp"), "no preset 'warp'"),
        (("run", "--prompt", "x", "--set", "fastercache.speed=9"), "unknown setting fastercache.speed"),
        (("run", "--prompt", "x", "--set", "fastercache.attention_interval=99"), "a whole number from 2 to 6"),
        (("run", "--prompt", "x", "--set", "nonsense"), "write method.parameter=value"),
        (("run", "--prompt", "x", "--set", "gpd.student=@x"), "put the value into quotes"),
        (("run", "--prompt", "x", "--steps", "0"), "steps = 0 is not allowed"),
        (("run", "--prompt", "x", "--solver", "rk4"), "one of default, unipc, euler, dpm++2m, dpm++2s"),
        (("run", "--prompt", "x", "--shift", "nan"), "shift = nan is not allowed: a number from 0.1 to 20"),
        (("run", "--prompt", "x", "--preset", "gpd", "--solver", "euler"), "which brings its own noise levels"),
        (("run", "--prompt", "x", "--height", "70"), "must be a multiple of 8"),
        (("run", "--prompt", "x", "--frames", "18"), "1 more than a multiple of 2"),
        (("run", "--from", "nowhere.mp4"), "no file nowhere.mp4"),
        (("run", "--from", "a.mp4", "--steps", "5", "--set", "x.y=1"), "leave --steps, --set out"),
        (("run", "--prompt", "x", "--model", "models/none"), "no model folder"),
        (("bench", "--suite", "moon"), "unknown suite 'moon'"),
        (("sweep", "--axis", "preset=quick,gpd", "--preset", "gpd"), "do not go together with an axis of presets"),
        (("tune", "--prompt-file", "examples/prompts/toy.txt", "--prompts", "2"), "do not go together"),
        (("tune", "--front", "--max-loss", "0.1"), "--front and --max-loss do not go together"),
        (("run", "--prompt", "x", "--set", "disca.num_full_steps=2024-02-30"), "put the value into quotes"),
        (("run", "--model", "some/body", "--prompt", "x", "--steps", "0"), "steps = 0 is not allowed"),
        (("train", "moon"), "unknown part 'moon'"),
        (("world", "judge", "nowhere"), "captions.json is missing"),
        (("world", "sample", "--size", "0"), "Invalid value for '--size'"),
    ],
)
def test_bad_input_ends_with_one_line_and_exit_code_two(args, sentence, accel, tmp_path):
    more = () if args[0] in ("train", "world") else ("--out", str(tmp_path / "out"))
    code, _, err = accel(*args, *more)
    assert code == 2 and sentence in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == [err.strip().splitlines()[-1]] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["video.mp4", "b.mp4"])  # a run deletes what `compare` left in its folder
def test_a_video_is_not_replaced_by_its_repetition(name, accel, tmp_path):
    write_mp4(tmp_path / name, np.zeros((3, 16, 16, 3), np.uint8), 8, {"model": "m"})
    code, _, err = accel("run", "--from", str(tmp_path / name), "--out", str(tmp_path))
    assert code == 2 and "would be replaced by what is made from it: give another --out" in err


@pytest.mark.parametrize(
    "text, sentence", [(b" \n\n", "has no prompt"), (b"\xff", "not a text in UTF-8"), (b"x" * 2001, "at most 2000")]
)
def test_a_file_of_prompts_is_checked_before_the_model_is_loaded(text, sentence, accel, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "load_pipeline", None)
    (file := tmp_path / "prompts.txt").write_bytes(text)
    code, _, err = accel("tune", "--prompt-file", str(file), "--out", str(tmp_path / "out"))
    assert code == 2 and sentence in err


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"a.mp4": 1}'])
def test_damaged_captions_are_refused(text, accel, tmp_path):
    (tmp_path / "captions.json").write_bytes(text)
    code, _, err = accel("world", "judge", str(tmp_path))
    assert code == 2 and "captions.json" in err


@pytest.mark.parametrize(
    "preset, changes, axes, methods",
    [
        (None, [], ["steps"], ["stepcache"]), (None, ["stepcache.threshold=0.3"], [], ["stepcache"]),
        (None, ["fastercache.attention=true"], [], ["fastercache"]), (None, [], ["gpd.steps"], []),
        ("stepcache", ["gpd.steps=24"], [], ["gpd", "stepcache"]),  # the order in which they go together
        ("balanced", ["fastercache.attention=false"], [], ["fastercache", "fittedsolver"]),
        ("none", ["meanflow.steps=8", "fastercache.attention=true"], [], ["meanflow", "fastercache"]),
    ],
)  # fmt: skip
def test_methods_that_are_named_take_the_place_of_the_default_preset_alone(preset, changes, axes, methods):
    assert list(parse_settings(preset, changes, axes)["methods"]) == methods


SMALL = ("--prompt", PROMPT, "--height", "48", "--width", "48", "--frames", "5", "--steps", "2", "--preset", "none")


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(error): from now on, `compare` ends with an error after it has written its first video."""
    generate = compare_module.generate

    def use(error):
        calls = []

        def interrupted(*args):
            calls.append(args)
            if len(calls) > 1:
                raise error
            return generate(*args)

        monkeypatch.setattr(compare_module, "generate", interrupted)

    return use


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (KeyboardInterrupt(), 130, "error: stopped"),
        (OSError(28, "No space left on device", "/tmp/x"), 1, "has no new results: the disk is full: free some space"),
    ],
)
def test_a_compare_that_does_not_end_leaves_earlier_results_whole(error, code, sentence, accel, tmp_path, interrupt):
    command = ("compare", *SMALL, "--repeats", "1", "--out", str(tmp_path))
    assert accel(*command, "--seed", "1")[0] == 0
    before = contents(tmp_path)
    assert set(before) == {"a.mp4", "b.mp4", "a.npy", "b.npy", "a.jpg", "b.jpg", "run.json"}
    interrupt(error)
    ended, _, err = accel(*command, "--seed", "2")
    assert ended == code and sentence in err and "Errno" not in err and "Traceback" not in err
    assert contents(tmp_path) == before


def test_a_folder_that_another_process_writes_into_is_refused(accel, tmp_path):
    with only_writer(tmp_path):
        code, _, err = accel("run", *SMALL, "--out", str(tmp_path))
    assert code == 2 and "error: another process writes into" in err and not contents(tmp_path)


def test_a_training_that_was_stopped_ends_so_for_the_shell_too(accel, monkeypatch):
    monkeypatch.setattr("accel.training.parts.train_parts", lambda *_, **__: {"gpd": {"step": 3}, "stopped": True})
    code, out, err = accel("train", "gpd")
    assert code == 130 and out == {"gpd": {"step": 3}} and "error: stopped" in err


def test_a_gpu_without_enough_memory_is_told_in_a_sentence(accel, tmp_path, interrupt):
    interrupt(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    code, _, err = accel("compare", *SMALL, "--repeats", "1", "--out", str(tmp_path))
    assert code == 1 and "error: the GPU has too little memory" in err and "Traceback" not in err


def test_results_of_a_run_replace_those_of_a_compare(accel, tmp_path):
    assert accel("compare", *SMALL, "--repeats", "1", "--out", str(tmp_path))[0] == 0
    (tmp_path / "report.zip").write_bytes(b"of the pair")
    assert accel("run", *SMALL, "--out", str(tmp_path))[0] == 0
    assert set(contents(tmp_path)) == {"video.mp4", "frames.npy", "run.json"}


def test_solver_and_shift_belong_to_the_run_and_are_repeated_from_the_file(accel, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    code, document, _ = accel("run", *SMALL, "--solver", "dpm++2m", "--shift", "5", "--out", str(one))
    assert code == 0 and (document["solver"], document["shift"]) == ("dpm++2m", 5.0)
    assert accel("run", "--from", str(one / "video.mp4"), "--out", str(two))[0] == 0
    assert np.array_equal(np.load(one / "frames.npy"), np.load(two / "frames.npy"))
    code, document, _ = accel("run", *SMALL, "--out", str(two))
    assert not np.array_equal(np.load(one / "frames.npy"), np.load(two / "frames.npy"))


@pytest.mark.parametrize(
    "captions, sentence",
    [({"a.mp4": "a red star spins"}, "has no a.mp4"), (["a"], "it is not an object of texts")],
)
def test_captions_without_their_videos_are_bad_input(captions, sentence, accel, tmp_path):
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    code, _, err = accel("world", "judge", str(tmp_path))
    assert code == 2 and sentence in err
