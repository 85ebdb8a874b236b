"""Training Restricted MeanFlow: intervals, targets, divergence, initial weights, and trajectories from videos."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import instant, mean, meanflow_task, timed

from accel.runtime.latents import normalize
from accel.runtime.models import ModelDefaults
from accel.runtime.video import write_mp4
from accel.students.interval_embedding import IntervalEmbedder, pack_timestep
from accel.students.weights import fingerprint
from accel.training.fast_blocks import DenseAttention
from accel.training.jobs import initialize_from, share_stages
from accel.training.loop import fit
from accel.training.meanflow_job import MeanFlowJob, has_initial_student
from accel.training.networks import FullNetworks, velocity
from accel.training.optimizer import OptimConfig
from accel.training.rollouts import TrajectoryPool
from accel.training.stages import store
from accel.training.tasks.meanflow_distillation import AVERAGED, MeanFlowConfig, MeanFlowTask, max_step_width
from accel.training.validation import TrajectoryValidator
from accel.training.video_folder import VideoFolder


def test_interval_lengths_are_uniform_up_to_r_and_a_fraction_is_empty(pipe):
    task = meanflow_task(pipe, trajectories=64, limit_to_schedule=False, max_interval=0.2)
    lengths = torch.cat([(t := torch.rand(64)) - task.interval_ends(t, step) for step in range(40)])
    assert (lengths == 0).sum() == 40 * 32 and lengths.min() >= 0 and lengths.max() <= 0.2
    inner = lengths[lengths > 0] / 0.2
    assert abs(inner.mean() - 0.5) < 0.05 and (inner > 0.95).float().mean() < 0.1  # nothing piles up at R
    t = torch.full((64,), 0.05)
    assert task.interval_ends(t, 0).min() >= 0


def test_intervals_are_limited_to_steps_of_the_schedule_with_the_fewest_steps(pipe):
    task = meanflow_task(pipe, max_interval=1.0)
    task.trajectories.index = torch.tensor([0, 1, 2, 3])
    t = task.context.sigmas[task.trajectories.index].float()
    ends = torch.stack([task.interval_ends(t, step) for step in range(50)])
    furthest = task.context.sigmas[torch.tensor([2, 3, 4, 4])].float()
    assert (ends >= furthest - 1e-6).all() and (ends.min(0).values < 0.5 * (t + furthest)).all()


def test_r_is_the_widest_step_of_the_schedules(pipe):
    pipe.scheduler.set_timesteps(10)
    widest = float((pipe.scheduler.sigmas[:-1] - pipe.scheduler.sigmas[1:]).max())
    assert max_step_width(pipe.scheduler, (20, 10)) == pytest.approx(widest)


def test_the_first_stage_learns_guided_velocities_at_each_trajectorys_own_guidance(pipe):
    task = meanflow_task(pipe)
    trajectories = task.trajectories
    w = torch.tensor([2 + 3 * rng.random() for rng in trajectories.rngs("guidance")])
    x, prompts = trajectories.x.clone(), trajectories.text.clone()
    time = 1000 * task.context.sigmas[trajectories.index].float()
    cond, uncond = (velocity(pipe.transformer, x, time, text) for text in (prompts, task.empty.expand(4, -1, -1)))
    target = uncond + w.view(-1, 1, 1, 1, 1) * (cond - uncond)
    loss, _ = task.loss(task.module, 0, 0)
    assert loss.item() == pytest.approx((cond - target).square().mean().item(), rel=1e-3)
    assert len(w.unique()) == 4 and (trajectories.index == 1).all()


@pytest.mark.parametrize("stage", [0, 1])
def test_the_student_is_given_its_trajectorys_guidance_in_both_stages(stage, pipe):
    task, guidances = meanflow_task(pipe), []
    task.stage, w = stage, task.trajectories.uniform(2, 5, "guidance")
    for model in (task.nets.module, task.nets._previous):
        model.register_forward_pre_hook(lambda _, args: guidances.append(args[1].view(3, -1)[2]))
    task.loss(task.module, 0, 0)
    assert len(guidances) == 1 + stage
    for given in guidances:
        torch.testing.assert_close(given, pack_timestep(w, w, w).view(3, -1)[2])


class Known(torch.nn.Module):
    """A network that knows the mean velocity of Gaussian data, or a multiple of it."""

    def __init__(self, factor: float):
        super().__init__()
        self.patch_embedding, self.factor = torch.nn.Linear(1, 1), factor
        self.condition_embedder = SimpleNamespace(base=SimpleNamespace(time_embedder=torch.nn.Linear(1, 1)))

    def forward(self, x, timestep, text, return_dict):
        t, r = timestep.view(3, -1, 1, 1, 1, 1)[:2] / 1000
        return (self.factor * torch.where(r < t, mean(x, t, r), instant(x, t)),)


def test_the_loss_of_the_second_stage_vanishes_only_for_the_true_mean_velocity(pipe):
    losses = []
    for factor in (1.0, 1.1, -1.0):
        nets = SimpleNamespace(
            module=Known(factor), previous=lambda x, timestep, text: Known(1.0)(x, timestep, text, 0)[0]
        )
        config = MeanFlowConfig(base_steps=4, steps=(4, 2), guidance=(2, 5), max_interval=0.5, trajectories=16, warm=1)
        known = MeanFlowTask(OptimConfig(steps=4, lr=1e-3), config, nets, timed(pipe))
        known.stage = 1
        known.trajectories.index = torch.arange(16) % 4
        losses.append(known.loss(nets.module, 0, 0)[0].item())
    assert losses[0] < 1e-4 and losses[1] > 3e-3 and losses[2] > 0.5


def test_the_second_stage_can_learn_mean_velocities_of_the_guided_base(pipe):
    asked = []

    def teacher(x, time, text, empty, w):
        asked.append(w)
        return instant(x, time.view(-1, 1, 1, 1, 1) / 1000)

    nets = SimpleNamespace(module=Known(1.0), teacher=teacher)
    config = MeanFlowConfig(
        base_steps=4, steps=(4, 2), guidance=(2, 5), max_interval=0.5, trajectories=16, warm=1, source="base"
    )
    known = MeanFlowTask(OptimConfig(steps=4, lr=1e-3), config, nets, timed(pipe))
    known.stage, known.trajectories.index = 1, torch.arange(16) % 4
    w = known.trajectories.uniform(2, 5, "guidance")
    assert known.loss(nets.module, 0, 0)[0].item() < 1e-4 and torch.equal(asked[0], w)


def test_validation_gives_the_interval_end_to_the_second_student_only(pipe):
    task, start, end = meanflow_task(pipe), torch.tensor([0]), torch.tensor([2])
    w, sigmas = torch.tensor([3.0]), task.context.sigmas.float()
    assert torch.equal(task.context.timestep(start, end), pack_timestep(sigmas[start], sigmas[start], w))
    task.stage = 1
    assert torch.equal(task.context.timestep(start, end), pack_timestep(sigmas[start], sigmas[end], w))


def test_validation_uses_the_timesteps_of_the_current_stage(pipe):
    task, timesteps = meanflow_task(pipe), []
    validator = TrajectoryValidator(task, ["a"], 3.0)

    def zero_velocity(x, t, text, **_):
        timesteps.append(t)
        return (torch.zeros_like(x),)

    task.module.forward = zero_velocity
    for stage in (0, 1):
        task.stage = stage
        validator.error(task.module, 2)
        validator.final_latent_error(task.module, 2)
    starts, ends = zip(*((time[0].item(), time[1].item()) for time in timesteps))
    sigmas = (1000 * task.context.sigmas).tolist()
    assert starts == pytest.approx(4 * [sigmas[0], sigmas[2]])
    assert ends == pytest.approx([*starts[:4], *(2 * [sigmas[2], sigmas[4]])], abs=1e-3)


@pytest.mark.parametrize("dense", [False, True])
def test_central_and_exact_derivatives_agree_on_a_transformer(pipe, dense):
    task = meanflow_task(pipe)
    for block in task.module.blocks if dense else ():
        block.attn1.set_processor(DenseAttention())  # as on a CPU with fast bfloat16
    for scalar in task.module.condition_embedder.scalars.values():
        torch.nn.init.normal_(scalar.mlp.linear_2.weight, std=0.1)
    task.module.condition_embedder.base.timesteps_proj.scale = 0.01  # as smooth as the shipped model's
    t, r, w = torch.tensor([0.8, 0.5]), torch.tensor([0.7, 0.2]), torch.tensor([4.0, 3.0])
    v = torch.randn(2, 4, 3, 4, 4)
    given = (v, t, r, w, torch.tensor([0, 1]))
    central = task.du_dt(*given)
    task.config = task.config.model_copy(update={"jvp": "exact"})
    torch.testing.assert_close(central, task.du_dt(*given), rtol=0.02, atol=2e-3)


def test_the_second_stage_corrects_the_frozen_first_students_velocity(pipe):
    task = meanflow_task(pipe)
    task.stage = 1
    before = [p.clone() for p in task.nets._previous.parameters()]
    loss, logs = task.loss(task.module, 0, 0)
    loss.backward()
    assert logs["correction"] > 0 and all(torch.equal(a, b) for a, b in zip(before, task.nets._previous.parameters()))
    embedder = task.module.condition_embedder
    assert embedder.scalars["end"].mlp.linear_2.weight.grad.abs().sum() > 0


def test_the_correction_is_phased_in_over_the_warm_up(pipe):
    task = meanflow_task(pipe, warm=4)
    task.stage = 1
    t, r, w = torch.full((4,), 0.8), torch.full((4,), 0.5), torch.full((4,), 3.0)
    v = torch.randn_like(task.trajectories.x)
    (first, logs), (last, last_logs) = (task._mean_velocity_target(v, t, r, w, step) for step in (0, 3))
    torch.testing.assert_close(4 * (first - v), last - v, rtol=1e-3, atol=1e-4)
    assert logs["correction"] == pytest.approx(last_logs["correction"], rel=1e-3)  # as large as it is without warm-up


def test_a_correction_that_grows_many_times_ends_the_stage(pipe, capsys):
    task = meanflow_task(pipe)
    for _ in range(2 * AVERAGED):
        task._record_correction(1.0)
    assert task.sizes.tolist() == pytest.approx([2 * AVERAGED, 1, 1]) and not task.diverged
    again = meanflow_task(pipe)
    again.load_state_dict(task.state_dict())
    for _ in range(3 * AVERAGED):
        again._record_correction(25.0)
    assert again.diverged and "has grown 20-fold" in capsys.readouterr().err


def test_time_frequencies_that_the_base_ignores_stay_ignored(pipe):
    weight = pipe.transformer.condition_embedder.time_embedder.linear_1.weight
    weight.data[:, ::2] = 0
    task = meanflow_task(pipe)
    task.loss(task.module, 0, 0)[0].backward()
    own = task.module.condition_embedder.base.time_embedder.linear_1.weight
    assert (own.grad[:, ::2] == 0).all() and (own.grad[:, 1::2] != 0).any()


def test_a_resumed_stage_ends_with_the_averaged_weights_of_an_unbroken_one(pipe, tmp_path):
    optim = OptimConfig(steps=3, lr=1e-3, warmup=1, ema=0.5)
    tasks = [meanflow_task(pipe) for _ in range(3)]
    for one in tasks:
        one.stage, one.optim = 1, optim
    unbroken, first, second = tasks
    fit(unbroken, tmp_path / "unbroken", minutes=None, resume=False)
    assert fit(first, tmp_path / "parts", minutes=0, resume=False)["step"] == 1
    fit(second, tmp_path / "parts", minutes=None, resume=True)
    for one, two in zip(unbroken.module.parameters(), second.module.parameters()):
        assert torch.equal(one, two)


def test_an_ablation_starts_from_the_first_stage_of_the_method(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    share = lambda: share_stages(other, own, ["guidance", "mean_velocity"], MeanFlowJob().stage_config)
    assert not share()
    for stage in ("guidance", "mean_velocity"):
        (other / stage).mkdir(parents=True)
        (other / stage / "done.json").write_text("{}")
    own.mkdir()
    record = {
        "base_fingerprint": [0.5],
        "init_from": None,
        "rank": 64,
        "config": {"trajectories": 4, "limit_to_schedule": True},
        "optims": [{"steps": 3}],
    }
    (own / "job.json").write_text(json.dumps(record))
    for change in (
        {"base_fingerprint": [0.6]},
        {"prompts": "of another file"},
        {"config": {"trajectories": 2, "limit_to_schedule": True}},
    ):
        (other / "job.json").write_text(json.dumps({**record, **change}))
        assert not share() and not (own / "guidance").exists()
    change = {"config": {"trajectories": 4, "limit_to_schedule": False}, "optims": [{"steps": 3}, {"steps": 9}]}
    (other / "job.json").write_text(json.dumps({**record, **change}))
    assert share() and (own / "guidance" / "done.json").is_file() and not (own / "mean_velocity").exists()


def test_a_student_of_another_base_is_not_started_from(pipe, tmp_path, capsys):
    assert not has_initial_student(tmp_path, pipe.transformer)
    store(
        FullNetworks(pipe.transformer),
        tmp_path / "gpd-N48",
        "gpd.json",
        {"base_fingerprint": fingerprint(pipe.transformer)},
    )
    assert has_initial_student(tmp_path, pipe.transformer)
    with torch.no_grad():
        for weight in pipe.transformer.parameters():
            weight.add_(0.1)
    assert not has_initial_student(tmp_path, pipe.transformer) and "another base model" in capsys.readouterr().err


def test_initial_weights_keep_zeros_of_the_time_embedding(pipe, tmp_path):
    base = pipe.transformer
    nets = FullNetworks(base)
    for p in nets.module.parameters():
        p.data.add_(0.1)
    nets.save(tmp_path)
    weight = base.condition_embedder.time_embedder.linear_1.weight
    weight.data[:, ::2] = 0
    base.condition_embedder = IntervalEmbedder(base.condition_embedder)
    student = FullNetworks(base).module
    initialize_from(student, base, tmp_path)
    own = student.condition_embedder.base.time_embedder.linear_1.weight
    assert (own[:, ::2] == 0).all() and torch.allclose(own[:, 1::2], weight[:, 1::2] + 0.1, atol=2e-3)
    assert torch.allclose(student.proj_out.weight, base.proj_out.weight + 0.1, atol=2e-3)


@pytest.fixture
def fresh_accelerator():
    """Lets a test choose the mixed precision, which accelerate fixes for the rest of a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_derivatives_have_full_precision_inside_the_training_loop(pipe, fresh_accelerator):
    """accelerate wraps the module's forward in an autocast, in which differences of bfloat16 would be noise."""
    task = meanflow_task(pipe)
    given = torch.tensor([0.8]), torch.tensor([0.7]), torch.tensor([4.0]), torch.tensor([0])
    v = torch.randn(1, 4, 3, 4, 4)
    alone = task.du_dt(v, *given)
    accelerator = Accelerator(mixed_precision="bf16")
    accelerator.prepare(task.module)
    with accelerator.autocast():
        assert torch.equal(task.du_dt(v, *given), alone)


