"""The warning before a run whose caches do not fit into the GPU."""

import pytest
import torch

from accel.core.trace import Trace
from accel.families import FAMILIES
from accel.methods import AsymRnR, FasterCache, base
from accel.methods.base import MIN_CACHED_STEPS, WORKING_TENSORS, RunSpec, report_estimate


class Model:
    """What an estimate reads of a denoiser."""

    class config:
        num_attention_heads, attention_head_dim = 2, 16


@pytest.fixture
def spec(monkeypatch):
    """A run of 48 tokens of width 32 that says that it is on a GPU."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    return RunSpec(Model, FAMILIES[0], torch.empty(1, 4, 3, 4, 4), (3, 4, 4), MIN_CACHED_STEPS, True, 2)


def messages(spec, monkeypatch, free: int) -> list[str]:
    monkeypatch.setattr(base, "free_memory", lambda device: free + WORKING_TENSORS * 48 * 32 * 4)
    trace = Trace()
    for method in (FasterCache(), AsymRnR()):
        report_estimate(method, spec, trace)
    return trace.messages


def test_methods_that_fit_alone_but_not_together_are_warned_of_in_one_sentence(spec, monkeypatch):
    needed = FasterCache().estimate_memory(spec) + AsymRnR().estimate_memory(spec)
    assert messages(spec, monkeypatch, needed) == []
    (message,) = messages(spec, monkeypatch, needed - 1)
    assert message.startswith("AsymRnR may run out of memory") and "fastercache.max_cache_gib" in message


def test_what_a_method_holds_already_is_not_counted_again(spec, monkeypatch):
    monkeypatch.setattr(base, "free_memory", lambda device: 10**6)
    trace = Trace()
    trace.reserve_memory("gpd", 10**9)
    report_estimate(FasterCache(), spec, trace)
    assert trace.messages == [] and trace.estimated_bytes > 10**9
