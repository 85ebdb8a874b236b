"""Guided progressive distillation on fields whose way is known: grids, targets, what learns, what is carried."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from support import words_of

from accel.ops.flow import euler, mean_velocity
from accel.ops.spectrum import high_energy, high_pass
from accel.runtime.models import ModelDefaults
from accel.students.weights import ADAPTER, load_int8_delta
from accel.training.loop import fit
from accel.training.networks import FullNetworks, guided, velocity
from accel.training.optim import OptimConfig
from accel.training.rollouts import RolloutContext, rollout_context
from accel.training.stages import StageMonitor, TrajectoryValidator, distil, store
from accel.training.tasks.gpd_distillation import GpdConfig, GpdTask

SHAPE = (4, 3, 4, 4)
RECIPE = OptimConfig(steps=10, lr=1e-3)


def levels(n=48, shift=3.0):
    u = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    return shift * u / (1 + (shift - 1) * u)


class Field:
    """Networks whose velocities are known: the teacher's is -x times guidance and level, the other's is given."""

    module = torch.nn.Identity()

    def __init__(self, jump=None):
        self.jump, self.calls = jump, []

    def teacher(self, x, t, words, empty, guidance):
        self.calls.append("teacher")
        return -guidance * x * t.view(-1, 1, 1, 1, 1) / 1000

    def previous(self, x, t, words):
        self.calls.append("previous")
        return self.jump(x, t)


def task(nets, **config):
    context = RolloutContext(
        encode=lambda texts: torch.tensor([[[float(len(text))]] for text in texts]),
        prompts=lambda rng: "a" * rng.randrange(1, 9), levels=levels(), times=1000 * levels()[:-1], shape=SHAPE,
    )  # fmt: skip
    return GpdTask(RECIPE, GpdConfig(**{"trajectories": 4, **config}), nets, context)


def steps_of(guidance, x, index, k, grid):
    """x after k Euler steps of the teacher from base step `index` (s,)."""
    for i in range(k):
        now = index + i
        v = -guidance * x * grid[now].view(-1, 1, 1, 1, 1)
        x = euler(x, v, grid[now], grid[(now + 1).clamp(max=48)])
    return x


def test_the_mean_velocity_leads_where_its_pieces_lead():
    x, (a, b) = torch.randn(2, 3), torch.randn(2, 2, 3)
    now, middle, end = torch.tensor([0.9, 0.9]), torch.tensor([0.6, 0.9]), torch.tensor([0.2, 0.8])
    there = euler(euler(x, a, now, middle), b, middle, end)
    torch.testing.assert_close(euler(x, mean_velocity([a, b], [now, middle, end]), now, end), there)


@pytest.mark.parametrize("way", ["online", "direct"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_target_is_k_guided_steps_if_the_previous_student_is_perfect(way, k):
    grid, index = levels(), torch.tensor([0, 7, 20, 40])

    def perfect(x, t):  # of horizon k - 1
        assert torch.equal(t, 1000 * grid[index])
        return (steps_of(3, x, index, k - 1, grid) - x) / (grid[index + k - 1] - grid[index]).view(-1, 1, 1, 1, 1)

    nets = Field(perfect)
    gpd = task(nets, way=way, horizons=(k,))
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    v, stops, calls = gpd.way(x, index, gpd.trajectories.words, 3.0)
    expected = steps_of(3, x, index, k, grid)
    torch.testing.assert_close(euler(x, v, grid[index], grid[stops[-1]]), expected, rtol=1e-12, atol=1e-12)
    assert stops[-1].tolist() == [k, 7 + k, 20 + k, 40 + k]
    assert calls == (2 * k if way == "direct" else 2 + (k > 1))  # online: the same in every stage
    assert nets.calls == (["teacher"] * k if way == "direct" else ["previous"] * (k > 1) + ["teacher"])


@pytest.mark.parametrize("k", [2, 4, 8])
def test_halving_goes_two_jumps_of_the_student_before(k):
    grid, index = levels(), torch.tensor([0, 7, 20, 40])

    def half(x, t):  # of horizon k / 2
        at = (1000 * grid[:, None] - t).abs().argmin(0)
        return (steps_of(3, x, at, k // 2, grid) - x) / (grid[at + k // 2] - grid[at]).view(-1, 1, 1, 1, 1)

    nets = Field(half)
    gpd = task(nets, target_scheme="halving", horizons=(1, k))
    gpd.stage = 1
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    v, stops, calls = gpd.way(x, index, gpd.trajectories.words, 3.0)
    expected = steps_of(3, x, index, k, grid)
    torch.testing.assert_close(euler(x, v, grid[index], grid[stops[-1]]), expected, rtol=1e-12, atol=1e-12)
    assert calls == 2 and nets.calls == ["previous", "previous"]


def test_targets_of_an_affine_field_are_those_of_its_closed_form():
    """v = a x + b at every level: k steps of widths d lead to P x + b / a (P - 1), P the product of 1 - a d."""
    a, b, grid, index = 1.5, 0.7, levels(), torch.tensor([0, 7, 20, 40])

    def closed(x, k):
        shrink = torch.stack([(1 - a * (grid[i : i + k] - grid[i + 1 : i + k + 1])).prod() for i in index.tolist()])
        shrink = shrink.view(-1, 1, 1, 1, 1)
        return (shrink * x + b / a * (shrink - 1) - x) / (grid[index + k] - grid[index]).view(-1, 1, 1, 1, 1)

    class Affine(Field):
        def teacher(self, x, t, words, empty, guidance):
            return a * x + b

    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    for k in range(1, 9):
        gpd = task(Affine(lambda x, t, k=k: closed(x, k - 1)), horizons=(k,))
        v, *_ = gpd.way(x, index, gpd.trajectories.words, 3.0)
        torch.testing.assert_close(v, closed(x, k), rtol=1e-12, atol=1e-12)


def test_a_short_tail_ends_at_the_end_and_the_teacher_does_the_last_step():
    gpd = task(Field(lambda x, t: torch.zeros_like(x)), horizons=(5,))
    _, stops, _ = gpd.way(torch.ones(3, *SHAPE), torch.tensor([42, 46, 47]), gpd.trajectories.words[:3], 2.0)
    assert [s.tolist() for s in stops] == [[42, 46, 47], [46, 47, 47], [47, 48, 48]]


def test_guidance_anneals_over_stages_or_iterations_or_not():
    common = dict(horizons=(1, 2, 3), guidance_start=6.0, guidance_end=2.0)
    assert [GpdConfig(**common).guidance(s, 0.5) for s in range(3)] == [6, 6, 6]
    assert [GpdConfig(**common, guidance_anneal="stage").guidance(s, 0.5) for s in range(3)] == [6, 4, 2]
    assert GpdConfig(**common, guidance_anneal="iteration").guidance(1, 0.5) == pytest.approx(4)
    alone = GpdConfig(**common | {"horizons": (8,)}, guidance_anneal="iteration")
    assert [alone.guidance(0, share) for share in (0, 0.5, 1)] == [6, 4, 2]


def test_slots_are_staggered_and_move_on_and_begin_anew_at_the_end():
    gpd = task(Field(), horizons=(1, 2), trajectories=16, max_stride=1)
    gpd.spread_timesteps()
    before = gpd.trajectories.index.clone()
    assert len(before.unique()) > 5
    told = []
    loss, logs = gpd.loss(lambda x, t, words, return_dict: (told.append(t), torch.zeros_like(x))[1:], 0, 0)
    assert torch.equal(told[0], 1000 * levels()[before])  # where the jump begins
    assert gpd.trajectories.index.tolist() == [(i + 1) % 48 for i in before.tolist()] and logs["calls"] == 2


def test_some_slots_stop_a_piece_early_and_others_hop_but_none_does_in_the_last_stage():
    def ends(stage, **config):
        gpd = task(Field(), horizons=(2, 4, 8), trajectories=16, **config)
        gpd.stage, gpd.trajectories.index = stage, torch.full((16,), 8)
        stops = [gpd.trajectories.index, gpd.trajectories.index + gpd.horizon - 1, gpd.trajectories.index + gpd.horizon]
        gpd._move(torch.zeros_like(gpd.trajectories.x), stops, 0)
        return set(gpd.trajectories.index.tolist())

    assert ends(1, off_grid=0, max_stride=1) == {12} and ends(1, off_grid=1, max_stride=1) == {11}
    assert 12 in ends(1, off_grid=0, max_stride=6) <= {12, 13, 14}
    assert ends(1, off_grid=0.5, max_stride=1) == {11, 12}
    assert ends(2, off_grid=1, max_stride=16) == {16}


def test_slots_are_the_same_however_many_processes_carry_them():
    whole = task(Field(), horizons=(1,), trajectories=4)
    context = whole.context
    halves = [GpdTask(RECIPE, whole.config, Field(), context, (i, 2)) for i in range(2)]
    assert torch.equal(torch.cat([h.trajectories.x for h in halves]), whole.trajectories.x)
    halves[1].load_state_dict(whole.state_dict())
    assert torch.equal(halves[1].trajectories.x, whole.trajectories.x[2:])


def real(pipe, n=48, **config) -> GpdTask:
    """A task on three copies of a real transformer, on a grid of n steps, with two slots."""
    context = RolloutContext(
        encode=words_of,
        prompts=lambda rng: "a", levels=levels(n), times=(1000 * levels(n)[:-1]).long(), shape=(4, 3, 8, 8),
    )  # fmt: skip
    return GpdTask(RECIPE, GpdConfig(trajectories=2, base_steps=n, **config), FullNetworks(pipe.transformer), context)


def test_only_the_student_learns(pipe):
    gpd = real(pipe, horizons=(2,), spatial_weight=0.3, temporal_weight=0.3)
    nets, words = gpd.nets, gpd.context.encode(["a"])
    x, t = torch.randn(1, 4, 3, 8, 8), torch.tensor([500])
    expected = guided(pipe.transformer, x, t, words, gpd.empty, 3.0)
    torch.testing.assert_close(nets.teacher(x, t, words, gpd.empty, 3.0), expected)
    loss, logs = gpd.loss(nets.module, 0, 0)
    loss.backward()
    assert {"space", "time"} <= set(logs) and all(p.grad.isfinite().all() for p in nets.module.parameters())
    assert all(p.grad is None for net in (nets._teacher, nets._previous) for p in net.parameters())
    with torch.no_grad():
        next(nets.module.parameters()).add_(1)
    assert not torch.equal(nets.previous(x, t, words), velocity(nets.module, x, t, words))
    nets.next_stage()
    assert torch.equal(nets.previous(x, t, words), velocity(nets.module, x, t, words))


def test_the_grid_of_six_steps_lies_in_that_of_48(pipe):
    pipe.encode_prompt = lambda texts, **_: (torch.zeros(len(texts), 6, 16), None)
    defaults = ModelDefaults(height=64, width=64, frames=5)
    fine, coarse = (rollout_context(pipe, defaults, n, lambda rng: "a") for n in (48, 6))
    torch.testing.assert_close(fine.levels[::8], coarse.levels, rtol=0, atol=1e-6)
    assert torch.equal(fine.times[::8], coarse.times) and fine.levels[-1] == 0 and fine.shape == (4, 3, 8, 8)
    assert (fine.levels.diff() < 0).all()


def test_high_bands_see_detail_in_space_and_in_time_apart():
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


def test_a_slot_has_prompts_of_its_own():
    words = task(Field(), trajectories=16).trajectories.words.flatten()
    assert len(words.unique()) > 3


def test_a_resumed_stage_ends_with_the_weights_and_slots_of_an_unbroken_one(pipe, tmp_path):
    optim = OptimConfig(steps=3, lr=1e-3, warmup=1, ema=0.0)
    whole, first, second = (real(pipe, horizons=(1,)) for _ in range(3))
    for gpd in (whole, first, second):
        gpd.optim = optim
    fit(whole, tmp_path / "whole", minutes=None, resume=False)
    assert fit(first, tmp_path / "parts", minutes=0, resume=False)["step"] == 1
    fit(second, tmp_path / "parts", minutes=None, resume=True)
    assert torch.equal(second.trajectories.x, whole.trajectories.x) and torch.equal(
        second.trajectories.index, whole.trajectories.index
    )
    for one, two in zip(whole.module.parameters(), second.module.parameters()):
        assert torch.equal(one, two)


def test_stages_follow_each_other_and_a_finished_one_is_not_trained_again(pipe, tmp_path):
    kept, optims = [], [OptimConfig(steps=2, lr=1e-3, warmup=1, ema=0.0)] * 2
    run = lambda gpd: distil(
        gpd, TrajectoryValidator(gpd, ["b"], 3.0), optims, tmp_path, lambda facts: kept.append(gpd.horizon), resume=True
    )
    first = real(pipe, 4, horizons=(1, 2))
    done = run(first)
    plain, teacher, student = pipe.transformer.state_dict(), first.nets._teacher.state_dict(), first.module.state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in teacher.items())
    assert not all(torch.equal(plain[name], weight) for name, weight in student.items())
    assert (
        done["finished"]
        and kept == [1, 2]
        and set(done["stages"]["k2"]) >= {"velocity_mse", "final_latent_error", "step"}
    )
    again = real(pipe, 4, horizons=(1, 2))
    assert run(again)["finished"] and kept == [1, 2]
    for one, two in zip(first.module.parameters(), again.module.parameters()):
        assert torch.equal(one, two)


def test_a_student_that_follows_the_teacher_has_no_held_out_error(pipe):
    gpd = real(pipe, 4, horizons=(1,))
    held = TrajectoryValidator(gpd, ["b"], 1.0)  # guidance 1: the untrained student is the teacher
    assert held.jump(gpd.module, 1) < 1e-9 and held.end(gpd.module, 1) < 1e-9
    assert held.end(gpd.module, 4) > 1e-4


def test_a_stage_that_diverges_ends_and_its_best_student_goes_on(tmp_path):
    module, errors = torch.nn.Linear(1, 1), iter([5.0, 3.0, 4.0, 10.5])
    watch = StageMonitor(
        SimpleNamespace(jump=lambda model, k: next(errors), named=str), module, 1, tmp_path / "watch.pt", False
    )
    for step in (25, 50, 75):
        torch.nn.init.constant_(module.weight, step)
        assert watch.look(step) == (step == 75)
    again = StageMonitor(None, module, 1, tmp_path / "watch.pt", True)
    assert again.errors == {0: 5.0, 25: 3.0, 50: 4.0, 75: 10.5} and again.diverged
    assert [f.name for f in tmp_path.iterdir()] == ["watch.pt"]
    again.restore()
    assert module.weight.item() == 25


def test_a_stage_that_was_ended_by_a_look_is_not_trained_on_when_it_is_resumed(pipe, tmp_path):
    gpd = real(pipe, 4, horizons=(1,))
    first = fit(gpd, tmp_path, minutes=None, resume=False, should_end=lambda step: step == 4, check_every=2)
    again = fit(gpd, tmp_path, minutes=None, resume=True, should_end=lambda step: False, check_every=2)
    assert first["ended"] and again["ended"] and first["step"] == again["step"] == 4


def test_a_signal_in_the_last_iteration_of_a_stage_is_heard_before_the_next_one(pipe, tmp_path):
    gpd, kept = real(pipe, 4, horizons=(1, 2)), []
    gpd.sample_grid = lambda path: signal.raise_signal(signal.SIGINT)  # while the stage's last checkpoint is written
    optims = [OptimConfig(steps=2, lr=1e-3, warmup=1, ema=0.0)] * 2
    held = TrajectoryValidator(gpd, ["b"], 3.0)
    done = distil(gpd, held, optims, tmp_path, lambda facts: kept.append(gpd.horizon))
    assert done["stopped"] and not done["finished"] and kept == [1]
    assert "stopped" not in json.loads((tmp_path / "k1" / "done.json").read_text())


def test_a_distillation_that_is_broken_off_ends_as_an_unbroken_one(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("accel.training.stages.EVERY", 1)
    optims = [OptimConfig(steps=3, lr=1e-2, warmup=1, ema=0.0)] * 2

    def run(folder, minutes, resume):
        gpd = real(pipe, 4, horizons=(1, 2))
        held = TrajectoryValidator(gpd, ["b"], 3.0)
        return gpd, distil(gpd, held, optims, folder, lambda facts: None, minutes, resume)

    whole, done = run(tmp_path / "whole", None, False)
    for _ in range(20):  # each time the clock stops it after a step, or before one
        parts, part = run(tmp_path / "parts", 1e-9 if _ == 0 else 1e-3, _ > 0)
        if part["finished"]:
            break
    parts, part = run(tmp_path / "parts", None, True)
    assert part["finished"] and part["stages"]["k2"]["velocity_mse"] == done["stages"]["k2"]["velocity_mse"]
    for one, two in zip(whole.module.parameters(), parts.module.parameters()):
        assert torch.equal(one, two)


def test_a_student_is_stored_with_what_it_needs(pipe, tmp_path):
    store(FullNetworks(pipe.transformer), tmp_path / "gpd-N6", "gpd.json", {"steps": 6})
    kept = load_int8_delta(pipe.transformer, tmp_path / "gpd-N6" / "model.safetensors")
    assert all(torch.equal(kept[name], w) for name, w in pipe.transformer.named_parameters())
    assert json.loads((tmp_path / "gpd-N6" / "gpd.json").read_text()) == {"steps": 6}


def test_a_student_leaves_nothing_of_the_one_that_lay_in_its_folder(pipe, tmp_path):
    (tmp_path / ADAPTER).write_bytes(b"of an earlier training")
    store(FullNetworks(pipe.transformer), tmp_path, "gpd.json", {})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["gpd.json", "model.safetensors"]
