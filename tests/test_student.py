"""A student in place of the denoiser: its grid, its weights, and the runs that it refuses."""

import json
from contextlib import contextmanager

import pytest
import torch

import accel
from accel.methods.base import Method
from accel.methods.gpd import GPD
from accel.training.distil import store
from accel.weights import marks

LEVELS = [1.0, 0.75, 0.6, 0.4, 0.3, 0.1, 0.0]
TIMES = [999, 750, 600, 400, 300, 100]


@pytest.fixture
def student(pipe, tmp_path) -> GPD:
    """A student of 6 steps beside the pipeline's model: the base with its last projection halved."""
    pipe.register_to_config(_name_or_path=str(tmp_path))
    facts = {"steps": 6, "levels": LEVELS, "times": TIMES, "base": marks(pipe.transformer)}
    before = pipe.transformer.proj_out.weight.data.clone()
    pipe.transformer.proj_out.weight.data.mul_(0.5)
    store(pipe.transformer, tmp_path / "gpd-N6", facts)
    pipe.transformer.proj_out.weight.data.copy_(before)
    return GPD(steps=6)


def test_six_calls_at_the_students_own_levels_and_nothing_stays_behind(student, pipe, sample):
    plain, scheduler = sample(pipe), pipe.scheduler
    with accel.apply(pipe, [student]) as trace:
        sample(pipe, steps=6, guidance=1.0)
    assert trace.summary()["calls"] == {"compute": 6}
    assert [trace.sigmas[i] for i in range(6)] == pytest.approx(LEVELS[:-1])
    assert pipe.scheduler is scheduler and torch.equal(sample(pipe), plain)


def test_the_way_is_euler_with_the_students_velocity(student, pipe, sample):
    """Each state is the one before, carried by the velocity of one call at that level's own timestep."""
    seen = []

    class Spy(Method):
        @contextmanager
        def apply(self, host, trace):
            def spy(inner, x, **inputs):
                v = inner(x, **inputs)
                seen.append((x, v, inputs["timestep"].item()))
                return v

            with host.wrap_denoiser(spy):
                yield

    with accel.apply(pipe, [student, Spy()]):
        end = sample(pipe, steps=6, guidance=1.0)
    states = [*(x for x, _, _ in seen[1:]), end]
    for (x, v, time), then, now, level, t in zip(seen, states, LEVELS, LEVELS[1:], TIMES, strict=False):
        torch.testing.assert_close(then, x + (level - now) * v)
        assert time == t


def test_runs_that_a_student_cannot_make_are_refused_with_the_reason(student, pipe, sample):
    plain = sample(pipe)
    for asked, reason in (
        (dict(steps=20, guidance=1.0), "this student makes 6 steps, not 20: set steps to 6, or choose another student"),
        (dict(steps=6, guidance=4.0), "a student has guidance built in, .*: set guidance to 1"),
    ):
        with pytest.raises(ValueError, match=reason), accel.apply(pipe, [student]):
            sample(pipe, **asked)
    assert torch.equal(sample(pipe), plain)


def test_students_that_are_missing_strange_or_of_another_base_are_refused(student, pipe, tmp_path):
    def refuses(method, reason):
        with pytest.raises(ValueError, match=reason), accel.apply(pipe, [method]):
            pass

    refuses(GPD(steps=12), "there is no student 'gpd-N12' beside this model; there are gpd-N6")
    file = tmp_path / "gpd-N6" / "gpd.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "base": [m + 1 for m in facts["base"]]}))
    refuses(student, "student 'gpd-N6' was made from another base model: train it from this one")
    file.write_text(json.dumps({"steps": 6}))
    refuses(student, "gpd.json is no student: Field required")


def test_a_base_is_known_again_in_half_precision(student, pipe):
    pipe.transformer.to(torch.bfloat16)
    with accel.apply(pipe, [student]):
        assert pipe.transformer.proj_out.weight.dtype == torch.bfloat16
