"""Guided progressive distillation on velocity fields with known solutions: targets, moves, training, stages, resume."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from support import gpd_task, shifted_sigmas

from accel.ops.flow import euler, mean_velocity
from accel.ops.spectrum import high_energy, high_pass
from accel.runtime.models import ModelDefaults
from accel.students.weights import ADAPTER, load_int8_delta
from accel.training.loop import fit
from accel.training.networks import FullNetworks, guided, velocity
from accel.training.optimizer import OptimConfig
from accel.training.rollouts import RolloutContext, rollout_context
from accel.training.stages import distil, store
from accel.training.tasks.gpd_distillation import GpdConfig, GpdTask
from accel.training.validation import StageMonitor, TrajectoryValidator

SHAPE = (4, 3, 4, 4)
OPTIM = OptimConfig(steps=10, lr=1e-3)
SIGMAS = shifted_sigmas(48)


class KnownNetworks:
    """Networks with known velocities: the teacher's is -x times guidance and sigma, the previous student's is given."""

    module = torch.nn.Identity()

    def __init__(self, previous_velocity=None):
        self.previous_velocity, self.calls = previous_velocity, []

    def teacher(self, x, t, text, empty, guidance):
        self.calls.append("teacher")
        return -guidance * x * t.view(-1, 1, 1, 1, 1) / 1000

    def previous(self, x, t, text):
        self.calls.append("previous")
        return self.previous_velocity(x, t)


def task(nets, **config):
    context = RolloutContext(
        encode=lambda texts: torch.tensor([[[float(len(text))]] for text in texts]),
        draw_prompt=lambda rng: "a" * rng.randrange(1, 9),
        sigmas=SIGMAS,
        timesteps=1000 * SIGMAS[:-1],
        shape=SHAPE,
    )
    return GpdTask(OPTIM, GpdConfig(**{"trajectories": 4, **config}), nets, context)


def teacher_steps(guidance, x, index, k):
    """x after k Euler steps of the teacher from base step `index` (s,)."""
    for i in range(k):
        t = SIGMAS[index + i]
        v = -guidance * x * t.view(-1, 1, 1, 1, 1)
        x = euler(x, v, t, SIGMAS[(index + i + 1).clamp(max=48)])
    return x


def test_one_step_at_the_mean_velocity_ends_where_the_pieces_end():
    x, (a, b) = torch.randn(2, 3), torch.randn(2, 2, 3)
    now, middle, end = torch.tensor([0.9, 0.9]), torch.tensor([0.6, 0.9]), torch.tensor([0.2, 0.8])
    there = euler(euler(x, a, now, middle), b, middle, end)
    torch.testing.assert_close(euler(x, mean_velocity([a, b], [now, middle, end]), now, end), there)


@pytest.mark.parametrize("scheme", ["online", "direct"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_target_is_k_guided_steps_if_the_previous_student_is_perfect(scheme, k):
    index = torch.tensor([0, 7, 20, 40])

    def perfect(x, t):  # of horizon k - 1
        assert torch.equal(t, 1000 * SIGMAS[index])
        return (teacher_steps(3, x, index, k - 1) - x) / (SIGMAS[index + k - 1] - SIGMAS[index]).view(-1, 1, 1, 1, 1)

    nets = KnownNetworks(perfect)
    gpd = task(nets, target_scheme=scheme, horizons=(k,))
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    v, stops, nfe = gpd.target(x, index, gpd.trajectories.text, 3.0)
    expected = teacher_steps(3, x, index, k)
    torch.testing.assert_close(euler(x, v, SIGMAS[index], SIGMAS[stops[-1]]), expected, rtol=1e-12, atol=1e-12)
    assert stops[-1].tolist() == [k, 7 + k, 20 + k, 40 + k]
    assert nfe == (2 * k if scheme == "direct" else 2 + (k > 1))  # online: the same in every stage
    assert nets.calls == (["teacher"] * k if scheme == "direct" else ["previous"] * (k > 1) + ["teacher"])


@pytest.mark.parametrize("k", [2, 4, 8])
def test_the_halving_target_is_two_jumps_of_the_previous_student(k):
    index = torch.tensor([0, 7, 20, 40])

    def half(x, t):  # of horizon k / 2
        at = (1000 * SIGMAS[:, None] - t).abs().argmin(0)
        return (teacher_steps(3, x, at, k // 2) - x) / (SIGMAS[at + k // 2] - SIGMAS[at]).view(-1, 1, 1, 1, 1)

    nets = KnownNetworks(half)
    gpd = task(nets, target_scheme="halving", horizons=(1, k))
    gpd.stage = 1
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    v, stops, nfe = gpd.target(x, index, gpd.trajectories.text, 3.0)
    expected = teacher_steps(3, x, index, k)
    torch.testing.assert_close(euler(x, v, SIGMAS[index], SIGMAS[stops[-1]]), expected, rtol=1e-12, atol=1e-12)
    assert nfe == 2 and nets.calls == ["previous", "previous"]


def test_targets_of_an_affine_velocity_field_match_its_closed_form():
    """v = a x + b at every sigma: k steps of widths d end at P x + b / a (P - 1), where P is the product of 1 - a d."""
    a, b, index = 1.5, 0.7, torch.tensor([0, 7, 20, 40])

    def closed(x, k):
        shrink = torch.stack([(1 - a * (SIGMAS[i : i + k] - SIGMAS[i + 1 : i + k + 1])).prod() for i in index.tolist()])
        shrink = shrink.view(-1, 1, 1, 1, 1)
        return (shrink * x + b / a * (shrink - 1) - x) / (SIGMAS[index + k] - SIGMAS[index]).view(-1, 1, 1, 1, 1)

    class Affine(KnownNetworks):
        def teacher(self, x, t, text, empty, guidance):
            return a * x + b

    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    for k in range(1, 9):
        gpd = task(Affine(lambda x, t, k=k: closed(x, k - 1)), horizons=(k,))
        v, *_ = gpd.target(x, index, gpd.trajectories.text, 3.0)
        torch.testing.assert_close(v, closed(x, k), rtol=1e-12, atol=1e-12)


def test_a_jump_beyond_the_schedule_ends_at_its_last_step_and_the_teacher_makes_that_step():
    gpd = task(KnownNetworks(lambda x, t: torch.zeros_like(x)), horizons=(5,))
    _, stops, _ = gpd.target(torch.ones(3, *SHAPE), torch.tensor([42, 46, 47]), gpd.trajectories.text[:3], 2.0)
    assert [s.tolist() for s in stops] == [[42, 46, 47], [46, 47, 47], [47, 48, 48]]


def test_guidance_is_constant_or_annealed_over_stages():
    common = dict(horizons=(1, 2, 3), guidance_start=6.0, guidance_end=2.0)
    assert [GpdConfig(**common).guidance(s) for s in range(3)] == [6, 6, 6]
    assert [GpdConfig(**common, guidance_anneal="stage").guidance(s) for s in range(3)] == [6, 4, 2]


def test_trajectories_are_spread_over_the_schedule_and_restart_at_its_end():
    gpd = task(KnownNetworks(), horizons=(1, 2), trajectories=16, max_stride=1)
    gpd.spread_timesteps()
    before = gpd.trajectories.index.clone()
    assert len(before.unique()) > 5
    timesteps, student = [], torch.nn.Module()
    student.patch_embedding = torch.nn.Linear(1, 1)
    student.forward = lambda x, t, text, return_dict: (timesteps.append(t), torch.zeros_like(x))[1:]
    loss, logs = gpd.loss(student, 0, 0)
    assert torch.equal(timesteps[0], 1000 * SIGMAS[before])  # of the start of the jump
    assert gpd.trajectories.index.tolist() == [(i + 1) % 48 for i in before.tolist()] and logs["nfe"] == 2


def test_before_the_last_stage_some_moves_end_a_piece_early_and_others_go_further():
    def ends(stage, start=8, **config):
        gpd = task(KnownNetworks(), horizons=(2, 4, 8), trajectories=16, **config)
        gpd.stage, gpd.trajectories.index = stage, torch.full((16,), start)
        stops = [gpd.trajectories.index, gpd.trajectories.index + gpd.horizon - 1, gpd.trajectories.index + gpd.horizon]
        gpd._move(torch.zeros_like(gpd.trajectories.x), stops, 0)
        return set(gpd.trajectories.index.tolist())

    assert ends(1, off_grid=0, max_stride=1) == {12} and ends(1, off_grid=1, max_stride=1) == {11}
    assert 12 in ends(1, off_grid=0, max_stride=6) <= {12, 13, 14}
    assert ends(1, off_grid=0.5, max_stride=1) == {11, 12}
    assert ends(2, off_grid=1, max_stride=16) == {16}
    assert ends(2, start=11) == {16}  # to the grid, which an earlier stage has left


def test_the_trajectories_do_not_depend_on_the_number_of_processes():
    alone = task(KnownNetworks(), horizons=(1,), trajectories=4)
    context = alone.context
    halves = [GpdTask(OPTIM, alone.config, KnownNetworks(), context, (i, 2)) for i in range(2)]
    assert torch.equal(torch.cat([h.trajectories.x for h in halves]), alone.trajectories.x)
    halves[1].load_state_dict(alone.state_dict())
    assert torch.equal(halves[1].trajectories.x, alone.trajectories.x[2:])


def test_only_the_current_student_is_trained(pipe):
    gpd = gpd_task(pipe, horizons=(2,), spatial_weight=0.3, temporal_weight=0.3)
    nets, text = gpd.nets, gpd.context.encode(["a"])
    x, t = torch.randn(1, 4, 3, 8, 8), torch.tensor([500])
    expected = guided(pipe.transformer, x, t, text, gpd.empty, 3.0)
    torch.testing.assert_close(nets.teacher(x, t, text, gpd.empty, 3.0), expected)
    loss, logs = gpd.loss(nets.module, 0, 0)
    loss.backward()
    assert {"spatial", "temporal"} <= set(logs) and all(p.grad.isfinite().all() for p in nets.module.parameters())
    assert all(p.grad is None for net in (nets._teacher, nets._previous) for p in net.parameters())
    with torch.no_grad():
        next(nets.module.parameters()).add_(1)
    assert not torch.equal(nets.previous(x, t, text), velocity(nets.module, x, t, text))
    nets.next_stage()
    assert torch.equal(nets.previous(x, t, text), velocity(nets.module, x, t, text))


def test_the_schedule_of_six_steps_is_part_of_that_of_48(pipe):
    pipe.encode_prompt = lambda texts, **_: (torch.zeros(len(texts), 6, 16), None)
    defaults = ModelDefaults(height=64, width=64, frames=5)
    fine, coarse = (rollout_context(pipe, defaults, n, lambda rng: "a") for n in (48, 6))
    torch.testing.assert_close(fine.sigmas[::8], coarse.sigmas, rtol=0, atol=1e-6)
    assert torch.equal(fine.timesteps[::8], coarse.timesteps) and fine.sigmas[-1] == 0 and fine.shape == (4, 3, 8, 8)
    assert (fine.sigmas.diff() < 0).all()


def test_high_frequency_energy_separates_spatial_from_temporal_detail():
    still = torch.zeros(1, 1, 4, 8, 8)
    checkers = still + (torch.arange(8)[:, None] + torch.arange(8)) % 2
    flicker = still + (torch.arange(4) % 2).view(4, 1, 1)
    assert high_energy(still + 3) == (0, 0)
    (space, time), (no_space, flickers) = high_energy(checkers), high_energy(flicker)
    assert space == pytest.approx(0.25, rel=1e-5) and time == pytest.approx(0, abs=1e-9)
    assert no_space == pytest.approx(0, abs=1e-9) and flickers == pytest.approx(0.25, rel=1e-5)
    x = torch.randn(2, 3, 5, 6, 7)
    everything, _ = high_energy(x, space=-1.0)
    assert everything == pytest.approx(x.square().mean().item(), rel=1e-5)  # Parseval
    spatial, temporal = high_pass((4, 8, 8))
    assert not spatial[:, 0, 0].any() and temporal[2].all() and not temporal[0].any()


def test_each_trajectory_has_its_own_prompt():
    text = task(KnownNetworks(), trajectories=16).trajectories.text.flatten()
    assert len(text.unique()) > 3


def test_a_resumed_stage_ends_with_the_weights_and_trajectories_of_an_unbroken_one(pipe, tmp_path):
    optim = OptimConfig(steps=3, lr=1e-3, warmup=1, ema=0.0)
    unbroken, first, second = (gpd_task(pipe, horizons=(1,)) for _ in range(3))
    for gpd in (unbroken, first, second):
        gpd.optim = optim
    fit(unbroken, tmp_path / "unbroken", minutes=None, resume=False)
    assert fit(first, tmp_path / "parts", minutes=0, resume=False)["step"] == 1
    fit(second, tmp_path / "parts", minutes=None, resume=True)
    for name in ("x", "index"):
        assert torch.equal(getattr(second.trajectories, name), getattr(unbroken.trajectories, name))
    for one, two in zip(unbroken.module.parameters(), second.module.parameters()):
        assert torch.equal(one, two)


def test_stages_follow_each_other_and_a_finished_stage_is_not_trained_again(pipe, tmp_path):
    saved, optims = [], [OptimConfig(steps=2, lr=1e-3, warmup=1, ema=0.0)] * 2
    run = lambda gpd: distil(
        gpd,
        TrajectoryValidator(gpd, ["b"], 3.0),
        optims,
        tmp_path,
        lambda results: saved.append(gpd.horizon),
        resume=True,
    )
    first = gpd_task(pipe, 4, horizons=(1, 2))
    done = run(first)
    plain, teacher, student = pipe.transformer.state_dict(), first.nets._teacher.state_dict(), first.module.state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in teacher.items())
    assert not all(torch.equal(plain[name], weight) for name, weight in student.items())
    assert (
        done["finished"]
        and saved == [1, 2]
        and set(done["stages"]["k2"]) >= {"velocity_mse", "final_latent_error", "step"}
    )
    again = gpd_task(pipe, 4, horizons=(1, 2))
    assert run(again)["finished"] and saved == [1, 2]
    for one, two in zip(first.module.parameters(), again.module.parameters()):
        assert torch.equal(one, two)


def test_a_student_that_equals_its_teacher_has_no_validation_error(pipe):
    gpd = gpd_task(pipe, 4, horizons=(1,))
    validator = TrajectoryValidator(gpd, ["b"], 1.0)  # guidance 1: the untrained student is the teacher
    assert validator.error(gpd.module, 1) < 1e-9 and validator.final_latent_error(gpd.module, 1) < 1e-9
    assert validator.final_latent_error(gpd.module, 4) > 1e-4


def test_a_stage_that_diverges_ends_and_keeps_its_best_student(tmp_path):
    module, errors = torch.nn.Linear(1, 1), iter([5.0, 3.0, 4.0, 10.5])
    monitor = StageMonitor(
        SimpleNamespace(error=lambda model, k: next(errors), describe=str), module, 1, tmp_path / "monitor.pt", False
    )
    for step in (25, 50, 75):
        torch.nn.init.constant_(module.weight, step)
        assert monitor.validate(step) == (step == 75)
    again = StageMonitor(None, module, 1, tmp_path / "monitor.pt", True)
    assert again.errors == {0: 5.0, 25: 3.0, 50: 4.0, 75: 10.5} and again.diverged
    assert [f.name for f in tmp_path.iterdir()] == ["monitor.pt"]
    again.restore_best()
    assert module.weight.item() == 25


def test_a_stage_that_validation_has_ended_is_not_trained_further_on_resume(pipe, tmp_path):
    gpd = gpd_task(pipe, 4, horizons=(1,))
    first = fit(gpd, tmp_path, minutes=None, resume=False, should_end=lambda step: step == 4, check_every=2)
    again = fit(gpd, tmp_path, minutes=None, resume=True, should_end=lambda step: False, check_every=2)
    assert first["ended"] and again["ended"] and first["step"] == again["step"] == 4


def test_a_signal_in_the_last_iteration_of_a_stage_stops_before_the_next_stage(pipe, tmp_path):
    gpd, saved = gpd_task(pipe, 4, horizons=(1, 2)), []
    gpd.sample_grid = lambda path: signal.raise_signal(signal.SIGINT)  # while the stage's last checkpoint is written
    optims = [OptimConfig(steps=2, lr=1e-3, warmup=1, ema=0.0)] * 2
    validator = TrajectoryValidator(gpd, ["b"], 3.0)
    done = distil(gpd, validator, optims, tmp_path, lambda results: saved.append(gpd.horizon))
    assert done["stopped"] and not done["finished"] and saved == [1]
    assert "stopped" not in json.loads((tmp_path / "k1" / "done.json").read_text())


def test_an_interrupted_distillation_ends_as_an_unbroken_one(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("accel.training.stages.VALIDATE_EVERY", 1)
    optims = [OptimConfig(steps=2, lr=1e-4, matrix_lr=1e-4, warmup=1, ema=0.0)] * 2

    def run(folder, resume):
        gpd = gpd_task(pipe, 4, horizons=(1, 2))
        return gpd, distil(
            gpd, TrajectoryValidator(gpd, ["b"], 3.0), optims, folder, lambda results: None, None, resume
        )

    unbroken, done = run(tmp_path / "unbroken", False)
    monkeypatch.setattr("accel.training.stages.remaining", lambda *_: 1e-9)  # each stage stops after one iteration
    parts = [run(tmp_path / "parts", resume) for resume in (False, True, True)]
    assert [part["finished"] for _, part in parts] == [False, False, True]
    resumed, part = parts[-1]
    assert part["stages"]["k2"]["velocity_mse"] == done["stages"]["k2"]["velocity_mse"]
    for one, two in zip(unbroken.module.parameters(), resumed.module.parameters()):
        assert torch.equal(one, two)


def test_a_stored_student_has_its_weights_and_manifest(pipe, tmp_path):
    store(FullNetworks(pipe.transformer), tmp_path / "gpd-N6", "gpd.json", {"steps": 6})
    stored = load_int8_delta(pipe.transformer, tmp_path / "gpd-N6" / "model.safetensors")
    assert all(torch.equal(stored[name], w) for name, w in pipe.transformer.named_parameters())
    assert json.loads((tmp_path / "gpd-N6" / "gpd.json").read_text()) == {"steps": 6}


def test_storing_a_student_removes_the_weights_of_an_older_one(pipe, tmp_path):
    (tmp_path / ADAPTER).write_bytes(b"older weights")
    store(FullNetworks(pipe.transformer), tmp_path, "gpd.json", {})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["gpd.json", "model.safetensors"]
