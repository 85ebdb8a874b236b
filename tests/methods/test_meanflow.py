"""Restricted MeanFlow: the identity where the mean velocity is known, the interval embedding, and a student's runs."""

import json
from copy import deepcopy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from safetensors.torch import load_file
from support import deviation, instant, make_meanflow, mean, random_wan

import accel
from accel.methods import AsymRnR, MeanFlow
from accel.ops.flow import euler, jvp_central, jvp_exact, mean_flow_target
from accel.students.interval_embedding import (
    INTERVAL_EMBEDDER,
    IntervalEmbedder,
    pack_timestep,
    unwrapped,
    with_interval_embedder,
)
from accel.students.weights import load_int8_delta
from accel.training.rollouts import MeanFlowContext, rollout


def doubles(*values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@pytest.mark.parametrize("jvp", [jvp_exact, lambda u, x, t, v: jvp_central(u, x, t, v, torch.tensor([0.3]), 1e-4)])
def test_the_identity_holds_for_the_known_mean_velocity(jvp):
    x, t, r = doubles(1.3, 0.8, 0.3)
    v = instant(x, t)
    u = lambda x, t: mean(x, t, r)
    torch.testing.assert_close(mean_flow_target(v, jvp(u, x, t, v), t, r), mean(x, t, r), rtol=1e-6, atol=0)


def test_one_step_of_the_mean_velocity_covers_the_interval():
    x, t, r = doubles(1.3, 0.8, 0.3)
    torch.testing.assert_close(euler(x, mean(x, t, r), t, r), x * deviation(r) / deviation(t))


def test_an_error_of_the_derivative_grows_with_the_length_of_the_interval():
    x, t, near, far = doubles(1.3, 0.8, 0.7, 0.2)
    v = instant(x, t)

    def error(r):
        return (mean_flow_target(v, torch.ones(1), t, r) - mean_flow_target(v, torch.zeros(1), t, r)).abs().item()

    assert error(far) == pytest.approx(6 * error(near))


def test_a_central_difference_stays_between_the_end_of_the_interval_and_one():
    seen = []
    u = lambda x, t: (seen.extend(t.tolist()), x * t[:, None])[1]
    x, t, r = torch.ones(2, 1), torch.tensor([0.999, 0.301]), torch.tensor([0.5, 0.3])
    derivative = jvp_central(u, x, t, torch.zeros(2, 1), r, 0.005)
    assert min(seen) >= 0.3 and max(seen) <= 1 and derivative.flatten().tolist() == pytest.approx([1, 1], rel=1e-4)


def call(model, time, b=2):
    torch.manual_seed(3)
    return model(torch.randn(b, 4, 3, 8, 8), time, torch.randn(b, 6, 16), return_dict=False)[0]


@torch.no_grad()
def test_an_untrained_embedder_changes_nothing_bitwise():
    model, time = random_wan(), torch.tensor([700.0, 300.0])
    stock = call(model, time)
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    assert torch.equal(call(model, time), stock)
    assert torch.equal(call(model, pack_timestep(time / 1000, time / 2000, torch.tensor([4.0, 3.0]))), stock)
    with unwrapped(model):
        assert torch.equal(call(model, time), stock)


@torch.no_grad()
def test_a_trained_embedder_makes_the_output_depend_on_interval_end_and_guidance():
    model = random_wan()
    wrapper = IntervalEmbedder(model.condition_embedder)
    for embedding in wrapper.scalars.values():
        torch.nn.init.normal_(embedding.mlp.linear_2.weight)
    t, r, w = torch.tensor([0.7]), torch.tensor([0.3]), torch.tensor([4.0])
    with with_interval_embedder(model, wrapper.scalars.state_dict()):
        first = call(model, pack_timestep(t, r, w), 1)
        assert not torch.equal(call(model, pack_timestep(t, r / 2, w), 1), first)
        assert not torch.equal(call(model, pack_timestep(t, r, w / 2), 1), first)
    assert not isinstance(model.condition_embedder, IntervalEmbedder)


@pytest.fixture
def student(pipe, tmp_path) -> MeanFlow:
    pipe.register_to_config(_name_or_path=str(tmp_path))
    make_meanflow(pipe, tmp_path / "meanflow", (2.0, 5.0))
    return MeanFlow(steps=5)


def trained(pipe, folder):
    """A copy of the pipeline's transformer with the weights of the student in a folder, loaded without the method."""
    model = deepcopy(pipe.transformer)
    for name, p in load_int8_delta(pipe.transformer, folder / "model.safetensors").items():
        model.get_parameter(name).data.copy_(p)
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    model.condition_embedder.scalars.load_state_dict(load_file(folder / INTERVAL_EMBEDDER))
    return model


@torch.no_grad()
def trajectory_end(model, sigmas, ends, w=5.0):
    """The end of a student's Euler steps from the noise of seed 0, with these interval ends as inputs."""
    words = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))[0]
    x = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t, r, end in zip(sigmas, sigmas[1:], ends):
        timestep = pack_timestep(*(torch.tensor([value]) for value in (t, end, w)))
        x = x + (r - t) * model(x, timestep, words, return_dict=False)[0]
    return x


