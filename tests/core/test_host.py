"""The host without a method: steps and branches, nested wrappers, and pipelines that do not name their branches."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideoFramepackPipeline, WanPipeline
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from families.tiny import TINY

import accel
from accel.core.flops import count_flops
from accel.core.host import Host
from accel.core.trace import Trace
from accel.families import family_of
from accel.families.wan import Wan
from accel.methods import FasterCache
from accel.methods.base import Method


def test_without_methods_the_output_is_bitwise_the_baselines(pipe, sample):
    baseline = sample(pipe)
    with accel.apply(pipe, []) as trace:
        assert torch.equal(sample(pipe), baseline)
    assert trace.summary()["flops_ratio"] == 1.0 and trace.summary()["calls"] == {"compute": 40}


def test_step_and_branch_come_from_the_pipeline(pipe, sample):
    seen = []
    host = Host(pipe, Trace())

    def spy(inner, x, **inputs):
        seen.append((host.step.index, host.step.branch, host.step.sigma, host.step.sigma_next))
        return inner(x, **inputs)

    with host.wrap_denoiser(spy), host.attached():
        sample(pipe, steps=3)
    assert [s[:2] for s in seen] == [(i, b) for i in range(3) for b in ("cond", "uncond")]
    assert seen[0][2] > seen[0][3] == seen[2][2] and seen[-1][3] == 0


def test_step_and_branch_without_a_cache_context(pipe, sample, monkeypatch):
    """As in WanVideoToVideoPipeline: a step is a new timestep, a branch a text embedding."""

    @contextmanager
    def silent(*args, **kwargs):
        yield

    monkeypatch.setattr(type(pipe.transformer), "cache_context", silent)
    with accel.apply(pipe, []) as trace:
        sample(pipe, steps=4)
        sample(pipe, steps=4)
    assert sorted({e[:2] for e in trace.events}) == [(i, b) for i in range(4) for b in ("cond", "uncond")]


def call_without_context(pipe, time: torch.Tensor, text: torch.Tensor) -> None:
    """A transformer call of a pipeline that names neither step nor branch."""
    pipe.transformer(hidden_states=torch.zeros(1, 4, 3, 8, 8), timestep=time, encoder_hidden_states=text)


def test_video_to_video_runs_the_last_steps_of_the_schedule(pipe):
    """As in WanVideoToVideoPipeline: the first two of five steps are skipped."""
    pipe.scheduler.set_timesteps(5)
    pipe._num_timesteps, pipe._guidance_scale, text = 3, 1.0, torch.zeros(1, 6, 16)

    class LastSteps(WanPipeline):
        def __call__(self):
            for time in self.scheduler.timesteps[2:]:
                call_without_context(self, time[None], text)

    pipe.__class__ = LastSteps
    host, seen = Host(pipe, Trace()), []
    with (
        host.wrap_denoiser(lambda inner, x, **inputs: (seen.append(host.step), inner(x, **inputs))[1]),
        host.attached(),
    ):
        pipe()
    sigmas = pipe.scheduler.sigmas[2:].tolist()
    assert [(s.index, s.count, s.sigma) for s in seen] == [(i, 3, sigmas[i]) for i in range(3)]
    assert seen[-1].sigma_next == 0


def test_steps_are_found_where_tokens_of_a_given_frame_have_timestep_zero(pipe):
    """Wan 2.2 image to video: one timestep per token, 0 for the tokens of the image."""
    pipe.scheduler.set_timesteps(3)
    text, n = torch.zeros(1, 6, 16), 3 * 4 * 4
    with accel.apply(pipe, []) as trace:
        for time in pipe.scheduler.timesteps:
            call_without_context(pipe, (time * (torch.arange(n) >= 16))[None], text)
    assert len(trace.sigmas) == 3


def test_the_host_stays_attached_to_models_that_are_offloaded_after_each_call(pipe, sample):
    baseline = sample(pipe)
    pipe.enable_model_cpu_offload(
        device="cpu"
    )  # the device does not change; what counts is that diffusers removes all hooks
    forward = pipe.transformer.forward
    with accel.apply(pipe, [FasterCache()]) as trace:
        first, once = sample(pipe), trace.summary()
        second, twice = sample(pipe, seed=1), trace.summary()
        assert torch.equal(sample(pipe), first) and not torch.equal(first, baseline)
    assert once["flops_ratio"] == twice["flops_ratio"] < 1 and not torch.equal(first, second)
    assert torch.equal(sample(pipe), baseline) and "maybe_free_model_hooks" not in vars(pipe)
    assert type(pipe.transformer.forward) is type(forward)


def test_group_offloading_that_would_remove_the_hook_is_refused(pipe):
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    registry.register_hook(ModelHook(), "lazy_prefetch_group_offloading")
    with pytest.raises(ValueError, match="call the pipeline once before accel.apply"):
        with accel.apply(pipe, []):
            pass


def test_a_transformer_compiled_as_a_whole_is_refused(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="compile its blocks"):
        with accel.apply(pipe, []):
            pass


class Plus(Method):
    """Doubles an attention's output and adds a value: the result of two of them depends on their order."""

    value: float

    @contextmanager
    def apply(self, host, trace):
        with host.wrap_attention(lambda inner, layer: inner() * 2 + self.value):
            yield


