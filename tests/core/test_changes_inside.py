"""What users change between two runs inside one `accel.apply`: the host looks at the model before every run."""

import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, WanPipeline
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import accel
from accel.errors import AccelError
from accel.methods import AsymRnR, DisCa, FasterCache, SeaCache, StepCache
from accel.methods.asymrnr.correction import Residual
from accel.methods.fastercache import Computed
from accel.ops.taylor import TaylorCache

ASYMRNR = AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0.5)
METHODS = [FasterCache(), ASYMRNR, DisCa(predictor="taylor-1")]
PEER = SeaCache(threshold=1.0)  # diffusers' cache with a hook on the whole transformer


def add_lora(pipe) -> None:
    from peft import LoraConfig

    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def set_processor(pipe) -> None:
    pipe.transformer.set_attn_processor(WanAttnProcessor())


def offload(pipe) -> None:
    pipe.enable_model_cpu_offload(device="cpu")  # the device stays; what counts is that diffusers sets its hooks anew


def offload_twice(pipe) -> None:
    offload(pipe)
    pipe.remove_all_hooks()
    offload(pipe)


def replace_blocks(pipe) -> None:
    pipe.transformer.blocks = torch.nn.ModuleList(pipe.transformer.blocks.children())


@pytest.fixture
def sample(sample):
    """In as few steps as all methods act in."""
    return partial(sample, steps=12)


CHANGES = [set_processor, offload, offload_twice, replace_blocks, add_lora]


@pytest.mark.parametrize(
    "method, change",
    [pytest.param(method, change, marks=() if change is CHANGES[i % len(CHANGES)] or not i else pytest.mark.slow,
                  id=f"{type(method).__name__}-{change.__name__}")
     for i, method in enumerate([*METHODS, PEER]) for change in CHANGES],
)  # fmt: skip  # by default, all changes under one method and one change under each other method
def test_a_change_between_two_runs_leaves_the_method_acting(method, change, pipe, sample):
    torch.manual_seed(0)
    with accel.apply(pipe, method) as trace:
        first, share = sample(pipe), trace.summary()["flops_ratio"]
        change(pipe)
        second = sample(pipe)
        assert trace.summary()["flops_ratio"] == share < 1
    if change is not add_lora:
        assert torch.equal(first, second)
    with accel.apply(pipe, method):
        assert torch.equal(sample(pipe), second)


def offload_in_groups(model) -> None:
    cpu = torch.device("cpu")
    model.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def compile_a_block(model) -> None:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")


@pytest.mark.parametrize("change", [offload_in_groups, compile_a_block])
def test_while_the_stack_is_predicted_its_blocks_can_be_offloaded_and_compiled(change, pipe, sample):
    with accel.apply(pipe, DisCa(predictor="taylor-1")):
        first = sample(pipe)
        change(pipe.transformer)
        changed = list(pipe.transformer.blocks.children())
        assert torch.equal(sample(pipe), first)
    assert list(pipe.transformer.blocks) == changed


def test_inside_others_see_the_blocks_of_a_stack_that_is_predicted(pipe, sample):
    blocks = list(pipe.transformer.blocks)
    with accel.apply(pipe, DisCa(predictor="taylor-1")):
        sample(pipe, steps=3)
        assert list(pipe.transformer.blocks) == blocks == list(pipe.transformer.blocks[:])


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_method_acts_after_group_offloading_was_set_up_anew_inside_as_for_a_lora(method, pipe, sample):
    offload_in_groups(pipe.transformer)
    baseline, before = sample(pipe), forwards(pipe.transformer)
    with accel.apply(pipe, method) as trace:
        first, share = sample(pipe), trace.summary()["flops_ratio"]
        _maybe_remove_and_reapply_group_offloading(pipe.transformer)
        assert torch.equal(sample(pipe), first) and trace.summary()["flops_ratio"] == share < 1
        _maybe_remove_and_reapply_group_offloading(pipe.transformer)  # and no run afterwards
    assert torch.equal(sample(pipe), baseline)
    assert forwards(pipe.transformer) == before
    assert "accel" not in pipe.transformer._diffusers_hook.hooks


