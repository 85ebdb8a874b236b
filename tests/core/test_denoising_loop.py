"""Noise levels of every kind of scheduler, and how runs, steps and branches are told apart."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from accel.core.denoising_loop import CallTracker, noise_levels
from accel.errors import AccelError

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
TEXT = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True),  # Mochi's
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW),
        DPMSolverMultistepScheduler(**FLOW),
        UniPCMultistepScheduler(),
        CogVideoXDDIMScheduler(),
        CogVideoXDPMScheduler(),
    ],
    ids=lambda scheduler: f"{type(scheduler).__name__}",
)
def test_noise_levels_fall_from_near_one_to_zero(scheduler):
    scheduler.set_timesteps(6)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) + 1
    assert 0.95 < levels[0] <= 1 and levels == sorted(levels, reverse=True) and levels[-1] == pytest.approx(0, abs=0.03)


def test_noise_levels_by_hand():
    scheduler = SimpleNamespace(timesteps=torch.tensor([1, 0]), alphas_cumprod=torch.tensor([0.75, 0.36]))
    assert noise_levels(scheduler) == pytest.approx([0.8, 0.5, 0.0])
    inverted = SimpleNamespace(
        timesteps=torch.zeros(2), sigmas=torch.tensor([0.0, 0.25, 1.0]), config={"invert_sigmas": True}
    )
    assert noise_levels(inverted) == [1.0, 0.75, 0.0]


def test_a_scheduler_that_tells_no_noise_levels_is_refused():
    with pytest.raises(AccelError, match="SimpleNamespace tells no noise levels: choose a scheduler with sigmas"):
        noise_levels(SimpleNamespace(timesteps=torch.zeros(2)))


def places(tracker: CallTracker, times: list[float], calls, schedule=None) -> list[tuple]:
    """(index, branch, begins) of calls, which are (timestep, name or text)."""
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor(times) if schedule is None else schedule))
    found = []
    for time, name in calls:
        named = isinstance(name, str)
        at = tracker.locate(pipe, torch.tensor([time]), TEXT if named else name, name if named else None, True)
        found.append((at.index, at.branch, at.begins))
    return found


@pytest.mark.parametrize("times", [[900.0, 500.0, 100.0], [100.0, 500.0, 900.0]], ids=["falling", "rising"])
def test_each_timestep_is_a_step_whichever_way_they_go(times):
    calls = [(time, name) for time in times for name in ("pred_cond", "pred_uncond")]
    found = places(CallTracker(), times, calls)
    assert [place[0] for place in found] == [0, 0, 1, 1, 2, 2] and [place[2] for place in found] == [True] + [False] * 5
    assert {place[1] for place in found} == {"cond", "uncond"}


def test_a_timestep_that_is_evaluated_twice_is_two_steps():
    found = places(CallTracker(), [900.0, 500.0, 500.0], [(time, "cond") for time in (900.0, 500.0, 500.0)])
    assert [place[0] for place in found] == [0, 1, 2]


def test_a_new_list_of_timesteps_or_going_back_in_it_is_a_new_run():
    tracker, schedule = CallTracker(), torch.tensor([900.0, 500.0])
    calls = [(900.0, "cond"), (500.0, "cond"), (900.0, "cond"), (500.0, "cond")]
    assert [place[2] for place in places(tracker, [], calls, schedule)] == [True, False, True, False]
    assert places(tracker, [500.0, 100.0], [(500.0, "cond")])[0] == (0, "cond", True)
    one = torch.tensor([500.0])
    assert places(tracker, [], [(500.0, "cond")] * 2, one) == [(0, "cond", True)] * 2


def test_branches_without_a_name_are_told_by_their_text():
    cond, uncond, other = (torch.full((1, 2, 3), float(i)) for i in range(3))
    calls = [(900.0, cond), (900.0, uncond), (500.0, cond.clone()), (500.0, uncond), (100.0, other), (100.0, uncond)]
    found = places(CallTracker(), [900.0, 500.0, 100.0], calls)
    assert [place[1] for place in found] == ["cond", "uncond"] * 3


def test_with_one_text_for_both_branches_the_second_call_of_a_step_is_uncond():
    calls = [(time, TEXT) for time in (900.0, 500.0) for _ in range(2)]
    assert places(CallTracker(), [900.0, 500.0], calls) == [
        (0, "cond", True), (0, "uncond", False), (1, "cond", False), (1, "uncond", False),
    ]  # fmt: skip


def test_a_loop_of_more_steps_than_the_scheduler_has_is_refused():
    pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([900.0, 500.0])), num_timesteps=4)
    with pytest.raises(AccelError, match="makes 4 steps of a schedule of 2, .* set ar_step to 0"):
        CallTracker().locate(pipe, torch.tensor([900.0]), TEXT, "cond", True)


def test_a_branch_that_runs_twice_in_a_step_is_refused():
    """As in diffusers' community pipelines with skip-layer guidance: its second call would pass for the next step."""
    calls = [(900.0, "pred_cond"), (900.0, "pred_uncond"), (900.0, "pred_cond")]
    with pytest.raises(AccelError, match="runs the cond branch more than once in a step"):
        places(CallTracker(), [900.0, 500.0, 100.0], calls)


def test_a_loop_of_the_users_own_has_the_steps_of_the_scheduler():
    """What the pipeline planned in a call before is of no meaning to it."""
    times = torch.tensor([900.0, 500.0, 100.0])
    for stale in (2, 4):
        pipe = SimpleNamespace(scheduler=SimpleNamespace(timesteps=times), num_timesteps=stale)
        at = CallTracker().locate(pipe, torch.tensor([900.0]), TEXT, "cond", True, by_pipeline=False)
        assert (at.index, at.count, at.position) == (0, 3, 0)


@pytest.mark.parametrize("inference", [False, True])
def test_a_text_that_is_changed_in_place_is_a_new_text(inference):
    times = [900.0, 500.0, 100.0]
    pipe, tracker = SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor(times))), CallTracker()
    with torch.inference_mode(inference):
        text, found = torch.zeros(1, 2, 3), []
    for i, time in enumerate(times):
        if i == 2 and not inference:  # under inference mode it cannot be seen
            text.add_(1)
        found.append(tracker.locate(pipe, torch.tensor([time]), text, "cond", True).has_new_text)
    assert found == [False, False, not inference]


def test_guidance_in_an_interval_of_the_steps_keeps_its_branches():
    cond, uncond = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    calls = [(900.0, cond), (500.0, cond), (500.0, uncond), (100.0, cond)]
    assert [place[1] for place in places(CallTracker(), [900.0, 500.0, 100.0], calls)] == ["cond"] * 2 + [
        "uncond",
        "cond",
    ]
