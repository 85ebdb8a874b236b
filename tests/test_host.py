"""The host on its own: step and branch, nesting, three places, pipelines that tell less."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

import accel
from accel.families import wan
from accel.heads import Opened
from accel.host import Host
from accel.methods.base import Method
from accel.trace import Trace


def test_nothing_applied_is_bitwise_the_plain_pipeline(pipe, sample):
    plain = sample(pipe)
    with accel.apply(pipe, []) as trace:
        assert torch.equal(sample(pipe), plain)
    assert trace.summary()["work"] == 1.0 and trace.summary()["calls"] == {"compute": 40}


def test_an_attention_backend_that_takes_no_bias_is_refused_by_its_name():
    q, opened = torch.zeros(1, 3, 2, 4), Opened(wan, None)
    opened._attention_backend = AttentionBackendName.SAGE
    with pytest.raises(ValueError, match="attention backend sage takes no bias"):
        opened.inner(SimpleNamespace(query=lambda: q, key=lambda: q, value=lambda: q, bias=torch.zeros(1, 1, 1, 3)))


def test_step_and_branch_come_from_the_pipeline(pipe, sample):
    seen = []
    host = Host(pipe, Trace())

    def spy(inner, x, **inputs):
        seen.append((host.step.index, host.step.branch, host.step.sigma, host.step.sigma_next))
        return inner(x, **inputs)

    with host.attached(), host.wrap_denoiser(spy):
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


class Plus(Method):
    """Adds to an attention's output; two of them tell whether wrappers nest."""

    value: float

    @contextmanager
    def apply(self, host, trace):
        with host.wrap_attention(lambda inner, site: inner() * 2 + self.value):
            yield


def test_wrappers_nest_and_order_matters(pipe):
    attention = pipe.transformer.blocks[0].attn1
    x = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(0))
    plain = attention(x)
    with accel.apply(pipe, [Plus(value=1.0), Plus(value=10.0)]) as trace:
        host_step(pipe, trace)
        torch.testing.assert_close(attention(x), (plain * 2 + 1) * 2 + 10)
    assert torch.equal(attention(x), plain)


def host_step(pipe, trace):
    """One transformer call, so that the host knows where it is."""
    pipe.scheduler.set_timesteps(5)
    x = torch.randn(1, 4, 3, 8, 8)
    with pipe.transformer.cache_context("cond", step_index=0, sigma=1.0, num_inference_steps=5):
        pipe.transformer(hidden_states=x, timestep=torch.tensor([999]), encoder_hidden_states=torch.randn(1, 6, 16))


def test_the_stack_of_blocks_can_be_wrapped(pipe, sample):
    plain, calls = sample(pipe), []
    host = Host(pipe, Trace())

    def stack(inner, hidden, *inputs):
        calls.append(hidden.shape)
        return inner(hidden, *inputs)

    with host.attached(), host.wrap_blocks(stack):
        assert torch.equal(sample(pipe), plain)
    assert len(calls) == 40
    with host.attached(), host.wrap_blocks(lambda inner, hidden, *inputs: hidden):
        assert not torch.equal(sample(pipe), plain)


def test_work_is_counted_as_torch_counts_it(pipe, sample):
    """Two blocks of width 24 on 48 tokens with 6 words: the sum by hand of all matrix products."""
    with accel.apply(pipe, []) as trace:
        sample(pipe, steps=1)
    n, d, words = 3 * 4 * 4, 24, 6
    attention = 4 * 2 * n * d * d + 2 * 2 * n * n * d
    assert trace.flops["blocks.0.attn1"] == attention
    cross = 2 * 2 * n * d * d + 2 * 2 * words * d * d + 2 * 2 * n * words * d
    assert trace.flops["blocks.0"] == attention + cross + 2 * 2 * n * d * 48


def test_unknown_pipeline_is_refused_by_name():
    class StableDiffusionPipeline:
        pass

    with pytest.raises(ValueError, match="StableDiffusionPipeline is not supported"):
        with accel.apply(StableDiffusionPipeline(), []):
            pass


def test_attention_backend_stays_settable(pipe, sample):
    plain = sample(pipe)
    with accel.apply(pipe, []):
        pipe.transformer.set_attention_backend("_native_math")
        torch.testing.assert_close(sample(pipe), plain, rtol=1e-4, atol=1e-4)