class Inner(Plus):
    """The same under a name of its own."""


def test_wrappers_nest_and_order_matters(pipe):
    attention, outputs = pipe.transformer.blocks[0].attn1, []
    attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    call_once(pipe)
    with accel.apply(pipe, [Inner(value=1.0), Plus(value=10.0)]):
        call_once(pipe)
        x = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(0))
        alone = attention(x)  # called by itself it is the model's own
    assert torch.equal(alone, attention(x))
    torch.testing.assert_close(outputs[-3], (outputs[0] * 2 + 1) * 2 + 10)


def call_once(pipe):
    """One transformer call with a cache context, which gives the host its step."""
    pipe.scheduler.set_timesteps(5)
    noise = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 4, 3, 8, 8, generator=noise), torch.randn(1, 6, 16, generator=noise)
    with pipe.transformer.cache_context("cond", step_index=0, sigma=1.0, num_inference_steps=5):
        pipe.transformer(hidden_states=x, timestep=torch.tensor([999]), encoder_hidden_states=text)


def test_the_stack_of_blocks_can_be_wrapped(pipe, sample):
    baseline, calls = sample(pipe), []
    host = Host(pipe, Trace())

    def stack(inner, hidden, *inputs):
        calls.append(hidden.shape)
        return inner(hidden, *inputs)

    with host.wrap_blocks(stack), host.attached():
        assert torch.equal(sample(pipe), baseline)
    assert len(calls) == 40
    with host.wrap_blocks(lambda inner, hidden, *inputs: hidden), host.attached():
        assert not torch.equal(sample(pipe), baseline)


def test_a_model_that_changes_hidden_states_between_blocks_has_no_stack(pipe):
    pipe.transformer.__class__ = type("WanVACETransformer3DModel", (type(pipe.transformer),), {})
    host = Host(pipe, Trace())
    with pytest.raises(ValueError, match="WanVACETransformer3DModel changes hidden states between its blocks"):
        with host.wrap_blocks(lambda inner, *inputs: inner(*inputs)), host.attached():
            pass


def test_flops_are_counted_as_by_hand(pipe, sample):
    """Two blocks of width 24 on 48 tokens with 6 words: the sum by hand of all matrix products."""
    with accel.apply(pipe, []) as trace:
        sample(pipe, steps=1)
    n, d, words = 3 * 4 * 4, 24, 6
    attention = 4 * 2 * n * d * d + 2 * 2 * n * n * d
    assert trace.flops["blocks.0.attn1"] == attention
    cross = 2 * 2 * n * d * d + 2 * 2 * words * d * d + 2 * 2 * n * words * d
    assert trace.flops["blocks.0"] == attention + cross + 2 * 2 * n * d * 48


def test_an_unknown_pipeline_is_refused_by_name():
    class StableDiffusionPipeline(DiffusionPipeline):
        pass

    with pytest.raises(ValueError, match="StableDiffusionPipeline is not supported"):
        with accel.apply(StableDiffusionPipeline(), []):
            pass


def test_the_attention_backend_can_still_be_set(pipe, sample):
    baseline = sample(pipe)
    with accel.apply(pipe, []):
        pipe.transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(sample(pipe), baseline, rtol=1e-4, atol=1e-4)
    pipe.transformer.reset_attention_backend()


