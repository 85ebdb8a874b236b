"""DBCache: the cache of the package cache-dit, as it is, with the work that it skips counted."""

import logging
from importlib.util import find_spec

import pytest
import torch
from families.tiny import TINY, noise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import accel
from accel.evaluation.suites import Setting
from accel.methods import DBCache, FasterCache, SeaCache
from accel.runtime.run import Cancelled

needs_cache_dit = pytest.mark.skipif(
    not find_spec("cache_dit"), reason="DBCACHE IS NOT TESTED: cache-dit is missing, see CONTRIBUTING.md"
)
STEPS = 8
SKIPPING = {"residual_diff_threshold": 0.5, "max_warmup_steps": 3, "max_continuous_cached_steps": 2}
ACTIVE = DBCache(**SKIPPING)


def attributes(pipe) -> tuple:
    """What a cache could leave behind: attributes of every module, of the pipeline and of its class, and forwards."""
    models = [model for model in (pipe.transformer, getattr(pipe, "transformer_2", None)) if model is not None]
    modules = [module for model in models for module in model.modules()]
    hooks = [dict(module._forward_pre_hooks) for module in modules]
    return [sorted(vars(m)) for m in modules], hooks, sorted(vars(pipe)), dict(vars(type(pipe)))


def cancel(pipe, index, t, tensors):
    """Cancels a run while the cache is filled."""
    if index == STEPS - 2:
        raise Cancelled
    return {}


@pytest.fixture
def build():
    """build(family): a tiny pipeline, and run(steps): its latents."""

    def make(family):
        pipe, inputs = TINY[family]()

        def run(steps=STEPS, **more):
            seeded = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
            return pipe(**inputs | more, num_inference_steps=steps, **seeded).frames

        return pipe, run

    return make


def by_hand(pipe, method) -> None:
    """cache-dit's cache enabled on the pipeline, as its documents have it."""
    import cache_dit

    order = method.taylorseer_order
    taylor = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order)} if order else {}
    config = cache_dit.DBCacheConfig(**method.model_dump(exclude={"taylorseer_order"}))
    cache_dit.enable_cache(pipe, cache_config=config, **taylor)


@needs_cache_dit
@pytest.mark.parametrize("family, order", [("wan", 0), ("wan", 1), ("wan_22", 0), ("cogvideox_2b", 2)])
def test_it_is_bitwise_the_cache_enabled_by_hand_and_its_work_is_what_was_computed(family, order, build):
    import cache_dit

    pipe, run = build(family)
    method = DBCache(**SKIPPING, taylorseer_order=order)
    with accel.apply(pipe, method) as trace, sdpa_kernel(SDPBackend.MATH):  # whose FLOPs torch counts
        latents, summary = run(), trace.summary()
    by_hand(pipe, method)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(run(), latents)
    finally:
        cache_dit.disable_cache(pipe)
    computed = counter.get_flop_counts()[type(pipe.transformer).__name__]
    assert trace.flops_computed_and_full()[0] == sum(computed.values()) < 0.98 * summary["flops_full"]
    assert summary["calls"]["predict"] > 0 and not summary["messages"]
    assert 0 < summary["peak_bytes"] <= summary["estimated_bytes"]


@needs_cache_dit
@pytest.mark.parametrize(
    "family", ["wan_image", "wan_video", "skyreels_v2", "hunyuan_video_15", "ltx", "mochi", "kandinsky5"]
)
def test_it_skips_blocks_in_other_families_too(family, build):
    pipe, run = build(family)
    with accel.apply(pipe, DBCache(residual_diff_threshold=1.0, max_warmup_steps=2)) as trace:
        assert run(steps=4).isfinite().all()
    assert trace.summary()["calls"]["predict"] > 0


