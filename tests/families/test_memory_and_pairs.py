"""Memory estimates of every pipeline, and two caches together."""

import diffusers
import pytest
from families.test_contract import CACHING, METHODS, PREDICTING, REDUCING, WITHOUT_STACK, all_but, sample, stock
from families.tiny import TINY

import accel


@pytest.mark.parametrize("name", all_but())
def test_peak_memory_is_at_most_the_estimate(name):
    pipe, inputs = TINY[name]()
    for method in (CACHING, REDUCING, METHODS["asymrnr"](), *(() if name in WITHOUT_STACK else (PREDICTING,))):
        with accel.apply(pipe, method) as trace:
            sample(pipe, inputs, name)
        assert 0 < trace.summary()["peak_bytes"] <= trace.summary()["estimated_bytes"]


@pytest.mark.parametrize("name", all_but(*WITHOUT_STACK))
def test_fastercache_and_disca_together_err_little_more_than_each(name):
    pipe, inputs = TINY[name]()
    errors = []
    for methods in ([CACHING], [PREDICTING], [PREDICTING, CACHING]):
        with accel.apply(pipe, methods):
            errors.append((sample(pipe, inputs, name) - stock(name)).abs().max())
    assert errors[2] < 3 * (errors[0] + errors[1])


@pytest.mark.slow
def test_guidance_that_begins_later_is_in_the_estimate_and_its_branch_is_rebuilt():
    """HunyuanVideo 1.5, whose guider adds the unconditional branch from step 4 of 14 on."""
    pipe, inputs = TINY["hunyuan_video_15"]()
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0, start=0.3)
    with accel.apply(pipe, [METHODS["fastercache"]()]) as trace:
        pipe(**inputs, num_inference_steps=14, output_type="latent")
    assert 0 < trace.peak_bytes <= trace.estimated_bytes
    assert "rebuild" in {event.action for event in trace.events.values()}
    assert not any("guidance is off" in message for message in trace.messages)


@pytest.mark.slow
def test_the_branch_difference_is_not_taken_in_a_step_that_extrapolates():
    """HunyuanVideo 1.5: the first guided step, 19 of 50, extrapolates one branch and computes the other."""
    pipe, inputs = TINY["hunyuan_video_15"]()
    pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0, start=0.38)
    method = METHODS["fastercache"]()
    plans = method.plan(50)
    assert not plans[19].attention and not plans[19].guidance
    with accel.apply(pipe, [method]) as trace:
        pipe(**inputs, num_inference_steps=50, output_type="latent")
    rebuilt = [e.step for e in trace.events.values() if e.action == "rebuild"]
    assert min(rebuilt) > next(i for i in range(19, 50) if plans[i].attention)