def forwards(model) -> set[str]:
    """The functions that a call of the model goes through."""
    found, forward = set(), model.forward
    while forward is not None:
        found.add(getattr(forward, "func", forward).__qualname__)
        forward = getattr(forward, "__wrapped__", None)
    return found


@pytest.mark.parametrize("methods", [METHODS, PEER], ids=["ours", "peer"])
@pytest.mark.parametrize("change", [set_processor, offload, offload_twice])
def test_what_was_changed_inside_stays_and_nothing_else_does(change, methods, pipe, sample):
    baseline = sample(pipe)
    with accel.apply(pipe, methods):
        sample(pipe)
        change(pipe)
        processors = [block.attn1.processor for block in pipe.transformer.blocks.children()]
    assert torch.equal(sample(pipe), baseline)
    assert pipe.transformer._diffusers_hook.hooks == {}
    assert forwards(pipe.transformer) <= {"WanTransformer3DModel.forward", "add_hook_to_module.<locals>.new_forward"}
    if change is set_processor:
        assert [block.attn1.processor for block in pipe.transformer.blocks] == processors
    else:
        assert pipe._all_hooks and hasattr(pipe.transformer, "_hf_hook")


def test_offloading_that_begins_inside_a_run_still_moves_the_model_afterwards(pipe, sample):
    with accel.apply(pipe, FasterCache()):
        offload(pipe)
        sample(pipe)
    calls = []
    pipe.transformer._hf_hook.pre_forward = lambda module, *args, **named: (calls.append(1), (args, named))[1]
    sample(pipe, steps=1)
    assert len(calls) == 2


@pytest.mark.parametrize("compile", [lambda model: model.compile(backend="eager"), None], ids=["in place", "wrapped"])
def test_a_transformer_that_is_compiled_as_a_whole_inside_is_refused_before_the_run(compile, pipe, sample):
    with accel.apply(pipe, FasterCache()):
        sample(pipe)
        if compile:
            compile(pipe.transformer)
        else:
            pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        with pytest.raises(AccelError, match="compile its blocks"):
            sample(pipe)


def test_a_cache_of_diffusers_that_is_enabled_inside_is_refused_before_the_run(pipe, sample):
    with accel.apply(pipe, FasterCache()):
        sample(pipe)
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        with pytest.raises(AccelError, match="FirstBlockCache and accel.apply do not go together"):
            sample(pipe)


def test_another_pipeline_of_the_same_transformer_runs_with_the_methods(pipe, sample):
    with accel.apply(pipe, FasterCache()):
        expected = sample(pipe, steps=16)
    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    with accel.apply(pipe, FasterCache()) as trace:
        sample(pipe, steps=12, guidance=1.0)
        assert torch.equal(sample(other, steps=16), expected)
    assert trace.summary()["steps"] == 16 and trace.summary()["calls"]["rebuild"] > 0


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_pipeline_that_offloads_the_shared_transformer_is_told_not_to(method, pipe, sample):
    """After its run, diffusers takes all hooks off the model; its next run would pass half through the method."""
    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other.enable_model_cpu_offload(device="cpu")
    with accel.apply(pipe, method):
        expected = sample(other)
        with pytest.raises(AccelError, match="another pipeline with this transformer has taken accel's hook off it"):
            sample(other)
        assert torch.equal(sample(pipe), expected)


def test_a_solver_that_evaluates_twice_at_one_sigma_has_a_step_for_each_evaluation(pipe, sample):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    for method in (FasterCache(), FasterCache(extrapolation="sigma")):
        with accel.apply(pipe, method) as trace:
            assert sample(pipe, steps=10).isfinite().all()
    assert trace.summary()["steps"] == 19  # the last of ten steps is one evaluation


