"""Restricted MeanFlow: the identity where the mean velocity is known, the intervals, and what a student is told."""

import json
import random
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import make_meanflow, random_wan
from safetensors.torch import load_file

import accel
from accel.conditioning import TOLD, IntervalEmbedder, conditioned, packed, unwrapped
from accel.flow import euler, mean_flow_target, slope_central, slope_exact
from accel.methods import AsymRnR, MeanFlow
from accel.models import Home
from accel.training.clips import Clips
from accel.training.fit import Recipe, fit
from accel.training.meanflow import SEEN, Course, MeanFlowTask, longest_step
from accel.training.slots import Slots, TimedGround, ground_of, walk
from accel.training.students import Copies, velocity
from accel.training.teach_meanflow import share_first_stage, start_from
from accel.training.vae import normalise
from accel.video import write_mp4
from accel.weights import load_differences

SPREAD = 0.5  # deviation of the data: x0 ~ N(0, SPREAD^2)


def deviation(t):
    """Of x at level t, for data and noise that are Gaussian."""
    return ((1 - t) ** 2 * SPREAD**2 + t**2).sqrt()


def instant(x, t):
    """The velocity: the logarithmic derivative of the deviation, times x."""
    return x * (t - (1 - t) * SPREAD**2) / deviation(t) ** 2


def mean(x, t, r):
    """The mean velocity from t to r: states keep their place among the others, so x_r / x_t is known."""
    return x * (1 - deviation(r) / deviation(t)) / (t - r)


