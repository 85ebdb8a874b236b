"""What every method promises, over all of METHODS: a new one is tested before its author writes a test."""

from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError

import accel
from accel.methods import METHODS
from accel.methods.base import Method
from accel.runtime.presets import build_methods
from accel.runtime.run import Cancelled

ALL = list(METHODS.values())
pytestmark = pytest.mark.usefixtures("students")


def fingerprint(pipe) -> dict:
    """What a method could leave behind: attributes and hooks of every module."""
    return {name: sorted(vars(m)) for name, m in pipe.transformer.named_modules()}


@pytest.mark.parametrize("method", ALL)
def test_neutral_is_bitwise_the_baseline(method, pipe, sample):
    plain = sample(pipe)
    with accel.apply(pipe, [method(**method.neutral)]):
        assert torch.equal(sample(pipe), plain)


@pytest.mark.parametrize("method", ALL)
def test_default_changes_the_output_and_computes_less(method, pipe, sample):
    with accel.apply(pipe, []) as trace:
        plain = sample(pipe)
    whole = trace.summary()["flops"]
    with accel.apply(pipe, [method()]) as trace:
        assert not torch.equal(sample(pipe, **method().required_settings()), plain)
    assert trace.summary()["flops"] < 0.95 * whole


@pytest.mark.parametrize("method", ALL)
def test_model_is_as_it_was_found_after_success(method, pipe, sample):
    plain, before = sample(pipe), fingerprint(pipe)
    with accel.apply(pipe, [method()]):
        sample(pipe, **method().required_settings())
    assert fingerprint(pipe) == before and torch.equal(sample(pipe), plain)


def cancel(pipe, index, t, tensors):
    """Ends a run while every method is at work."""
    if index == (3 if pipe.num_timesteps == 6 else 11):
        raise Cancelled
    return {}


@pytest.mark.parametrize("method", ALL)
def test_model_is_as_it_was_found_after_cancel(method, pipe, sample):
    plain, before = sample(pipe), fingerprint(pipe)
    with pytest.raises(Cancelled), accel.apply(pipe, [method()]):
        sample(pipe, on_step=cancel, **method().required_settings())
    assert fingerprint(pipe) == before and torch.equal(sample(pipe), plain)


@pytest.mark.parametrize("method", ALL)
def test_second_run_sees_nothing_of_the_first(method, pipe, sample):
    required_settings = method().required_settings()
    with accel.apply(pipe, [method()]):
        alone = sample(pipe, **required_settings)
    with accel.apply(pipe, [method()]):
        sample(pipe, height=32, **required_settings)
        with pytest.raises(Cancelled):
            sample(pipe, seed=3, on_step=cancel, **required_settings)
        assert torch.equal(sample(pipe, **required_settings), alone)


@pytest.mark.parametrize("method", ALL)
def test_computed_and_skipped_make_the_whole(method, pipe, sample):
    asked = {"steps": 20, "guidance": 4.0, **method().required_settings()}
    with accel.apply(pipe, [method()]) as trace:
        sample(pipe, **asked)
    denoiser = {(e.step, e.branch): e for e in trace.events.values() if e.layer == "denoiser"}
    assert len(denoiser) == asked["steps"] * (2 if asked["guidance"] > 1 else 1)
    for key, event in denoiser.items():
        layers = [e for e in trace.events.values() if (e.step, e.branch) == key and e.layer != "denoiser"]
        assert len(layers) == (2 if event.action == "compute" else 0)


def bounds():
    for name, method in METHODS.items():
        for knob, schema in method.parameters().items():  # the others hold files and tables: their method's own tests
            ends = schema.get("enum") or ([True, False] if schema["type"] == "boolean" else None)
            for value in ends or (schema["minimum"], schema["maximum"]):
                yield pytest.param(name, knob, value, id=f"{name}.{knob}={value}")


@pytest.mark.parametrize("name, knob, value", list(bounds()))
def test_both_ends_of_every_knob_run(name, knob, value, pipe, sample):
    (method,) = build_methods({name: {knob: value}})
    with accel.apply(pipe, [method]):
        assert sample(pipe, **method.required_settings()).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_out_of_range_and_unknown_knobs_are_named(name):
    with pytest.raises(ValueError, match=f"unknown setting {name}.colour; known are"):
        build_methods({name: {"colour": 1}})
    for knob, schema in METHODS[name].model_json_schema()["properties"].items():
        if "maximum" in schema:
            with pytest.raises(ValueError, match=rf"{name}.{knob} = 1000 is not allowed: .* from .* to "):
                build_methods({name: {knob: 1000}})


@pytest.mark.parametrize("method", ALL)
def test_a_method_is_a_frozen_value(method):
    with pytest.raises(ValidationError):
        method().compound = True


class Louder(Method):
    """Doubles every attention output: a second method that is easy to see."""

    @contextmanager
    def apply(self, host, trace):
        with host.wrap_attention(lambda inner, layer: 2 * inner()):
            yield


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("first", [True, False], ids=["inside", "outside"])
def test_two_methods_both_act_in_both_orders(method, first, pipe, sample):
    required_settings = method().required_settings()
    with accel.apply(pipe, [Louder()]):
        loud = sample(pipe, **required_settings)
    with accel.apply(pipe, [method()]) as trace:
        alone, work = sample(pipe, **required_settings), trace.summary()["flops_ratio"]
    with accel.apply(pipe, [Louder(), method()] if first else [method(), Louder()]) as trace:
        both = sample(pipe, **required_settings)
    assert trace.summary()["flops_ratio"] == work
    assert not torch.equal(both, loud) and not torch.equal(both, alone)