def test_trajectories_can_start_between_noise_and_a_video(pipe, tmp_path):
    """At sigma s a trajectory is (1 - s) of the video's latents plus s of noise, with the video's caption."""
    video = torch.full((4, 3, 4, 4), 5.0)
    context = replace(timed(pipe, 10), draw_video=lambda rng: ("a" * 9, video))
    trajectories = TrajectoryPool(context, 64, (0, 1), 0)
    sigmas = context.sigmas[trajectories.index].float()
    assert len(trajectories.index.unique()) > 5 and (trajectories.text == 1).all()
    torch.testing.assert_close(trajectories.x.mean((1, 2, 3, 4)), 5 * (1 - sigmas), atol=0.5, rtol=0)
    began = trajectories.index.clone()
    trajectories.spread_timesteps(lambda t: torch.zeros_like(trajectories.x), 3)
    assert (trajectories.index >= began).all() and (trajectories.index > began).any()


def test_a_video_folder_gives_captions_and_latents_of_the_models_size(pipe, tmp_path):
    defaults = ModelDefaults(height=32, width=32, frames=5, steps=4, guidance=3.0)
    wrongs = ((None, "captions.json is missing"), ({"a.mp4": "x"}, "has no a.mp4"), ({}, "names no videos"))
    for wrong, reason in wrongs:
        if wrong is not None:
            (tmp_path / "captions.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=reason):
            VideoFolder(tmp_path, pipe, defaults)
    (tmp_path / "captions.json").write_text(json.dumps({"a.mp4": "a red star"}))
    write_mp4(tmp_path / "a.mp4", np.full((6, 64, 64, 3), 200, np.uint8), 8)
    caption, z = VideoFolder(tmp_path, pipe, defaults).draw(random.Random(0))
    with torch.no_grad():
        x = torch.full((1, 3, 5, 32, 32), 200 / 127.5 - 1)
        expected = normalize(pipe.vae, pipe.vae.encode(x).latent_dist.mode())[0]
    assert caption == "a red star"
    torch.testing.assert_close(z, expected, atol=0.1, rtol=0.1)
    with pytest.raises(ValueError, match="a.mp4 has 6 frames, 9 are needed"):
        VideoFolder(tmp_path, pipe, defaults.model_copy(update={"frames": 9})).draw(random.Random(0))
