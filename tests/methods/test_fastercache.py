"""FasterCache: its plan and its two formulas by hand, what it caches, and when it does nothing."""

import math
from contextlib import contextmanager

import pytest
import torch
from support import euler_as_fitted_solver

import accel
from accel.core.trace import Step
from accel.methods import DisCa, FasterCache, FittedSolver, StepCache
from accel.methods.base import Method
from accel.methods.fastercache import State, reuse_steps
from accel.ops.spectrum import split
from accel.runtime.generate import estimate_memory
from accel.runtime.run import Run


def at(index: int, count: int = 20, sigma: float = 0.5) -> Step:
    return Step(index, count, sigma, sigma - 0.05, "cond")


def test_plan_of_twenty_steps_by_hand():
    """Attention from step 4, every second; guidance from step 8, one in four: 11, 15 and the last are full."""
    plan = FasterCache(attention_start=0.2, guidance_start=0.4, guidance_interval=4).plan(20)
    assert [i for i, p in enumerate(plan) if p.guidance] == [0, 1, 2, 3, 4, 5, 6, 7, 11, 15, 19]
    assert [i for i, p in enumerate(plan) if not p.attention] == [4, 6, 8, 10, 12, 14, 16, 18]


def test_steps_that_run_both_branches_compute_their_attention():
    for interval in range(2, 7):
        for plan in FasterCache(attention_interval=3, guidance_interval=interval).plan(50)[17:]:
            assert plan.attention or not plan.guidance


def test_first_two_and_last_steps_are_full():
    plan = FasterCache(attention_start=0, guidance_start=0).plan(30)
    assert all(p.attention and p.guidance for p in (*plan[:2], plan[-1]))


def test_linear_weight_rises_from_zero_to_one_over_the_reused_steps():
    """Outputs 10 then 14: the first reused step repeats 14, the last adds the whole slope: 18."""
    method = FasterCache(guidance=False, attention_start=0.2)
    plans = method.plan(20)
    entries = [(0.9, torch.tensor(10.0)), (0.8, torch.tensor(14.0))]
    steps = reuse_steps(plans, "cond")
    assert method.extrapolate(entries, 0.5, at(steps[0]), plans) == 14
    assert method.extrapolate(entries, 0.5, at(steps[-1]), plans) == 18


def test_sigma_weight_is_exact_for_a_feature_linear_in_sigma():
    """F = 100 sigma, computed at .9 and .7: at .6 it is 60."""
    method = FasterCache(extrapolation="sigma")
    entries = [(0.9, torch.tensor(90.0)), (0.7, torch.tensor(70.0))]
    assert method.extrapolate(entries, method.position(0.4, 0.6), at(5), method.plan(20)) == pytest.approx(60)


def test_logsnr_weight_is_exact_for_a_feature_linear_in_the_log_snr():
    """F = 3 + 2 log SNR, computed at sigma .8 and .5, of log SNR -log 4 and 0: at .2, of log 4, it is 3 + 2 log 4."""
    method = FasterCache(extrapolation="logsnr")
    positions = [method.position(1 - sigma, sigma) for sigma in (0.8, 0.5, 0.2)]
    assert positions == pytest.approx([-math.log(4), 0, math.log(4)])
    entries = [(position, torch.tensor(3 + 2 * position)) for position in positions[:2]]
    assert method.extrapolate(entries, positions[2], at(5), method.plan(20)) == pytest.approx(3 + 2 * math.log(4))


@pytest.mark.parametrize("extrapolation, sigmas", [("sigma", (0.7, 0.7)), ("logsnr", (1.0, 0.9995))])
def test_no_distance_between_the_last_two_computed_repeats_the_last(extrapolation, sigmas):
    """A solver evaluates twice at one sigma, or there is nearly no signal: log SNR -log 1000 in both."""
    method = FasterCache(extrapolation=extrapolation)
    entries = [(method.position(1 - s, s), torch.tensor(value)) for s, value in zip(sigmas, (10.0, 14.0))]
    assert method.extrapolate(entries, method.position(0.4, 0.6), at(5), method.plan(20)) == 14


