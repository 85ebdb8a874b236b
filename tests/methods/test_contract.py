"""What every method of ours must do: a new method is tested before its author writes a test. For peers: test_peers."""

from contextlib import contextmanager

import pytest
import torch
from pydantic import ValidationError

import accel
from accel.methods import METHODS, AsymRnR, DisCa, FasterCache, StepCache
from accel.methods.base import Method
from accel.runtime.presets import build_methods
from accel.runtime.run import Cancelled

OURS = {name: method for name, method in METHODS.items() if not method.peer}
ALL = list(OURS.values())
STEPS = 12
pytestmark = pytest.mark.usefixtures("students")


def settings_of(method) -> dict:
    """The settings of a run with a method's defaults: those that it requires, else few steps."""
    return {"steps": STEPS, **method().required_settings()}


def attributes(pipe) -> dict:
    """Names of the attributes of every module: what a method could leave behind, hooks included."""
    return {name: sorted(vars(m)) for name, m in pipe.transformer.named_modules()}


@pytest.mark.parametrize("method", ALL)
def test_neutral_is_bitwise_the_baseline(method, pipe, sample, installed_neutral):
    baseline = sample(pipe, steps=STEPS)
    with accel.apply(pipe, [method(**method.neutral)]):
        assert torch.equal(sample(pipe, steps=STEPS), baseline)


def test_a_neutral_method_is_not_in_the_model(pipe, sample):
    neutral = [method(**method.neutral) for method in (FasterCache, AsymRnR, DisCa, StepCache)]
    forwards = lambda: {name: module.forward for name, module in pipe.transformer.named_modules() if name}
    processors, before = pipe.transformer.attn_processors, forwards()
    with accel.apply(pipe, neutral) as trace:
        sample(pipe, steps=STEPS)
        assert pipe.transformer.attn_processors == processors and forwards() == before
    for title in ("FasterCache", "AsymRnR", "DisCa", "StepCache"):
        assert any(message.startswith(f"{title} does nothing") for message in trace.messages)


@pytest.mark.parametrize("method", ALL)
def test_defaults_change_the_output_and_compute_less(method, pipe, sample):
    with accel.apply(pipe, []) as trace:
        baseline = sample(pipe, steps=STEPS)
    full = trace.summary()["flops"]
    with accel.apply(pipe, [method()]) as trace:
        assert not torch.equal(sample(pipe, **settings_of(method)), baseline)
    assert trace.summary()["flops"] < 0.95 * full


@pytest.mark.parametrize("method", ALL)
def test_the_model_is_restored_after_a_run(method, pipe, sample):
    baseline, before = sample(pipe, steps=STEPS), attributes(pipe)
    with accel.apply(pipe, [method()]):
        sample(pipe, **settings_of(method))
    assert attributes(pipe) == before and torch.equal(sample(pipe, steps=STEPS), baseline)


def cancel(pipe, index, t, tensors):
    """Cancels a run while every method acts."""
    if index == (3 if pipe.num_timesteps == 6 else 9):
        raise Cancelled
    return {}


@pytest.mark.parametrize("method", ALL)
def test_the_model_is_restored_after_a_cancelled_run(method, pipe, sample):
    baseline, before = sample(pipe, steps=STEPS), attributes(pipe)
    with pytest.raises(Cancelled), accel.apply(pipe, [method()]):
        sample(pipe, on_step=cancel, **settings_of(method))
    assert attributes(pipe) == before and torch.equal(sample(pipe, steps=STEPS), baseline)


@pytest.mark.parametrize("method", ALL)
def test_a_second_run_does_not_depend_on_the_first(method, pipe, sample):
    settings = settings_of(method)
    with accel.apply(pipe, [method()]):
        alone = sample(pipe, **settings)
    with accel.apply(pipe, [method()]):
        sample(pipe, height=32, **settings)
        with pytest.raises(Cancelled):
            sample(pipe, seed=3, on_step=cancel, **settings)
        assert torch.equal(sample(pipe, **settings), alone)


@pytest.mark.parametrize("method", ALL)
def test_every_call_and_layer_is_recorded_once(method, pipe, sample):
    settings = {"guidance": 4.0, **settings_of(method)}
    with accel.apply(pipe, [method()]) as trace:
        sample(pipe, **settings)
    denoiser = {(e.step, e.branch): e for e in trace.events.values() if e.layer == "denoiser"}
    assert len(denoiser) == settings["steps"] * (2 if settings["guidance"] > 1 else 1)
    for key, event in denoiser.items():
        layers = [e for e in trace.events.values() if (e.step, e.branch) == key and e.layer != "denoiser"]
        assert len(layers) == (2 if event.action == "compute" else 0)


def bounds():
    for name, method in OURS.items():
        for parameter, schema in method.parameters().items():  # the others are files and tables
            ends = schema.get("enum") or ([True, False] if schema["type"] == "boolean" else None)
            tested = {schema["default"]}  # by the tests above
            for value in [v for v in ends or (schema["minimum"], schema["maximum"]) if v not in tested]:
                yield pytest.param(name, parameter, value, id=f"{name}.{parameter}={value}")


@pytest.mark.parametrize("name, parameter, value", list(bounds()))
def test_the_lowest_and_highest_value_of_every_parameter_run(name, parameter, value, pipe, sample):
    (method,) = build_methods({name: {parameter: value}})
    with accel.apply(pipe, [method]):
        assert sample(pipe, **{"steps": STEPS, **method.required_settings()}).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_out_of_range_and_unknown_parameters_are_named(name):
    with pytest.raises(ValueError, match=f"unknown setting {name}.colour; known are"):
        build_methods({name: {"colour": 1}})
    for parameter, schema in METHODS[name].model_json_schema()["properties"].items():
        if "maximum" in schema:
            with pytest.raises(ValueError, match=rf"{name}.{parameter} = 10000 is not allowed: .* from .* to "):
                build_methods({name: {parameter: 10000}})


@pytest.mark.parametrize("method", ALL)
def test_a_method_is_a_frozen_value(method):
    with pytest.raises(ValidationError, match="Instance is frozen"):
        setattr(method(), next(iter(method.model_fields)), 0)


class Louder(Method):
    """Doubles every attention output: a second method that is easy to see."""

    @contextmanager
    def apply(self, host, trace):
        with host.wrap_attention(lambda inner, layer: 2 * inner()):
            yield


@pytest.mark.parametrize("method", ALL)
def test_two_methods_both_act_in_both_orders(method, pipe, sample):
    settings = settings_of(method)
    with accel.apply(pipe, [Louder()]):
        loud = sample(pipe, **settings)
    with accel.apply(pipe, [method()]) as trace:
        alone, work = sample(pipe, **settings), trace.summary()["flops_ratio"]
    for both in ([Louder(), method()], [method(), Louder()]):
        with accel.apply(pipe, both) as trace:
            y = sample(pipe, **settings)
        assert trace.summary()["flops_ratio"] == work
        assert not torch.equal(y, loud) and not torch.equal(y, alone)