def doubles(*values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@pytest.mark.parametrize(
    "slope", [slope_exact, lambda u, x, t, v: slope_central(u, x, t, v, torch.tensor([0.3]), 1e-4)]
)
def test_the_identity_holds_for_the_known_mean_velocity(slope):
    x, t, r = doubles(1.3, 0.8, 0.3)
    v = instant(x, t)
    u = lambda x, t: mean(x, t, r)
    torch.testing.assert_close(mean_flow_target(v, slope(u, x, t, v), t, r), mean(x, t, r), rtol=1e-6, atol=0)


def test_one_step_of_the_mean_velocity_goes_the_whole_way():
    x, t, r = doubles(1.3, 0.8, 0.3)
    torch.testing.assert_close(euler(x, mean(x, t, r), t, r), x * deviation(r) / deviation(t))


def test_an_error_of_the_slope_counts_as_the_interval_is_long():
    x, t, near, far = doubles(1.3, 0.8, 0.7, 0.2)
    v = instant(x, t)
    wrong = lambda r: (
        (mean_flow_target(v, torch.ones(1), t, r) - mean_flow_target(v, torch.zeros(1), t, r)).abs().item()
    )
    assert wrong(far) == pytest.approx(6 * wrong(near))


def test_a_central_difference_stays_between_the_end_of_the_interval_and_one():
    seen = []
    u = lambda x, t: (seen.extend(t.tolist()), x * t[:, None])[1]
    x, t, r = torch.ones(2, 1), torch.tensor([0.999, 0.301]), torch.tensor([0.5, 0.3])
    slope = slope_central(u, x, t, torch.zeros(2, 1), r, 0.005)
    assert min(seen) >= 0.3 and max(seen) <= 1 and slope.flatten().tolist() == pytest.approx([1, 1], rel=1e-4)


def call(model, time, b=2):
    torch.manual_seed(3)
    return model(torch.randn(b, 4, 3, 8, 8), time, torch.randn(b, 6, 16), return_dict=False)[0]


@torch.no_grad()
def test_an_embedder_that_is_not_trained_changes_nothing_bitwise():
    model, time = random_wan(), torch.tensor([700.0, 300.0])
    plain = call(model, time)
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    assert torch.equal(call(model, time), plain)
    assert torch.equal(call(model, packed(time / 1000, time / 2000, torch.tensor([4.0, 3.0]))), plain)
    with unwrapped(model):
        assert torch.equal(call(model, time), plain)


@torch.no_grad()
def test_a_trained_embedder_tells_the_end_and_the_guidance():
    model = random_wan()
    wrapper = IntervalEmbedder(model.condition_embedder)
    for told in wrapper.told.values():
        torch.nn.init.normal_(told.mlp.linear_2.weight)
    now, then, w = torch.tensor([0.7]), torch.tensor([0.3]), torch.tensor([4.0])
    with conditioned(model, wrapper.told.state_dict()):
        first = call(model, packed(now, then, w), 1)
        assert not torch.equal(call(model, packed(now, then / 2, w), 1), first)
        assert not torch.equal(call(model, packed(now, then, w / 2), 1), first)
    assert not isinstance(model.condition_embedder, IntervalEmbedder)


def timed(pipe, steps=4) -> TimedGround:
    home = Home(height=32, width=32, frames=5, steps=4, guidance=3.0, text_length=6)
    pipe.encode_prompt = lambda texts, **_: (torch.stack([torch.full((6, 16), len(t) / 9) for t in texts]),)
    return TimedGround(**vars(ground_of(pipe, home, steps, lambda rng: "a" * rng.randrange(1, 9))), guidance=3.0)


def task(pipe, **course) -> MeanFlowTask:
    if not isinstance(pipe.transformer.condition_embedder, IntervalEmbedder):
        pipe.transformer.condition_embedder = IntervalEmbedder(pipe.transformer.condition_embedder)
    given = {"base_steps": 4, "steps": (4, 2), "guidance": (2.0, 5.0), "longest": 0.5, "slots": 4, "hop": 1, "warm": 1}
    return MeanFlowTask(Recipe(steps=4, lr=1e-3), Course(**given | course), Copies(pipe.transformer), timed(pipe))


def test_intervals_are_spread_evenly_up_to_r_and_a_share_is_empty(pipe):
    many = task(pipe, slots=64, follow=False, longest=0.2)
    lengths = torch.cat([(now := torch.rand(64)) - many.ends(now, step) for step in range(40)])
    assert (lengths == 0).sum() == 40 * 32 and lengths.min() >= 0 and lengths.max() <= 0.2
    inner = lengths[lengths > 0] / 0.2
    assert abs(inner.mean() - 0.5) < 0.05 and (inner > 0.95).float().mean() < 0.1  # nothing piles up at R
    now = torch.full((64,), 0.05)
    assert many.ends(now, 0).min() >= 0


def test_intervals_follow_the_schedule_of_the_fewest_steps(pipe):
    some = task(pipe, longest=1.0)
    some.slots.index = torch.tensor([0, 1, 2, 3])
    now = some.ground.levels[some.slots.index].float()
    ends = torch.stack([some.ends(now, step) for step in range(50)])
    farthest = some.ground.levels[torch.tensor([2, 3, 4, 4])].float()
    assert (ends >= farthest - 1e-6).all() and (ends.min(0).values < 0.5 * (now + farthest)).all()


def test_r_is_the_widest_step_of_the_schedules(pipe):
    pipe.scheduler.set_timesteps(10)
    widest = float((pipe.scheduler.sigmas[:-1] - pipe.scheduler.sigmas[1:]).max())
    assert longest_step(pipe.scheduler, (20, 10)) == pytest.approx(widest)


def test_the_first_stage_teaches_guided_velocities_at_each_slots_own_guidance(pipe):
    mean = task(pipe)
    slots = mean.slots
    w = torch.tensor([2 + 3 * rng.random() for rng in slots.chance("guidance")])
    x, words, time = slots.x.clone(), slots.words.clone(), 1000 * mean.ground.levels[slots.index].float()
    cond, uncond = (velocity(pipe.transformer, x, time, text) for text in (words, mean.empty.expand(4, -1, -1)))
    target = uncond + w.view(-1, 1, 1, 1, 1) * (cond - uncond)
    loss, _ = mean.loss(mean.module, 0, 0)
    assert loss.item() == pytest.approx((cond - target).square().mean().item(), rel=1e-3)
    assert len(w.unique()) == 4 and (slots.index == 1).all()


def test_both_slopes_agree_on_a_transformer(pipe):
    mean = task(pipe)
    for told in mean.module.condition_embedder.told.values():
        torch.nn.init.normal_(told.mlp.linear_2.weight, std=0.1)
    mean.module.condition_embedder.base.timesteps_proj.scale = 0.01  # as smooth as the shipped model's
    now, then, w, v = (
        torch.tensor([0.8, 0.5]),
        torch.tensor([0.7, 0.2]),
        torch.tensor([4.0, 3.0]),
        torch.randn(2, 4, 3, 4, 4),
    )
    given = (v, now, then, w, torch.tensor([0, 1]))
    central = mean.slope(*given)
    mean.course = mean.course.model_copy(update={"slope": "exact"})
    torch.testing.assert_close(central, mean.slope(*given), rtol=0.02, atol=2e-3)


def test_the_second_stage_corrects_the_frozen_first_students_velocity(pipe):
    mean = task(pipe)
    mean.stage = 1
    before = [p.clone() for p in mean.nets._previous.parameters()]
    loss, logs = mean.loss(mean.module, 0, 0)
    loss.backward()
    assert logs["correction"] > 0 and all(torch.equal(a, b) for a, b in zip(before, mean.nets._previous.parameters()))
    embedder = mean.module.condition_embedder
    assert embedder.told["end"].mlp.linear_2.weight.grad.abs().sum() > 0


def test_a_correction_that_grows_many_times_ends_the_stage(pipe, capsys):
    mean = task(pipe)
    for _ in range(2 * SEEN):
        mean._watch(1.0)
    assert mean.sizes.tolist() == pytest.approx([2 * SEEN, 1, 1]) and not mean.diverged
    again = task(pipe)
    again.load_state_dict(mean.state_dict())
    for _ in range(3 * SEEN):
        again._watch(25.0)
    assert again.diverged and "has grown 20-fold" in capsys.readouterr().err


def test_time_frequencies_that_the_base_does_not_see_stay_unseen(pipe):
    weight = pipe.transformer.condition_embedder.time_embedder.linear_1.weight
    weight.data[:, ::2] = 0
    mean = task(pipe)
    mean.loss(mean.module, 0, 0)[0].backward()
    own = mean.module.condition_embedder.base.time_embedder.linear_1.weight
    assert (own.grad[:, ::2] == 0).all() and (own.grad[:, 1::2] != 0).any()


def test_a_resumed_stage_ends_with_the_weights_of_an_unbroken_one(pipe, tmp_path):
    recipe = Recipe(steps=3, lr=1e-3, warmup=1, ema=0.0)
    tasks = [task(pipe) for _ in range(3)]
    for one in tasks:
        one.stage, one.recipe = 1, recipe
    whole, first, second = tasks
    fit(whole, tmp_path / "whole", minutes=None, resume=False)
    assert fit(first, tmp_path / "parts", minutes=0, resume=False)["step"] == 1
    fit(second, tmp_path / "parts", minutes=None, resume=True)
    for one, two in zip(whole.module.parameters(), second.module.parameters()):
        assert torch.equal(one, two)


@pytest.fixture
def student(pipe, tmp_path) -> MeanFlow:
    pipe.register_to_config(_name_or_path=str(tmp_path))
    make_meanflow(pipe, tmp_path / "meanflow", (2.0, 5.0))
    return MeanFlow(steps=5)


def trained(pipe, folder):
    """A copy of the pipeline's transformer with the weights of a student's folder, and nothing of the method on it."""
    own = deepcopy(pipe.transformer)
    for name, p in load_differences(pipe.transformer, folder / "model.safetensors").items():
        own.get_parameter(name).data.copy_(p)
    own.condition_embedder = IntervalEmbedder(own.condition_embedder)
    own.condition_embedder.told.load_state_dict(load_file(folder / TOLD))
    return own


@torch.no_grad()
def way(model, levels, ends, w=4.0):
    """Euler steps of a student from the noise of seed 0, told of these ends."""
    words = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))[0]
    x = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for now, then, end in zip(levels, levels[1:], ends):
        told = packed(*(torch.tensor([value]) for value in (now, end, w)))
        x = x + (then - now) * model(x, told, words, return_dict=False)[0]
    return x