def test_sparse_attention_is_refused_by_name():
    pipe, _ = TINY["kandinsky5"]()
    pipe.transformer.register_to_config(attention_type="nabla")
    with pytest.raises(ValueError, match="attention_type nabla"), accel.apply(pipe, []):
        pass


@pytest.mark.parametrize("name", ["wan", "kandinsky5"])
def test_without_return_dict_a_call_returns_what_the_stock_model_returns(name):
    """Kandinsky 5 returns its output as it is, the others in a tuple."""
    pipe, inputs = TINY[name]()
    calls, record = [], lambda model, args, named, output: calls.append((args, {**named, "return_dict": False}))
    with pipe.transformer.register_forward_hook(record, with_kwargs=True):
        pipe(**inputs, num_inference_steps=2, output_type="latent")
    args, named = calls[0]
    with torch.no_grad():
        stock = pipe.transformer(*args, **named)
        with accel.apply(pipe, []):
            assert type(pipe.transformer(*args, **named)) is type(stock)


def test_flops_are_counted_under_any_attention_backend(pipe, monkeypatch):
    """Some backends refuse meta tensors and some are not counted: this one would raise."""
    monkeypatch.setattr("accel.core.flops._COUNTED", {})
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.SAGE)
    given = {"timestep": torch.zeros(1), "encoder_hidden_states": torch.zeros(1, 6, 16)}
    flops = count_flops(pipe.transformer, torch.zeros(1, 4, 3, 8, 8), given)
    assert flops["blocks.0.attn1"] == 4 * 2 * 48 * 24 * 24 + 2 * 2 * 48 * 48 * 24


def test_other_threads_that_run_the_same_model_are_not_counted(pipe, monkeypatch):
    """Torch's counter hears the modules of every thread; here each operation of the counted call lets another run."""
    monkeypatch.setattr("accel.core.flops._COUNTED", {})
    given = {"timestep": torch.zeros(1), "encoder_hidden_states": torch.zeros(1, 6, 16)}
    alone = dict(count_flops(pipe.transformer, torch.zeros(1, 4, 3, 8, 8), given))
    monkeypatch.setattr("accel.core.flops._COUNTED", {})
    pool, original = ThreadPoolExecutor(1), torch.nn.Linear.forward

    def linear(self, x):
        if x.is_meta:
            pool.submit(pipe.transformer, torch.zeros(1, 4, 3, 8, 8), **given).result()
        return original(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    assert count_flops(pipe.transformer, torch.zeros(1, 4, 3, 8, 8), given) == alone


def test_of_the_calls_that_were_counted_the_last_are_remembered(pipe, monkeypatch):
    monkeypatch.setattr("accel.core.flops._COUNTED", counted := {})
    monkeypatch.setattr("accel.core.flops.MAX_COUNTED", 2)
    given = {"timestep": torch.zeros(1), "encoder_hidden_states": torch.zeros(1, 6, 16)}
    found = [count_flops(pipe.transformer, torch.zeros(1, 4, 3, 8, width), given)["denoiser"] for width in (8, 16, 24)]
    assert list(counted.values())[0]["denoiser"] == found[1] and len(counted) == 2


def test_flops_are_counted_for_each_mask_where_they_depend_on_it():
    """Mochi's joint attention leaves out the masked tokens of the text."""
    pipe, inputs = TINY["mochi"]()
    counts = []
    for words in (8, 3, 8):
        mask = torch.zeros_like(inputs["prompt_attention_mask"])
        mask[:, :words] = 1
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        with accel.apply(pipe, []) as trace:
            pipe(**inputs | masks, num_inference_steps=2, output_type="latent")
        counts.append(trace.flops["denoiser"])
    assert counts[0] == counts[2] > counts[1]


def test_a_subclass_of_a_pipeline_is_of_its_family():
    class MyOwn(WanPipeline):
        pass

    assert isinstance(family_of(MyOwn.__new__(MyOwn)), Wan)


def test_framepack_whose_history_comes_before_the_video_is_refused():
    pipe = HunyuanVideoFramepackPipeline.__new__(HunyuanVideoFramepackPipeline)
    with pytest.raises(ValueError, match="HunyuanVideoFramepackPipeline is not supported yet"):
        family_of(pipe)


def test_a_modular_pipeline_is_refused_by_name():
    with pytest.raises(ValueError, match="WanModularPipeline is no DiffusionPipeline"):
        family_of(type("WanModularPipeline", (), {})())