@pytest.mark.parametrize("guidance_only", [False, True])
def test_a_loaded_student_follows_the_trajectory_of_the_trained_one(guidance_only, pipe, student, sample):
    """Each call gets the next sigma as the interval's end, 0 at the last; with guidance only, the interval is empty."""
    folder = student.weights_dir(pipe.name_or_path)
    file = folder / "meanflow.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_only": guidance_only}))
    model = trained(pipe, folder)
    with accel.apply(pipe, [student]) as trace:
        end = sample(pipe, steps=5, guidance=1.0)
    sigmas = [trace.sigmas[i] for i in range(5)] + [0.0]
    ends, wrong_ends = (sigmas[:-1], sigmas[1:]) if guidance_only else (sigmas[1:], sigmas[:-1])
    torch.testing.assert_close(end, trajectory_end(model, sigmas, ends), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(end, trajectory_end(model, sigmas, wrong_ends), atol=1e-3)
    assert trace.summary()["calls"] == {"compute": 5}


def test_runs_that_a_student_cannot_make_are_refused_with_the_reason(pipe, student, sample):
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="set guidance to 1"), accel.apply(pipe, [student]):
        sample(pipe, steps=5, guidance=4.0)
    with pytest.raises(ValueError, match="guidance = 6: this student was trained on 2 to 5"):
        with accel.apply(pipe, [MeanFlow(steps=5, guidance=6)]):
            pass
    with pytest.raises(ValueError, match="mean velocities, which UniPCMultistepScheduler cannot use"):
        with accel.apply(pipe, [student]):
            pipe.scheduler = scheduler
            sample(pipe, steps=5, guidance=1.0)
    with pytest.raises(ValueError, match="there is no student 'nowhere' .*; there are meanflow"):
        with accel.apply(pipe, [MeanFlow(student=str(student.weights_dir(pipe.name_or_path).parent / "nowhere"))]):
            pass
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize(
    "scheduler", [FlowMatchHeunDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
                  FlowMatchEulerDiscreteScheduler(invert_sigmas=True), DDIMScheduler()],
    ids=["two evaluations", "dynamic shift", "inverted", "no flow"],
)  # fmt: skip
def test_a_scheduler_whose_noise_levels_the_student_cannot_take_is_refused(scheduler, pipe, student):
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"cannot take its noise levels from this {type(scheduler).__name__}"):
        with accel.apply(pipe, [student]):
            pass


def test_the_users_scheduler_keeps_its_timesteps(pipe, student):
    before = pipe.scheduler.timesteps.clone()
    with accel.apply(pipe, [student]):
        pass
    assert torch.equal(pipe.scheduler.timesteps, before)


def test_intervals_longer_than_in_training_are_reported(pipe, student, sample):
    with accel.apply(pipe, [MeanFlow(steps=4)]) as trace:
        sample(pipe, steps=4, guidance=1.0)
    assert trace.messages[0].startswith("MeanFlow: the longest of 4 intervals is 0.5")


def test_a_student_combines_with_token_reduction(pipe, student, sample):
    for methods in ([student, AsymRnR(schedule="fixed", start=0)], [AsymRnR(schedule="fixed", start=0), student]):
        with accel.apply(pipe, methods) as trace:
            sample(pipe, steps=5, guidance=1.0)
        assert trace.summary()["attention"].get("reduce") and trace.summary()["steps"] == 5


def test_training_rolls_out_the_trajectory_of_the_pipeline(pipe, student, sample):
    model = trained(pipe, student.weights_dir(pipe.name_or_path))
    pipe.scheduler.set_timesteps(5)
    sigmas = pipe.scheduler.sigmas.double()
    words = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))[0]
    context = MeanFlowContext(
        lambda texts: words, lambda rng: "a", sigmas, 1000 * sigmas[:-1], (4, 3, 8, 8), guidance=5.0
    )
    x = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with accel.apply(pipe, [student]):
        end = sample(pipe, steps=5, guidance=1.0)
    with torch.no_grad():
        torch.testing.assert_close(rollout(model, context, x, words, 1), end, rtol=0.02, atol=0.03)  # bfloat16
