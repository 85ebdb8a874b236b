"""Weighted keys on attention backends that take no mask: refused before the run, with what to choose."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

import accel
from accel.errors import AccelError
from accel.methods import AsymRnR
from accel.methods.asymrnr.backends import check_backends

WEIGHTED = AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0.5, bias=True, start=0.5)


def is_refused(name: str, on_cuda: bool, config: AsymRnR = WEIGHTED) -> bool:
    attention = SimpleNamespace(processor=SimpleNamespace(_attention_backend=AttentionBackendName(name)))
    try:
        check_backends(config, [attention], on_cuda)
    except AccelError as error:
        assert str(error).startswith(f"attention backend {name} cannot weight merged keys: set asymrnr.bias to false")
        return True
    return False


@pytest.mark.parametrize("name", ["native", "_native_math", "_native_flash", "flex"])
def test_on_a_cpu_a_backend_is_refused_if_it_does_not_add_a_mask(name):
    q, k, v = torch.randn(3, 1, 16, 2, 16)
    mask = torch.randn(1, 1, 1, 16)
    expected = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=AttentionBackendName.NATIVE)
    try:
        found = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=AttentionBackendName(name))
        adds_mask = torch.allclose(found, expected, atol=1e-5)
    except ValueError:
        adds_mask = False
    assert is_refused(name, on_cuda=False) != adds_mask


def test_on_cuda_backends_are_refused_that_have_kernels_for_some_widths_only():
    refused = {backend.value for backend in AttentionBackendName if is_refused(backend.value, on_cuda=True)}
    assert {"sage", "sage_hub", "_sage_qk_int8_pv_fp16_cuda"} <= refused
    assert not refused & {"native", "flash", "_flash_3", "_native_flash", "flash_varlen"}


def test_settings_without_weighted_keys_run_on_every_backend():
    queries_only = AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0)
    for config in (WEIGHTED.model_copy(update={"bias": False}), queries_only):
        assert not any(is_refused(backend.value, False, config) for backend in AttentionBackendName)
    assert is_refused("sage", True, queries_only.model_copy(update={"pairing": "one"}))


def test_an_attention_that_calls_torch_itself_is_not_asked_for_its_backend():
    with attention_backend("_native_flash"):
        check_backends(WEIGHTED, [SimpleNamespace(processor=SimpleNamespace())], False)


def test_a_run_is_refused_at_its_first_step(pipe, sample):
    steps = []
    with accel.apply(pipe, WEIGHTED):
        with attention_backend("_native_flash"), pytest.raises(AccelError, match="backend _native_flash cannot weight"):
            sample(pipe, steps=10, on_step=lambda *given: steps.append(given[1]) or {})
        pipe.transformer.set_attention_backend("_native_flash")
        with pytest.raises(AccelError, match="backend _native_flash cannot weight"):
            sample(pipe, steps=10)
        pipe.transformer.set_attention_backend("native")
        sample(pipe, steps=10)
    assert not steps
    pipe.transformer.reset_attention_backend()