@pytest.mark.parametrize("instant", [False, True])
def test_a_stored_student_goes_the_way_of_the_trained_one(instant, pipe, student, sample):
    """Each call is told the next level as the end, 0 at the last; one that learnt guidance alone is told none."""
    folder = student.folder(pipe.name_or_path)
    file = folder / "meanflow.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"instant": instant}))
    own = trained(pipe, folder)
    with accel.apply(pipe, [student]) as trace:
        end = sample(pipe, steps=5, guidance=1.0)
    levels = [trace.sigmas[i] for i in range(5)] + [0.0]
    ends = levels[:-1] if instant else levels[1:]
    torch.testing.assert_close(end, way(own, levels, ends), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(end, way(own, levels, levels[1:] if instant else levels[:-1]), atol=1e-3)
    assert trace.summary()["calls"] == {"compute": 5}


def test_runs_that_a_student_cannot_make_are_refused_with_the_reason(pipe, student, sample):
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="set guidance to 1"), accel.apply(pipe, [student]):
        sample(pipe, steps=5, guidance=4.0)
    with pytest.raises(ValueError, match="guidance = 6: this student learnt 2 to 5"):
        with accel.apply(pipe, [MeanFlow(steps=5, guidance=6)]):
            pass
    with pytest.raises(ValueError, match="mean velocities, UniPCMultistepScheduler takes them for slopes"):
        with accel.apply(pipe, [student]):
            pipe.scheduler = scheduler
            sample(pipe, steps=5, guidance=1.0)
    with pytest.raises(ValueError, match="there is no student 'nowhere' in that place .*; there are meanflow"):
        with accel.apply(pipe, [MeanFlow(student=str(student.folder(pipe.name_or_path).parent / "nowhere"))]):
            pass
    assert pipe.scheduler is scheduler


def test_steps_wider_than_the_student_learnt_are_told(pipe, student, sample):
    with accel.apply(pipe, [MeanFlow(steps=4)]) as trace:
        sample(pipe, steps=4, guidance=1.0)
    assert trace.notes[0].startswith("MeanFlow: 4 steps are up to 0.5")