@pytest.mark.parametrize("reuse", ["attention", "stack"])
def test_the_first_step_may_be_extrapolated_from_although_it_has_no_signal(reuse, pipe, sample):
    with accel.apply(pipe, [FasterCache(attention_start=0, extrapolation="logsnr", reuse=reuse)]) as trace:
        assert sample(pipe).isfinite().all()
    assert trace.sigmas[0] > 0.999 and min(e.step for e in trace.events.values() if e.action != "compute") == 2


def test_defaults_extrapolate_each_attention_over_the_steps_and_leave_the_stack_alone(pipe, sample):
    assert FasterCache() == FasterCache(reuse="attention", extrapolation="linear")
    blocks = pipe.transformer.blocks
    with accel.apply(pipe, [FasterCache()]) as trace:
        assert pipe.transformer.blocks is blocks
        sample(pipe)
    assert set(trace.summary()["calls"]) == {"compute", "rebuild"} and trace.summary()["attention"]["reuse"] > 0


def test_gains_do_not_compound():
    """10 % on the low band in the first half is 1.1 at every rebuilt step; the high band follows in the second."""
    method = FasterCache(gain_low=0.1, gain_high=0.2)
    assert [method.gains(at(6), k) for k in (1, 2, 3)] == [(1.1, 1.0)] * 3
    assert [method.gains(at(14), k) for k in (1, 2, 3)] == [(1.0, 1.2)] * 3


def test_gains_compound_if_asked_to():
    """As in the authors' code: 1.1, 1.21, 1.331."""
    method = FasterCache(gain_low=0.1, compound_gain=True)
    assert [method.gains(at(6), k)[0] for k in (1, 2, 3)] == pytest.approx([1.1, 1.21, 1.331])