@pytest.mark.parametrize("stop_at", [0, 3])
def test_a_run_after_one_that_was_stopped_is_a_new_run(stop_at, pipe, sample):
    def stop(pipe, index, time, tensors):
        if index == stop_at:
            raise KeyboardInterrupt
        return {}

    for scheduler in (pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)):
        pipe.scheduler = scheduler
        with accel.apply(pipe, FasterCache()):
            expected = sample(pipe)
            with pytest.raises(KeyboardInterrupt):
                sample(pipe, on_step=stop)
            assert torch.equal(sample(pipe), expected)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("named", [True, False], ids=["named branches", "branches by their text"])
def test_a_prompt_that_a_callback_changes_renews_what_depends_on_it(named, method, pipe, sample, monkeypatch):
    def travel(pipe, index, time, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"].flip(1)} if index == 9 else {}

    if not named:
        monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda *_, **__: nullcontext())
    with accel.apply(pipe, method) as trace:
        sample(pipe, steps=20, on_step=travel, inputs=["latents", "prompt_embeds"])
    branches = {event.branch for event in trace.events.values()}
    assert trace.summary()["steps"] == 20 and branches == {"cond", "uncond"}
    assert "the text changed at step 11: what depends on it was computed anew" in trace.messages
    skipped = [
        e.step for e in trace.events.values() if e.branch == "cond" and e.action in ("reuse", "reduce", "predict")
    ]
    assert 10 not in skipped and min(skipped) < 10 < max(skipped)


def test_after_a_refusal_the_next_run_has_the_methods_again(pipe, sample):
    class Unknown(torch.nn.Module):
        """A processor that is not known."""

    with accel.apply(pipe, ASYMRNR) as trace:
        first, share = sample(pipe), trace.summary()["flops_ratio"]
        for attn in (block.attn1 for block in pipe.transformer.blocks):
            attn.set_processor(Unknown())
        with pytest.raises(AccelError):
            sample(pipe)
        set_processor(pipe)
        assert torch.equal(sample(pipe), first) and trace.summary()["flops_ratio"] == share < 1


def test_a_refusal_that_was_handled_inside_is_not_raised_again_on_leaving(pipe, sample):
    class Unknown(torch.nn.Module):
        """A processor that is not known."""

    expected = sample(pipe)
    with accel.apply(pipe, [ASYMRNR, FasterCache()]):
        for attn in (block.attn1 for block in pipe.transformer.blocks):
            attn.set_processor(Unknown())
        with pytest.raises(AccelError):
            sample(pipe)
    set_processor(pipe)
    assert torch.equal(sample(pipe), expected)


HOLDERS = [ASYMRNR, FasterCache(), DisCa(predictor="taylor-1"), StepCache(full_steps="0 1 4 7 11")]


def held() -> list:
    """All that methods cache of the outputs of a model."""
    return [found for found in gc.get_objects() if isinstance(found, TaylorCache | Computed | Residual)]


@pytest.mark.parametrize("method", HOLDERS, ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("last", [8, 17])
def test_nothing_of_a_branch_that_ended_before_is_held_while_the_video_is_decoded(method, last, pipe, sample):
    def unguide(pipe, index, time, tensors):
        pipe._guidance_scale = 1.0 if index >= last else 4.0
        return {}

    with accel.apply(pipe, method) as trace:
        sample(pipe, steps=20, on_step=unguide)
        assert trace.summary()["flops_ratio"] < 1 and not held()


@pytest.mark.parametrize("method", HOLDERS, ids=lambda method: type(method).__name__)
def test_nothing_of_a_stopped_run_is_held_when_the_next_one_begins(method, pipe, sample, monkeypatch):
    def stop(pipe, index, time, tensors):
        if index == 6:
            raise KeyboardInterrupt
        return {}

    stock, counts = pipe.encode_prompt, []
    monkeypatch.setattr(
        pipe, "encode_prompt", lambda *args, **named: (counts.append(len(held())), stock(*args, **named))[1]
    )
    with accel.apply(pipe, method):
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, on_step=stop)
        assert held()
        sample(pipe)
    assert counts == [0, 0]
