"""FasterCache with `reuse: stack`: the residual of all blocks is extrapolated in place of each attention's output."""

from itertools import pairwise

import pytest
import torch

import accel
from accel.families.wan import Wan
from accel.methods import AsymRnR, FasterCache
from accel.methods.base import RunSpec, outside_blocks
from accel.methods.fastercache import reuse_steps
from accel.ops.noise import log_snr


def spec(pipe, steps: int = 20, guided: bool = True, device: str = "meta") -> RunSpec:
    """The spec of a run of the `sample` fixture: 3 x 4 x 4 tokens of width 24."""
    return RunSpec(pipe.transformer, Wan(), torch.empty(1, 4, 3, 8, 8, device=device), (3, 4, 4), steps, guided, 2)


def steps_of(trace, action: str, branch: str) -> list[int]:
    """The steps whose transformer call had the action."""
    calls = [e for e in trace.events.values() if e.layer == "denoiser"]
    return [e.step for e in calls if (e.action, e.branch) == (action, branch)]


def test_all_blocks_are_skipped_in_both_branches_where_attention_would_be_extrapolated(pipe, sample):
    calls, method = [], FasterCache(reuse="stack", guidance=False)
    pipe.transformer.blocks[1].ffn.register_forward_hook(lambda *_: calls.append(1))
    with accel.apply(pipe, [method]) as trace:
        sample(pipe)
    skipped = reuse_steps(method.plan(20), "cond")
    assert steps_of(trace, "predict", "cond") == steps_of(trace, "predict", "uncond") == skipped
    assert len(calls) == 2 * (20 - len(skipped))
    assert trace.summary()["calls"] == {"compute": len(calls), "predict": 40 - len(calls)}