@pytest.mark.parametrize("h, w", [(8, 8), (9, 7), (12, 20), (15, 26), (60, 104)])
def test_adding_bands_that_were_split_once_equals_a_transform_at_every_step(h, w):
    """eq. 6-11: transform cond, add the weighted bands of the old difference, transform back."""
    cond, uncond, now = torch.randn(3, 2, 4, 3, h, w, generator=torch.Generator().manual_seed(0)).unbind(0)
    low, high = split(uncond - cond)
    y = torch.arange(h).minimum(h - torch.arange(h))[:, None]
    x = torch.arange(w).minimum(w - torch.arange(w))[None]
    mask = y**2 + x**2 <= (min(h, w) // 5) ** 2
    f = torch.fft.fft2
    delta = f(uncond) - f(cond)
    direct = torch.fft.ifft2(f(now) + 1.3 * delta * mask + 0.7 * delta * ~mask)
    assert direct.imag.abs().max() < 1e-5
    assert (now + 1.3 * low + 0.7 * high - direct.real).abs().max() < 2e-5


def drive(pipe, method, cond: torch.Tensor, uncond: torch.Tensor, steps: int = 20):
    """Outputs of the unconditional branch on fixed latents: only what a method caches can change them."""
    outputs, noise = [], torch.Generator().manual_seed(5)
    pipe.scheduler.set_timesteps(steps)
    pipe._guidance_scale = 4.0
    with torch.no_grad(), accel.apply(pipe, [method]) as trace:
        for i, t in enumerate(pipe.scheduler.timesteps):
            x = torch.randn(1, 4, 3, 8, 8, generator=noise)
            for branch, text in (("cond", cond), ("uncond", uncond)):
                sigma = float(pipe.scheduler.sigmas[i])
                with pipe.transformer.cache_context(branch, step_index=i, sigma=sigma, num_inference_steps=steps):
                    out = pipe.transformer(
                        hidden_states=x, timestep=t[None], encoder_hidden_states=text, return_dict=False
                    )[0]
            outputs.append(out)
    return outputs, trace


@pytest.mark.parametrize("reuse", ["attention", "stack"])
def test_branches_never_mix(reuse, pipe):
    """Another prompt changes no unconditional output, though its attention, or its stack, is extrapolated."""
    one, two, empty = torch.randn(3, 1, 6, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    method = FasterCache(guidance=False, extrapolation="sigma", reuse=reuse)
    first, trace = drive(pipe, method, one, empty)
    second, _ = drive(pipe, method, two, empty)
    assert any(e.action != "compute" and e.branch == "uncond" for e in trace.events.values())
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_computed_outputs_are_extrapolated_from(pipe, sample, monkeypatch):
    computed, used = [], []
    extrapolate = FasterCache.extrapolate

    class RecordOutputs(Method):
        @contextmanager
        def apply(self, host, trace):
            with host.wrap_attention(lambda inner, layer: computed.append(inner()) or computed[-1]):
                yield

    def spy(self, entries, *rest):
        used.extend(tensor for _, tensor in entries)
        return extrapolate(self, entries, *rest)

    monkeypatch.setattr(FasterCache, "extrapolate", spy)
    with accel.apply(pipe, [RecordOutputs(), FasterCache(guidance=False, attention_start=0.2)]):
        sample(pipe)
    known = {id(t) for t in computed}
    assert used and all(id(t) in known for t in used)


FEW_PASSES = "0 1 2 3 4 7 11 15 19"


@pytest.mark.parametrize("other", [DisCa(predictor="reuse", full_steps=FEW_PASSES), StepCache(full_steps=FEW_PASSES)])
def test_outputs_that_grow_old_inside_a_step_cache_are_not_extrapolated_from(other, pipe, sample):
    """Passes 7, 11 and 15, planned to be extrapolated, compute: the pass before is older than two steps."""
    with accel.apply(pipe, [other, FasterCache(guidance=False)]) as trace:
        sample(pipe)
    events = [e for e in trace.events.values() if (e.branch, e.layer) == ("cond", "blocks.0.attn1")]
    actions = {e.step: e.action for e in events}
    assert actions == {step: "reuse" if step == 3 else "compute" for step in map(int, FEW_PASSES.split())}


def test_a_cfg_delta_that_grows_old_inside_a_fitted_solver_is_not_added(pipe, sample, tmp_path):
    """The solver runs the unconditional branch at 0 to 7, 10 and 15; at 10 the delta of step 6 is too old."""
    solver = euler_as_fitted_solver(pipe, 20, uncond_steps=[*range(8), 10, 15])
    (file := tmp_path / "solver.json").write_text(solver.model_dump_json())
    methods = [FasterCache(attention=False, guidance_interval=3), FittedSolver(steps=20, solver=str(file))]
    with accel.apply(pipe, methods) as trace:
        sample(pipe)
    computed = [i for i in range(20) if trace.events[i, "uncond", "denoiser"].action == "compute"]
    assert {10, 15} <= set(computed)


@pytest.mark.parametrize("reuse", ["attention", "stack"])
def test_everything_cached_is_freed_at_the_end_of_a_run(reuse, pipe, sample, monkeypatch):
    states = []
    nbytes = State.nbytes
    monkeypatch.setattr(State, "nbytes", lambda self: states.append(self) or nbytes(self))
    with accel.apply(pipe, [FasterCache(reuse=reuse)]):
        sample(pipe)
        assert states and nbytes(states[-1]) == 0


def test_settings_at_which_everything_is_computed_are_reported(pipe, sample):
    with accel.apply(pipe, [FasterCache(attention_start=1.0, guidance_start=1.0)]) as trace:
        sample(pipe)
    assert trace.messages == ["FasterCache does nothing: at these settings every step is computed in full"]


def test_each_part_can_be_switched_off(pipe, sample):
    with accel.apply(pipe, [FasterCache(guidance=False)]) as trace:
        sample(pipe)
    assert trace.summary()["calls"] == {"compute": 40} and trace.summary()["attention"]["reuse"] > 0
    with accel.apply(pipe, [FasterCache(attention=False)]) as trace:
        sample(pipe)
    assert trace.summary()["calls"]["rebuild"] > 0 and "reuse" not in trace.summary()["attention"]


def test_too_few_steps_switch_it_off_with_a_message(pipe, sample):
    baseline = sample(pipe, steps=6)
    with accel.apply(pipe, [FasterCache()]) as trace:
        assert torch.equal(sample(pipe, steps=6), baseline)
    assert trace.summary()["messages"] == ["FasterCache is off: 6 steps are too few, it needs at least 10"]


def test_a_run_without_guidance_is_reported(pipe, sample):
    with accel.apply(pipe, [FasterCache()]) as trace:
        sample(pipe, guidance=1.0)
    assert "guidance is off" in trace.summary()["messages"][0] and trace.summary()["attention"]["reuse"] > 0


@pytest.mark.parametrize("reuse", ["attention", "stack"])
def test_the_second_transformer_starts_with_an_empty_cache(reuse, two_models, sample):
    """Wan 2.2: after the switch the CFG delta is taken anew, and two outputs are computed before any reuse."""
    with accel.apply(two_models, [FasterCache(attention_start=0.1, guidance_start=0.1, reuse=reuse)]) as trace:
        sample(two_models)
    switch = next(i for i, s in trace.sigmas.items() if s < 0.7)
    for step in (switch, switch + 1):
        assert all(e.action not in ("reuse", "predict") for e in trace.events.values() if e.step == step)
    assert trace.events[(switch, "uncond", "denoiser")].action == "compute"


def test_the_memory_estimate_is_what_is_cached_at_most(pipe, sample):
    with accel.apply(pipe, [FasterCache()]) as trace:
        sample(pipe)
    assert 0 < trace.peak_bytes <= trace.estimated_bytes <= 1.3 * trace.peak_bytes
    assert trace.memory_by_method["fastercache"] == 0  # what no later step needs is freed
    run = Run(model="m", prompt="p", height=64, width=64, frames=5, steps=20, guidance=4.0, methods={"fastercache": {}})
    assert estimate_memory(run, pipe) == trace.estimated_bytes


def test_compiled_blocks_share_one_graph_over_all_steps(pipe, sample):
    torch._dynamo.reset()
    method = FasterCache(attention_start=0.3, guidance_start=0.5)
    with accel.apply(pipe, [method]):
        expected = sample(pipe, steps=10)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        with accel.apply(pipe, [method]) as trace:
            got = sample(pipe, steps=10)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert {e.action for e in trace.events.values()} == {"compute", "reuse", "rebuild"}


def test_a_limit_of_memory_keeps_the_outputs_of_the_first_blocks_that_fit(pipe, sample):
    unlimited = FasterCache(guidance=False)
    with accel.apply(pipe, unlimited) as trace:
        sample(pipe)
    layer = trace.peak_bytes // 2  # of two
    limited = FasterCache(guidance=False, max_cache_gib=1.5 * layer / 2**30)
    with accel.apply(pipe, limited) as trace:
        sample(pipe)
    assert trace.peak_bytes == layer == trace.estimated_bytes
    assert {event.layer for event in trace.events.values() if event.action == "reuse"} == {"blocks.0.attn1"}


def test_outputs_in_eight_bits_take_half_of_bfloat16_and_err_little(pipe, sample):
    pipe.transformer.to(torch.bfloat16)
    latents, peaks = {}, {}
    for cache_format in ("model", "fp8"):
        method = FasterCache(guidance=False, attention_interval=4, cache_format=cache_format)
        with accel.apply(pipe, method) as trace:
            latents[cache_format], peaks[cache_format] = sample(pipe), trace.peak_bytes
        assert trace.peak_bytes == trace.estimated_bytes
    assert 0.5 < peaks["fp8"] / peaks["model"] < 0.51  # with the scales
    assert 0 < (latents["fp8"] - latents["model"]).norm() < 0.01 * latents["model"].norm()


def test_outputs_in_cpu_memory_give_the_same_bits(pipe, sample):
    latents = []
    for cache_format in ("model", "cpu"):
        with accel.apply(pipe, FasterCache(cache_format=cache_format)):
            latents.append(sample(pipe))
    assert torch.equal(*latents)


def test_outputs_in_cpu_memory_take_nothing_of_another_device(pipe):
    methods = {"fastercache": {"cache_format": "cpu", "guidance": False}}
    run = Run(model="m", prompt="p", height=64, width=64, frames=5, steps=20, guidance=4.0, methods=methods)
    assert estimate_memory(run, pipe) > 0
    pipe.transformer.to("meta")
    assert estimate_memory(run, pipe) == 0
