"""`accel.apply`: what it takes for methods and pipelines, and what it refuses in one sentence."""

import copy
import gc
import io
import threading

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

import accel
from accel.errors import AccelError
from accel.methods import GPD, METHODS, FasterCache
from accel.runtime.presets import Preset, build_methods

FASTERCACHE = build_methods(accel.load_preset("fastercache").methods)


@pytest.mark.parametrize(
    "given, methods",
    [
        ("fastercache", FASTERCACHE),
        (accel.load_preset("fastercache"), FASTERCACHE),
        (FasterCache(), [FasterCache()]),
        (FasterCache, [FasterCache()]),
        (["fastercache", GPD, FasterCache(attention=False)], [*FASTERCACHE, GPD(), FasterCache(attention=False)]),
        ((method for method in FASTERCACHE), FASTERCACHE),
        ([], []),
        (None, []),
    ],
    ids=["name", "preset", "method", "class", "mixture", "generator", "empty", "none"],
)
def test_what_a_user_would_write_for_methods_is_understood(given, methods):
    applied = accel.apply(None, given)
    applied.is_used = True
    assert list(applied.methods) == methods


@pytest.mark.parametrize("given", [{"fastercache": {}}, METHODS, 3, b"gpd", [FasterCache(), 0.5], torch.nn.Identity()])
def test_anything_else_is_refused_in_one_sentence(given):
    with pytest.raises(AccelError, match="is no method: give a preset's name, a preset, a method, or a list"):
        accel.apply(None, given)


def test_an_unknown_name_is_refused_with_the_known_ones(pipe):
    with pytest.raises(AccelError, match="no preset 'fasterkache'; there are .*fastercache"):
        accel.apply(pipe, ["fasterkache"])


def test_a_method_that_is_given_twice_is_refused(pipe):
    with pytest.raises(AccelError, match="FasterCache is given 2 times: give it once"):
        with accel.apply(pipe, ["fastercache", "combined"]):
            pass


def test_a_transformer_in_place_of_its_pipeline_is_refused(pipe):
    with pytest.raises(AccelError, match="takes a pipeline, not its WanTransformer3DModel"):
        with accel.apply(pipe.transformer, "fastercache"):
            pass


def test_outside_with_a_warning_says_that_nothing_happens(pipe):
    with pytest.warns(UserWarning, match="does nothing by itself: write `with accel.apply"):
        accel.apply(pipe, "fastercache")
        gc.collect()


def test_a_run_says_which_settings_of_a_preset_it_lacks(pipe, sample):
    preset = Preset(steps=20, solver="dpm++2m", shift=5.0, methods={"fastercache": {}})
    with accel.apply(pipe, ["asymrnr", preset]) as trace:
        sample(pipe, steps=12)
    expected = "this run does not have the preset's steps = 20, solver = dpm++2m, shift = 5.0: apply sets methods alone"
    assert expected in trace.messages
    with accel.apply(pipe, Preset(guidance=7, solver="euler", methods={"fastercache": {}})) as trace:
        sample(pipe, steps=12)
    assert (
        "this run does not have the preset's guidance = 7.0, solver = euler: apply sets methods alone" in trace.messages
    )
    for solver, own in (("unipc", pipe.scheduler), ("euler", FlowMatchEulerDiscreteScheduler(shift=3.0))):
        pipe.scheduler = own
        with accel.apply(pipe, Preset(steps=12, guidance=4, solver=solver, methods={"fastercache": {}})) as trace:
            sample(pipe, steps=12)
        assert not any("preset" in message for message in trace.messages)


def test_the_settings_of_a_preset_are_compared_with_those_of_the_pipeline_that_runs(pipe, sample):
    other = WanPipeline.from_pipe(pipe, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0))
    with accel.apply(pipe, Preset(solver="unipc", methods={"fastercache": {}})) as trace:
        sample(other, steps=12)
    assert "this run does not have the preset's solver = unipc: apply sets methods alone" in trace.messages


def test_a_decorated_function_runs_with_the_methods_every_time(pipe, sample):
    baseline = sample(pipe)
    run = accel.apply(pipe, (method for method in [FasterCache()]))(lambda: sample(pipe))
    first, second = run(), run()
    assert torch.equal(first, second) and not torch.equal(first, baseline)
    assert torch.equal(sample(pipe), baseline)


def test_a_generator_or_async_function_cannot_be_decorated():
    def generator():
        yield

    async def coroutine():
        pass

    async def async_generator():
        yield

    for fn in (generator, coroutine, async_generator):
        with pytest.raises(AccelError, match="a generator or an async function cannot be decorated: use `with"):
            accel.apply(None)(fn)


def test_settings_that_are_refused_do_not_also_warn_that_nothing_was_entered(recwarn):
    with pytest.raises(AccelError):
        accel.apply(None, Preset(methods={"fastercache": {"attention_interval": 99}}))
    gc.collect()
    assert not recwarn.list


def test_a_second_apply_is_refused_and_the_first_goes_on(pipe, two_models, sample):
    refusals = []

    def enter_in_thread():
        with pytest.raises(AccelError, match="acts on this pipeline already") as refused, accel.apply(pipe):
            pass
        refusals.append(refused)

    two_models.transformer = pipe.transformer  # as after from_pipe
    with accel.apply(pipe, FasterCache()) as trace:
        thread = threading.Thread(target=enter_in_thread)
        thread.start()
        thread.join()
        for same in (pipe, two_models):
            with pytest.raises(AccelError, match="acts on this pipeline already"), accel.apply(same):
                pass
        sample(pipe)
    assert refusals and trace.summary()["flops_ratio"] < 1
    with accel.apply(two_models):
        pass


DUPLICATES = {
    "copy": lambda part, folder: copy.deepcopy(part),
    "torch.save": lambda part, folder: torch.save(part, io.BytesIO()),
    "save_pretrained": lambda part, folder: part.save_pretrained(folder),
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)
def test_a_pipeline_is_copied_and_saved_outside_only(duplicate, pipe, tmp_path):
    with accel.apply(pipe, FasterCache()):
        for part in (pipe, pipe.transformer):
            with pytest.raises(AccelError, match="cannot be copied or saved inside accel.apply"):
                duplicate(part, tmp_path)
    assert not list(tmp_path.iterdir())
    duplicate(pipe, tmp_path)
