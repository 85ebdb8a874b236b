"""StepCache: which steps are full, what is cached and predicted, and what it says when it does nothing."""

import gc
from types import SimpleNamespace

import pytest
import torch

import accel
from accel.families.wan import Wan
from accel.methods import AsymRnR, DisCa, FasterCache, MeanFlow, StepCache
from accel.methods.base import RunSpec
from accel.methods.stepcache import CAUTION, State, spread_steps
from accel.ops.noise import log_snr
from accel.ops.taylor import TaylorCache


def full_steps(trace) -> dict[str, list[int]]:
    """By branch, the steps in which the whole transformer ran."""
    calls = [e for e in trace.events.values() if e.layer == "denoiser" and e.action == "compute"]
    return {branch: [e.step for e in calls if e.branch == branch] for branch in ("cond", "uncond")}


@pytest.mark.parametrize("count", [10, 12, 50])
def test_full_steps_are_spread_ever_further_apart_from_the_first_two_to_the_last(count):
    for num_full_steps in range(3, count + 1):
        steps = spread_steps(num_full_steps, count)
        gaps = [after - before for before, after in zip(steps, steps[1:])]
        assert len(steps) == num_full_steps and steps[:2] == [0, 1] and steps[-1] == count - 1
        assert min(gaps) >= 1 and all(later >= gap - 1 for gap, later in zip(gaps, gaps[1:]))  # but for rounding


def test_given_full_steps_are_scaled_to_the_run():
    method = StepCache(full_steps="0 2 4 10 20")
    assert method.planned_steps(21) == [0, 1, 2, 4, 10, 20] and method.planned_steps(41) == [0, 1, 4, 8, 20, 40]
    with pytest.raises(ValueError, match="must rise from 0"):
        StepCache(full_steps="1 2")


def test_blocks_are_skipped_in_both_branches_between_the_full_steps(pipe, sample):
    calls = []
    pipe.transformer.blocks[1].ffn.register_forward_hook(lambda *_: calls.append(1))
    with accel.apply(pipe, [StepCache(full_steps="0 1 3 6 11")]) as trace:
        sample(pipe, steps=12)
    assert len(calls) == 10 and full_steps(trace) == {"cond": [0, 1, 3, 6, 11], "uncond": [0, 1, 3, 6, 11]}
    assert trace.summary()["calls"] == {"compute": 10, "predict": 14}
    assert trace.method_data["stepcache"]["full_steps"] == [0, 1, 3, 6, 11]


def test_the_residual_continues_most_of_the_way_along_the_log_snr(pipe, sample):
    """Of a trend that has always been right so far, here of blocks that add the log SNR, `CAUTION` continues."""
    model, levels, inputs, outputs = pipe.transformer, [], [], []
    sigma = lambda: float(pipe.scheduler.sigmas[len(levels)])
    enter = lambda *_: levels.append(log_snr(1 - sigma(), sigma()))
    model.patch_embedding.register_forward_pre_hook(enter)
    model.patch_embedding.register_forward_hook(lambda _, args, out: inputs.append(out.flatten(2).transpose(1, 2)))
    model.norm_out.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    for block in model.blocks:
        block.forward = lambda hidden, *_: hidden + levels[-1]
    with accel.apply(pipe, [StepCache(full_steps="0 1 2 3 4 5 6 7 8 10 11")]):
        sample(pipe, steps=12, guidance=1.0)
    added = [(after - before).mean().item() for before, after in zip(inputs, outputs)]
    predicted = levels[8] + CAUTION * (levels[9] - levels[8])
    assert added == pytest.approx(
        [len(model.blocks) * level for level in [*levels[:9], predicted, *levels[10:]]], abs=1e-5
    )


