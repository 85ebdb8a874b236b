"""Diffusers' own caches on a model: refused by name, whichever it is."""

import pytest
import torch
from diffusers import hooks
from families.tiny import TINY

import accel
from accel.core import flops
from accel.core.foreign import check_foreign, foreign_cache
from accel.methods import FasterCache

CONFIGS = {
    "FasterCache": lambda: hooks.FasterCacheConfig(current_timestep_callback=lambda: 1),
    "FirstBlockCache": lambda: hooks.FirstBlockCacheConfig(threshold=0.1),
    "MagCache": lambda: hooks.MagCacheConfig(num_inference_steps=2, mag_ratios=[1.0, 1.0]),
    "PyramidAttentionBroadcast": lambda: hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1
    ),
    "SeaCache": hooks.SeaCacheConfig,
    "TaylorSeerCache": lambda: hooks.TaylorSeerCacheConfig(cache_identifiers=["blocks.*attn1"]),
    "TextKVCache": hooks.TextKVCacheConfig,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_each_cache_of_diffusers_is_refused_until_it_is_disabled(name, pipe):
    model = pipe.transformer
    model.enable_cache(CONFIGS[name]())
    with pytest.raises(ValueError, match=f"^diffusers' {name} and accel.apply do not go together"):
        check_foreign([torch.nn.Identity(), model])
    model.disable_cache()
    check_foreign([model])


def test_without_a_method_a_cache_of_diffusers_acts_as_ever_and_the_trace_says_so(pipe, sample):
    pipe.transformer.enable_cache(hooks.FirstBlockCacheConfig(threshold=10.0))
    baseline = sample(pipe)
    with accel.apply(pipe) as trace:
        assert torch.equal(sample(pipe), baseline)
    assert "diffusers' FirstBlockCache is on" in trace.messages[0] and not trace.flops
    for method in ("fastercache", FasterCache(**FasterCache.neutral)):
        with pytest.raises(ValueError, match="do not go together"), accel.apply(pipe, method):
            pass
    pipe.transformer.disable_cache()
    assert not torch.equal(sample(pipe), baseline)


def test_a_cache_of_diffusers_counts_no_step_more_where_flops_are_counted_by_a_call(monkeypatch):
    monkeypatch.setattr(flops, "_COUNTED", {})
    pipe, inputs = TINY["mochi"]()
    iterations = []
    cache = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2, unconditional_batch_skip_range=2,
        current_timestep_callback=lambda: pipe.current_timestep, attention_weight_callback=lambda _: 0.5,
    )  # fmt: skip
    pipe.transformer.enable_cache(cache)
    denoiser = pipe.transformer._diffusers_hook.get_hook("faster_cache_denoiser")
    with accel.apply(pipe):
        pipe(
            **inputs, num_inference_steps=2, output_type="latent",
            callback_on_step_end=lambda *_: iterations.append(denoiser.state.iteration) or {},
        )  # fmt: skip
    assert iterations == [1, 2]


def test_no_cache_of_diffusers_is_missing_here():
    known = {name.removesuffix("Config") for name in vars(hooks) if name.endswith("Config")}
    assert known - {"LayerSkip", "SmoothedEnergyGuidance"} == CONFIGS.keys()  # those two are guidance, not caches


def test_hooks_that_are_no_caches_are_left_alone(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float16, torch.float32)
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    check_foreign([pipe.transformer])
    assert foreign_cache([pipe.transformer]) is None
