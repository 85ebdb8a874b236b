"""The sentence about a pair."""

import pytest

from accel.evaluation.verdict import verdict


def report(speed: float = 1.6, ssim: float | None = 0.998, **changes) -> dict:
    """A report of FasterCache at a speed-up."""
    trace = {"events": [[1, "cond", "blocks.0.attn1", "reuse", 0.0]], "summary": {"messages": [], "flops_ratio": 0.58}}
    return {
        "model": "m", "prompt": "p", "seed": 1, "height": 64, "width": 64, "frames": 17,
        "methods": {"fastercache": {}}, "steps": 50, "steps_a": 50, "guidance": 4.0, "guidance_a": 4.0,
        "a": {"denoise": [5.0]}, "b": {"denoise": [5.0 / speed]}, "speedup_denoise": speed,
        "speedup_range": [speed, speed], "work_ratio": 0.58, "bit_equal": False, "ssim": ssim, "trace": trace,
        **changes,
    }  # fmt: skip


def idle(*messages: str) -> dict:
    """The trace of a run that computed everything."""
    events = [[0, "cond", "denoiser", "compute", 1.0]]
    return {"events": events, "summary": {"messages": list(messages), "flops_ratio": 1.0}}


OFF = "FasterCache is off: 3 steps are too few, it needs at least 4"


def test_faster():
    assert verdict(report()) == (
        "FasterCache was 1.60 times as fast (3.12 s of denoising instead of 5.00 s), "
        "and its video hardly differs from the reference (SSIM 0.998)."
    )


def test_slower_although_work_was_saved():
    text = verdict(report(0.8))
    assert (
        text.startswith("FasterCache was slower: 0.80 times the speed")
        and "although it computed 58% of the work" in text
    )


@pytest.mark.parametrize("changes", [{"speed": 1.03}, {"speed": 1.2, "speedup_range": [0.9, 1.5]}])
def test_a_difference_within_chance_is_not_called_faster(changes):
    assert "took as long as the reference" in verdict(report(**changes))


@pytest.mark.parametrize("ssim,words", [(0.97, "a little"), (0.9, "visibly"), (0.4, "another one")])
def test_how_near_the_videos_are(ssim, words):
    assert words in verdict(report(ssim=ssim))


def test_bit_equal_videos_are_called_identical():
    assert verdict(report(bit_equal=True)).endswith("its video is identical to the reference, bit for bit.")


def test_videos_of_other_sizes_are_not_compared():
    assert "another size" in verdict(report(ssim=None))


def test_a_method_that_computed_everything_did_nothing_and_the_reason_is_said():
    trace = idle("The student's guidance is built in", OFF)
    text = verdict(report(1.0, bit_equal=True, work_ratio=1.0, trace=trace))
    assert text.startswith(
        "FasterCache computed everything and saved nothing, because 3 steps are too few, it needs at least 4. "
    )
    assert "identical" in text


def test_without_a_reason_nothing_is_made_up():
    text = verdict(report(1.0, work_ratio=1.0, trace=idle()))
    assert text.startswith("FasterCache computed everything and saved nothing. It took as long")


def test_an_idle_method_in_fewer_steps_owes_its_speed_to_the_steps():
    fewer = {"steps": 8, "reference": {"steps": 10, "guidance": 4.0, "methods": {}}, "trace": idle(OFF)}
    assert "Its 8 steps instead of 10 were 1.25 times as fast" in verdict(report(1.25, **fewer))


def test_two_runs_without_methods():
    plain = {"methods": {}, "trace": idle(), "bit_equal": True, "work_ratio": 1.0}
    assert verdict(report(1.0, **plain)).startswith("Both runs have the same settings and no method was on.")
    fewer = verdict(report(1.7, **{**plain, "steps": 30, "bit_equal": False}))
    assert fewer.startswith("The model in 30 steps was 1.70 times as fast")
    assert verdict(report(1.7, **plain, reference={"steps": 30, "guidance": 4.0, "methods": {}})).startswith(
        "The model in"
    )
    other = verdict(report(1.1, **plain, solver="euler"))
    assert other.startswith("The euler solver in 50 steps")


def test_a_students_saving_is_its_number_of_steps():
    student = {"methods": {"gpd": {"steps": 6}}, "steps": 6, "guidance": 1.0, "work_ratio": 0.06, "trace": idle()}
    assert verdict(report(16.0, **student)).startswith("GPD was 16.0 times as fast")