@needs_cache_dit
def test_cache_dit_logs_nothing(build, monkeypatch):
    records = []
    monkeypatch.setattr(logging.Logger, "handle", lambda logger, record: records.append(record))
    pipe, run = build("wan")
    with accel.apply(pipe, ACTIVE):
        run()
    assert not [record for record in records if record.name.startswith("cache_dit")]


@needs_cache_dit
def test_processes_that_make_videos_of_their_own_do_not_wait_for_each_other(build, monkeypatch):
    """cache-dit averages the change over all processes of a group, whatever they compute."""
    pipe, run = build("wan")
    with accel.apply(pipe, ACTIVE):
        expected = run()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *group: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *args, **named: pytest.fail("waits for the others"))
    with accel.apply(pipe, ACTIVE):
        assert torch.equal(run(), expected)


@needs_cache_dit
@pytest.mark.parametrize("family", ["wan", "wan_22"])
def test_a_run_sees_nothing_of_others_and_leaves_nothing_in_the_model_or_the_pipeline(family, build):
    pipe, run = build(family)
    baseline = run()
    before = attributes(pipe)
    with accel.apply(pipe, ACTIVE):
        first = run()
        run(steps=5)
        with pytest.raises(Cancelled):
            run(callback_on_step_end=cancel)
        assert torch.equal(run(), first) and not torch.equal(first, baseline)
    with pytest.raises(Cancelled), accel.apply(pipe, ACTIVE):
        run(callback_on_step_end=cancel)
    assert attributes(pipe) == before and torch.equal(run(), baseline)


@needs_cache_dit
def test_neutral_settings_compute_everything(build, installed_neutral):
    pipe, run = build("wan")
    baseline = run()
    with accel.apply(pipe, DBCache(**DBCache.neutral, max_warmup_steps=0)) as trace:
        assert torch.equal(run(), baseline)
    assert trace.summary()["flops_ratio"] == 1 and "does nothing" in trace.messages[0]


@needs_cache_dit
def test_the_branches_of_guidance_never_mix(build):
    pipe, _ = build("wan")
    texts = [noise(1, 6, 16, seed=seed) for seed in (1, 2, 3)]
    pipe.scheduler.set_timesteps(STEPS)
    latents = noise(STEPS, 1, 4, 3, 8, 8)

    def outputs(cond, uncond) -> dict[str, torch.Tensor]:
        """Outputs of both branches, in a loop that gives every step the same latents whatever they are."""
        found = {"cond": [], "uncond": []}
        for x, time in zip(latents, pipe.scheduler.timesteps):
            for name, text in (("cond", cond), ("uncond", uncond)):
                with torch.no_grad(), pipe.transformer.cache_context(name):
                    found[name] += pipe.transformer(x, time[None], text, return_dict=False)
        return {name: torch.cat(found[name]) for name in found}

    with accel.apply(pipe, DBCache(residual_diff_threshold=1.0, max_warmup_steps=2)) as trace:
        one, other = outputs(texts[0], texts[1]), outputs(texts[0], texts[2])
    assert trace.summary()["calls"] == {"compute": 4, "predict": 2 * STEPS - 4}
    assert torch.equal(one["cond"], other["cond"]) and not torch.equal(one["uncond"], other["uncond"])


@needs_cache_dit
def test_a_run_without_guidance_has_one_call_in_a_step(build):
    pipe, run = build("wan")
    with accel.apply(pipe, DBCache(residual_diff_threshold=1.0, max_warmup_steps=3)) as trace:
        run(guidance_scale=1.0)
    assert trace.summary()["calls"] == {"compute": 3, "predict": STEPS - 3}


@needs_cache_dit
def test_guidance_that_ends_in_mid_run_is_refused(build):
    def unguide(pipe, index, t, tensors):
        pipe._guidance_scale = 1.0 if index == 4 else pipe._guidance_scale
        return {}

    pipe, run = build("wan")
    with pytest.raises(ValueError, match="tells the branches of guidance apart by counting calls"):
        with accel.apply(pipe, ACTIVE):
            run(callback_on_step_end=unguide)