def test_predictions_are_never_cached(pipe, sample, monkeypatch):
    cached, refresh = [], TaylorCache.refresh
    spy = lambda self, position, *rest: (cached.append(position), refresh(self, position, *rest))
    monkeypatch.setattr(TaylorCache, "refresh", spy)
    with accel.apply(pipe, [StepCache(full_steps="0 1 4 11")]) as trace:
        sample(pipe, steps=12, guidance=1.0)
    assert cached == [
        log_snr(1 - trace.sigmas[i], trace.sigmas[i]) for i in (0, 1, 4)
    ]  # after the last step nothing is predicted


@pytest.mark.parametrize("method", [StepCache(full_steps="0 1 4 11"), DisCa(predictor="taylor-1")])
def test_nothing_is_cached_any_more_while_the_video_is_decoded(method, pipe, sample):
    with accel.apply(pipe, [method]) as trace:
        sample(pipe, steps=12)
        assert trace.summary()["flops_ratio"] < 1
        assert not [found for found in gc.get_objects() if type(found) is TaylorCache]


def a_host() -> SimpleNamespace:
    """As much of a host as the change of its latents needs."""
    return SimpleNamespace(
        family=Wan(), grid=(3, 4, 4), signal=0.5, step=SimpleNamespace(sigma=0.5), active_index=0,
        denoisers=[SimpleNamespace(config=SimpleNamespace(out_channels=4))],
    )  # fmt: skip


def test_the_change_is_that_of_the_video_and_not_of_a_given_image():
    noise = torch.Generator().manual_seed(0)
    videos, image = torch.randn(2, 1, 4, 3, 8, 8, generator=noise), torch.full((1, 5, 3, 8, 8), 9.0)
    changes = []
    for condition in (image[:, :0], image):
        host, state = a_host(), State(None)
        for video in videos:
            host.latents = torch.cat([video, condition], 1)
            StepCache()._has_changed(host, state)
        changes += state.changes
    assert len(changes) == 2 and changes[0] == pytest.approx(changes[1])


def test_the_change_is_that_of_the_liveliest_sample():
    noise = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 1, 4, 3, 8, 8, generator=noise)
    changes = []
    for samples in ([0], [1], [0, 1]):
        host, state = a_host(), State(None)
        for video in (torch.cat([before, before]), torch.cat([after, before + 0.01])):
            host.latents = video[samples]
            StepCache()._has_changed(host, state)
        changes += state.changes
    assert changes[2] == pytest.approx(changes[0]) and changes[1] < changes[0] / 5


@pytest.mark.parametrize("threshold, fewest, most", [(0.3, 4, 11), (0.6, 4, 9)])
def test_a_full_pass_runs_where_the_changes_since_the_last_one_reach_the_threshold(
    threshold, fewest, most, pipe, sample
):
    with accel.apply(pipe, [StepCache(schedule="change", threshold=threshold)]) as trace:
        sample(pipe, steps=12)
    full = full_steps(trace)
    assert full["cond"] == full["uncond"] and fewest <= len(full["cond"]) <= most
    data, expected, since = trace.method_data["stepcache"], [0], 0.0
    for i, change in enumerate(data["changes"], start=1):
        since += change
        if i in (1, 11) or since >= threshold:
            expected.append(i)
            since = 0.0
    assert full["cond"] == data["full_steps"] == expected and not trace.messages


def test_a_threshold_outside_the_changes_of_the_run_is_reported_with_their_range(pipe, sample):
    with accel.apply(pipe, [StepCache(schedule="change", threshold=0)]) as trace:
        sample(pipe, steps=12)
        smallest = min(trace.method_data["stepcache"]["changes"][1:-1])
        assert trace.messages == [
            f"StepCache did nothing: its threshold 0 is not above the smallest change in a step, {smallest:.2g}"
        ]
    with accel.apply(pipe, [StepCache(schedule="change").model_copy(update={"threshold": 9})]) as trace:
        sample(pipe, steps=12)
        total = sum(trace.method_data["stepcache"]["changes"][1:-1])
    assert trace.messages == [
        f"StepCache predicted every step that it may: its threshold 9 is above the sum of all changes, {total:.2g}"
    ]