@pytest.mark.parametrize("extrapolation", ["linear", "sigma", "logsnr"])
def test_the_residual_is_continued_by_the_weight_of_the_parameter(extrapolation, pipe, sample):
    """Blocks add a number: sigma or its log SNR is predicted exactly; over the steps, w rises from 0 to 1."""
    model, numbers, inputs, outputs = pipe.transformer, [], [], []
    sigma = lambda: float(pipe.scheduler.sigmas[len(numbers)])
    number = lambda: log_snr(1 - sigma(), sigma()) if extrapolation == "logsnr" else sigma()
    model.patch_embedding.register_forward_pre_hook(lambda *_: numbers.append(number()))
    model.patch_embedding.register_forward_hook(lambda _, args, out: inputs.append(out.flatten(2).transpose(1, 2)))
    model.norm_out.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    for block in model.blocks:
        block.forward = lambda hidden, *_: hidden + numbers[-1]
    method = FasterCache(reuse="stack", guidance=False, extrapolation=extrapolation, attention_interval=3)
    with accel.apply(pipe, [method]):
        sample(pipe, steps=12, guidance=1.0)
    skipped = [2, 3, 5, 6, 8, 9]
    assert reuse_steps(method.plan(12), "cond") == skipped
    expected = list(numbers)
    if extrapolation == "linear":
        last_two = {2: (0, 1), 3: (0, 1), 5: (1, 4), 6: (1, 4), 8: (4, 7), 9: (4, 7)}
        for i, (previous, last) in last_two.items():
            expected[i] = numbers[last] + (i - 2) / 7 * (numbers[last] - numbers[previous])
    added = [(after - before).mean().item() for before, after in zip(inputs, outputs)]
    assert added == pytest.approx([len(model.blocks) * number for number in expected], abs=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_the_cache_holds_two_tensors_a_branch(guided, pipe, sample):
    method = FasterCache(reuse="stack", guidance=False)
    with accel.apply(pipe, [method]) as trace:
        sample(pipe, guidance=4.0 if guided else 1.0)
    assert trace.peak_bytes == trace.estimated_bytes == 2 * (1 + guided) * 48 * 24 * 4
    assert method.estimate_memory(spec(pipe, guided=guided)) == trace.peak_bytes
    assert trace.memory_by_method["fastercache"] == 0  # what no later step needs is freed


def test_the_limit_of_attention_outputs_does_not_switch_the_stack_off(pipe, sample):
    latents = []
    for limit in (0.0, 1e-9):
        with accel.apply(pipe, [FasterCache(reuse="stack", max_cache_gib=limit)]) as trace:
            latents.append(sample(pipe))
        assert trace.peak_bytes <= trace.estimated_bytes
    assert torch.equal(*latents)


def test_the_residual_is_cached_in_any_format(pipe, sample):
    pipe.transformer.to(torch.bfloat16)
    latents, peaks = {}, {}
    for cache_format in ("model", "fp8", "cpu"):
        method = FasterCache(reuse="stack", guidance=False, cache_format=cache_format)
        with accel.apply(pipe, [method]) as trace:
            latents[cache_format], peaks[cache_format] = sample(pipe), trace.peak_bytes
        assert trace.peak_bytes == trace.estimated_bytes
    assert torch.equal(latents["cpu"], latents["model"]) and 0.5 < peaks["fp8"] / peaks["model"] < 0.51
    assert 0 < (latents["fp8"] - latents["model"]).norm() < 0.05 * latents["model"].norm()
    pipe.transformer.to("meta")
    assert FasterCache(reuse="stack", guidance=False, cache_format="cpu").estimate_memory(spec(pipe)) == 0


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("reuse", ["attention", "stack"])
def test_the_expected_work_is_what_is_counted(reuse, guidance, pipe, sample):
    method = FasterCache(reuse=reuse)
    with accel.apply(pipe, [method]) as trace:
        sample(pipe, guidance=guidance)
    work = method.expected_work(spec(pipe, guided=guidance > 1), trace.flops)
    assert work == pytest.approx(trace.summary()["flops_ratio"], rel=1e-6) and work < 0.9
    shares = {e.compute_fraction for e in trace.events.values() if e.action == "predict"}
    left = outside_blocks(Wan(), pipe.transformer, trace.flops) / trace.flops["denoiser"]
    assert shares == ({left} if reuse == "stack" else set())


def test_it_can_be_switched_off_and_is_off_in_few_steps(pipe, sample):
    baseline = sample(pipe, steps=6)
    with accel.apply(pipe, [FasterCache(reuse="stack")]) as trace:
        assert torch.equal(sample(pipe, steps=6), baseline)
    assert trace.messages == ["FasterCache is off: 6 steps are too few, it needs at least 10"]
    assert trace.peak_bytes == trace.estimated_bytes == 0
    with accel.apply(pipe, [FasterCache(reuse="stack", attention=False)]) as trace:
        sample(pipe)
    assert set(trace.summary()["calls"]) == {"compute", "rebuild"}


def test_steps_computed_in_full_alone_are_bitwise_the_baseline(pipe, sample):
    baseline = sample(pipe)
    with accel.apply(pipe, [FasterCache(reuse="stack", attention_start=1.0, guidance_start=1.0)]) as trace:
        assert torch.equal(sample(pipe), baseline)
    assert trace.messages == ["FasterCache does nothing: at these settings every step is computed in full"]


def test_steps_from_which_a_branch_is_rebuilt_are_full(pipe, sample):
    method = FasterCache(reuse="stack", guidance_interval=3, guidance_start=0.2)
    with accel.apply(pipe, [method]) as trace:
        assert sample(pipe).isfinite().all()
    plan = method.plan(20)
    exact = {i for i, (at, following) in enumerate(pairwise(plan)) if at.guidance and not following.guidance}
    for branch in ("cond", "uncond"):
        assert exact <= set(steps_of(trace, "compute", branch))
    assert {"compute", "predict", "rebuild"} == set(trace.summary()["calls"])


@pytest.mark.parametrize("order", [1, -1])
def test_tokens_are_reduced_in_the_steps_that_run_the_blocks(order, pipe, sample):
    reducing = AsymRnR(schedule="fixed", query_rate=0.5, start=0, correction="none")
    with accel.apply(pipe, [FasterCache(reuse="stack"), reducing][::order]) as trace:
        assert sample(pipe).isfinite().all()
    assert trace.summary()["calls"]["predict"] > 0 and trace.summary()["attention"]["reduce"] > 0


def test_compiled_blocks_share_one_graph_over_all_steps(pipe, sample):
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    with accel.apply(pipe, [FasterCache(reuse="stack")]) as trace:
        assert sample(pipe, steps=12).isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert {e.action for e in trace.events.values()} == {"compute", "predict", "rebuild"}