def test_a_student_goes_together_with_token_reduction(pipe, student, sample):
    for methods in ([student, AsymRnR(schedule="fixed", start=0)], [AsymRnR(schedule="fixed", start=0), student]):
        with accel.apply(pipe, methods) as trace:
            sample(pipe, steps=5, guidance=1.0)
        assert trace.summary()["attention"].get("reduce") and trace.summary()["steps"] == 5


def test_a_rival_begins_with_the_first_stage_of_the_method(tmp_path):
    assert not share_first_stage(tmp_path / "none", tmp_path / "own")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "done.json").write_text("{}")
    assert share_first_stage(tmp_path / "done", tmp_path / "own") and (tmp_path / "own" / "done.json").is_file()


def test_a_head_start_keeps_zeros_of_the_time_embedding(pipe, tmp_path):
    base = pipe.transformer
    nets = Copies(base)
    for p in nets.module.parameters():
        p.data.add_(0.1)
    nets.save(tmp_path)
    weight = base.condition_embedder.time_embedder.linear_1.weight
    weight.data[:, ::2] = 0
    base.condition_embedder = IntervalEmbedder(base.condition_embedder)
    student = Copies(base).module
    start_from(student, base, tmp_path)
    own = student.condition_embedder.base.time_embedder.linear_1.weight
    assert (own[:, ::2] == 0).all() and torch.allclose(own[:, 1::2], weight[:, 1::2] + 0.1, atol=2e-3)
    assert torch.allclose(student.proj_out.weight, base.proj_out.weight + 0.1, atol=2e-3)


def test_training_walks_the_way_of_the_pipeline(pipe, student, sample):
    own, words = trained(pipe, student.folder(pipe.name_or_path)), torch.randn(2, 1, 6, 16)
    pipe.scheduler.set_timesteps(5)
    levels = pipe.scheduler.sigmas.double()
    words = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))[0]
    ground = TimedGround(lambda texts: words, lambda rng: "a", levels, 1000 * levels[:-1], (4, 3, 8, 8), guidance=4.0)
    x = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with accel.apply(pipe, [student]):
        end = sample(pipe, steps=5, guidance=1.0)
    with torch.no_grad():
        torch.testing.assert_close(walk(own, ground, x, words, 1), end, rtol=0.02, atol=0.03)  # bfloat16


def test_slopes_are_fine_inside_the_loop_that_trains(pipe):
    """accelerate wraps the module's forward in an autocast of its own: differences of bfloat16 would be noise."""
    mean = task(pipe)
    given = torch.tensor([0.8]), torch.tensor([0.7]), torch.tensor([4.0]), torch.tensor([0])
    v = torch.randn(1, 4, 3, 4, 4)
    alone = mean.slope(v, *given)
    accelerator = Accelerator(mixed_precision="bf16")
    accelerator.prepare(mean.module)
    with accelerator.autocast():
        assert torch.equal(mean.slope(v, *given), alone)


def test_trajectories_can_begin_between_noise_and_a_video(pipe, tmp_path):
    """At level s a slot is (1 - s) of the video's latents and s of noise, with the video's caption."""
    clip = torch.full((4, 3, 4, 4), 5.0)
    ground = replace(timed(pipe, 10), clips=lambda rng: ("a" * 9, clip))
    slots = Slots(ground, 64, (0, 1), 0)
    levels = ground.levels[slots.index].float()
    assert len(slots.index.unique()) > 5 and (slots.words == 1).all()
    torch.testing.assert_close(slots.x.mean((1, 2, 3, 4)), 5 * (1 - levels), atol=0.5, rtol=0)


def test_clips_are_a_folders_videos_as_latents_of_the_models_size(pipe, tmp_path):
    home = Home(height=32, width=32, frames=5, steps=4, guidance=3.0)
    wrongs = ((None, "captions.json is missing"), ({"a.mp4": "x"}, "has no a.mp4"), ({}, "names no videos"))
    for wrong, reason in wrongs:
        if wrong is not None:
            (tmp_path / "captions.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=reason):
            Clips(tmp_path, pipe, home)
    (tmp_path / "captions.json").write_text(json.dumps({"a.mp4": "a red star"}))
    write_mp4(tmp_path / "a.mp4", np.full((6, 64, 64, 3), 200, np.uint8), 8)
    caption, z = Clips(tmp_path, pipe, home).draw(random.Random(0))
    with torch.no_grad():
        x = torch.full((1, 3, 5, 32, 32), 200 / 127.5 - 1)
        expected = normalise(pipe.vae, pipe.vae.encode(x).latent_dist.mode())[0]
    assert caption == "a red star"
    torch.testing.assert_close(z, expected, atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="a.mp4 has 6 frames, 9 are needed"):
        Clips(tmp_path, pipe, home.model_copy(update={"frames": 9})).draw(random.Random(0))