@pytest.mark.parametrize("schedule", ["spread", "change"])
def test_few_steps_are_bitwise_the_baseline(schedule, pipe, sample):
    baseline = sample(pipe, steps=6)
    with accel.apply(pipe, [StepCache(schedule=schedule)]) as trace:
        assert torch.equal(sample(pipe, steps=6), baseline)
    assert trace.messages == ["StepCache is off: 6 steps are too few, it needs at least 10"]
    assert trace.peak_bytes == trace.estimated_bytes == 0


def test_full_steps_alone_are_bitwise_the_baseline(pipe, sample):
    baseline = sample(pipe, steps=12)
    with accel.apply(pipe, [StepCache(schedule="spread", full_share=1.0)]) as trace:
        assert torch.equal(sample(pipe, steps=12), baseline)
    assert trace.messages == ["StepCache does nothing: all 12 steps are full forward passes at this setting"]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "settings", [{"schedule": "spread"}, {"threshold": 0.3}, {"threshold": 0.3, "corrector": False}]
)
def test_the_memory_estimate_is_what_a_run_holds(settings, guided, pipe, sample):
    method = StepCache(**settings)
    with accel.apply(pipe, [method]) as trace:
        sample(pipe, steps=12, guidance=4.0 if guided else 1.0)
    tokens = 3 * (64 // pipe.vae_scale_factor_spatial // 2) ** 2
    residuals, latents = 2 * (1 + guided) * tokens * 24 * 4, 4 * 4 * tokens * 4
    assert trace.peak_bytes == residuals + latents * (3 * method.corrector + (method.schedule == "change"))
    latents = torch.empty(1, 4, 3, 8, 8, device="meta")
    assert method.estimate_memory(RunSpec(pipe.transformer, Wan(), latents, (3, 4, 4), 12, guided, 2)) == (
        trace.peak_bytes
    )
    assert trace.estimated_bytes == trace.peak_bytes


def test_the_second_transformer_starts_with_an_empty_cache(two_models, sample):
    with accel.apply(two_models, [StepCache(full_steps="0 1 11")]) as trace:
        sample(two_models, steps=12)
    switch = next(i for i, sigma in trace.sigmas.items() if sigma < 0.7)
    full = full_steps(trace)
    assert full["cond"] == full["uncond"] == [0, 1, switch, 11]


@pytest.mark.parametrize("order", [1, -1])
def test_steps_from_which_fastercache_rebuilds_a_branch_are_full(order, pipe, sample):
    caching = FasterCache(attention=False, guidance_interval=3, guidance_start=0.2)
    with accel.apply(pipe, [StepCache(full_steps="0 1 19"), caching][::order]) as trace:
        assert sample(pipe, steps=20).isfinite().all()
    exact = [i for i in range(19) if caching.plan(20)[i].guidance and not caching.plan(20)[i + 1].guidance]
    full = full_steps(trace)
    assert set(exact) <= set(full["cond"]) and set(exact) <= set(full["uncond"])
    assert {"compute", "predict", "rebuild"} == set(trace.summary()["calls"])


@pytest.mark.parametrize("order", [1, -1])
def test_tokens_are_reduced_inside_full_passes(order, pipe, sample):
    reducing = AsymRnR(schedule="fixed", query_rate=0.5, start=0, correction="none")
    with accel.apply(pipe, [StepCache(full_steps="0 1 4 8 11"), reducing][::order]) as trace:
        assert sample(pipe, steps=12).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 10, "predict": 14} and trace.summary()["attention"]["reduce"] > 0


def test_a_student_of_many_steps_is_predicted_too(students, pipe, sample):
    with accel.apply(pipe, [MeanFlow(steps=12), StepCache(full_steps="0 1 4 8 11")]) as trace:
        sample(pipe, steps=12, guidance=1.0)
    assert trace.summary()["calls"] == {"compute": 5, "predict": 7}