@needs_cache_dit
@pytest.mark.parametrize("change", ["offload", "blocks"])
def test_a_change_between_two_runs_leaves_it_acting(change, build):
    pipe, run = build("wan")
    with accel.apply(pipe, ACTIVE) as trace:
        first, share = run(), trace.summary()["flops_ratio"]
        if change == "offload":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            pipe.transformer.blocks = torch.nn.ModuleList(pipe.transformer.blocks.children())
        assert torch.equal(run(), first) and trace.summary()["flops_ratio"] == share < 1
    assert not hasattr(pipe.transformer, "_is_cached")
    assert hasattr(pipe.transformer, "_hf_hook") == (change == "offload")


@needs_cache_dit
def test_a_run_in_which_nothing_was_skipped_is_told(build):
    pipe, run = build("wan")
    for method, steps, text in (
        (DBCache(residual_diff_threshold=0.01, max_warmup_steps=0), 3, "skipped nothing in this run"),
        (DBCache(), 8, "does nothing: 8 steps are too few, as it computes 8 in full"),
    ):
        with accel.apply(pipe, method) as trace:
            run(steps=steps)
        assert [text in message for message in trace.messages] == [True] and trace.summary()["flops_ratio"] == 1


@needs_cache_dit
def test_what_it_cannot_run_on_is_refused_in_a_sentence(build, monkeypatch):
    refused = "^DBCache \\(cache-dit\\) cannot run on "
    with pytest.raises(ValueError, match=f"{refused}WanVACE.* changes hidden states between its blocks"):
        accel.apply(build("wan_vace")[0], ACTIVE).__enter__()
    pipe, _ = build("wan")
    with pytest.raises(ValueError, match=f"{refused}.* make 3 blocks, and it has 2$"):
        accel.apply(pipe, DBCache(Bn_compute_blocks=2)).__enter__()
    monkeypatch.setattr("cache_dit.BlockAdapterRegister._adapters", {})
    with pytest.raises(ValueError, match=f"{refused}WanTransformer3DModel: cache-dit does not know this model"):
        accel.apply(pipe, ACTIVE).__enter__()
    for block in pipe.transformer.blocks:
        block.compile(backend="eager")
    with pytest.raises(ValueError, match="cannot be counted inside compiled blocks"):
        accel.apply(pipe, ACTIVE).__enter__()
    assert not hasattr(pipe.transformer, "_is_cached")


@needs_cache_dit
def test_a_cache_that_the_user_has_put_on_is_refused_and_without_methods_acts_as_ever(build):
    import cache_dit

    pipe, run = build("wan")
    by_hand(pipe, ACTIVE)
    try:
        for method in (SeaCache, FasterCache, ACTIVE):
            with pytest.raises(ValueError, match="^cache-dit.s cache and .* by cache_dit.disable_cache"):
                accel.apply(pipe, method).__enter__()
        latents = run()
        with accel.apply(pipe) as trace:
            assert torch.equal(run(), latents) and trace.messages[0].startswith("cache-dit's cache is on")
    finally:
        cache_dit.disable_cache(pipe)
    with accel.apply(pipe, ACTIVE):
        assert torch.equal(run(), latents)


def test_it_runs_alone(pipe):
    for other in (SeaCache, FasterCache):
        with pytest.raises(ValueError, match="do not go together: a peer runs alone"):
            accel.apply(pipe, [ACTIVE, other]).__enter__()


def test_without_cache_dit_it_is_not_available_and_says_how_to_install_it(pipe, monkeypatch):
    monkeypatch.setattr("accel.methods.cachedit.find_spec", lambda name: None)
    assert not Setting(overrides={"dbcache": {}}).is_available("nowhere")
    with pytest.raises(ValueError, match="^DBCache .cache-dit. needs .* pip install cache-dit==1.5.3$"):
        accel.apply(pipe, ACTIVE).__enter__()
