"""Every family in bfloat16, with weights in eight bits, and with int8 weights: neutral is the baseline, methods act."""

import pytest
import torch
from families.tiny import EACH_FAMILY, TINY

import accel
from accel.methods import AsymRnR, DisCa, FasterCache

REDUCING = AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0.5, correction="none")
METHODS = [FasterCache(), REDUCING, DisCa(predictor="taylor-1")]
NEUTRAL = [type(method)(**method.neutral) for method in METHODS]

ALWAYS_RUN = ["wan", "cogvideox", "ltx"]


def in_bfloat16(pipe, inputs: dict) -> dict:
    pipe.to(torch.bfloat16)
    is_float = lambda value: isinstance(value, torch.Tensor) and value.is_floating_point()
    return {key: value.to(torch.bfloat16) if is_float(value) else value for key, value in inputs.items()}


def stored_in_eight_bits(pipe, inputs: dict) -> dict:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return inputs


def quantized_to_int8(pipe, inputs: dict) -> dict:
    reason = "METHODS ON INT8 WEIGHTS ARE NOT TESTED: torchao is missing, see CONTRIBUTING.md"
    quantization = pytest.importorskip("torchao.quantization", reason=reason)
    quantization.quantize_(pipe.transformer, quantization.Int8WeightOnlyConfig())
    return inputs


@pytest.mark.parametrize(
    "name, change",
    [pytest.param(name, change, marks=() if name in ALWAYS_RUN else pytest.mark.slow)
     for name in EACH_FAMILY for change in (in_bfloat16, stored_in_eight_bits, quantized_to_int8)
     if (name, change) != ("kandinsky5", in_bfloat16)],  # the stock pipeline runs so on a GPU only
)  # fmt: skip
def test_neutral_is_the_baseline_and_methods_act(name, change, installed_neutral):
    pipe, inputs = TINY[name]()
    inputs = change(pipe, inputs)
    run = lambda: (
        pipe(**inputs, num_inference_steps=12, generator=torch.Generator().manual_seed(0), output_type="latent").frames
    )
    baseline = run()
    with accel.apply(pipe, NEUTRAL):
        assert torch.equal(run(), baseline)
    with accel.apply(pipe, METHODS) as trace:
        latents = run()
    assert latents.isfinite().all() and latents.dtype == baseline.dtype and not torch.equal(latents, baseline)
    assert "predict" in trace.summary()["calls"] and {"reuse", "reduce"} <= trace.summary()["attention"].keys()
    assert torch.equal(run(), baseline)
