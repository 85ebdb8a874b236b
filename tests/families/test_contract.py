"""What holds for every family: each kind of stock pipeline runs with each training-free method, and stays as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from families import tiny
from families.tiny import EACH_FAMILY, FLOW, TINY
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import accel
from accel.errors import AccelError
from accel.evaluation.docs import support_cells
from accel.families import family_of
from accel.methods import METHODS

NAMES = list(TINY)
FROM_VIDEO = ["wan_video", "cogvideox_video"]  # they leave out the first fifth of the schedule
UNGUIDED = ["hunyuan_video"]
VIDEO_TOKENS = {"wan_vace": 64, "hunyuan_video_15": 192, "ltx": 64, "ltx_image": 64, "ltx_condition": 80}  # others: 48
MOST_TEXT_TOKENS = 12
STEPS = 12
CACHING = METHODS["fastercache"]()
REDUCING = METHODS["asymrnr"](schedule="fixed", query_rate=0.5, kv_rate=0.5, correction="none", start=0.1)
CACHING_STACK = METHODS["fastercache"](reuse="stack", guidance=False)
PREDICTING = METHODS["disca"](num_full_steps=8, predictor="taylor-1")
NEUTRAL = {name: METHODS[name](**METHODS[name].neutral) for name in ("fastercache", "asymrnr", "disca")}
WITHOUT_STACK = ["wan_vace"]  # it adds to the hidden states between blocks


def all_but(*left_out: str) -> list:
    """The pipelines as parameters of a test; variants, and the one with the most tokens, are slow."""
    marks = lambda name: () if name in EACH_FAMILY and name != "hunyuan_video_15" else pytest.mark.slow
    return [pytest.param(name, marks=marks(name)) for name in NAMES if name not in left_out]


SEEN_TO_ACT: dict[str, list[str]] = {}  # by method, the pipelines on which a test of this file sees it act


def sees_acting(method: str, *left_out: str) -> pytest.MarkDecorator:
    """Parametrizes a test that sees a method act, by all pipelines but those."""
    SEEN_TO_ACT[method] = [name for name in NAMES if name not in left_out]
    return pytest.mark.parametrize("name", all_but(*left_out))


def one_of_each_family() -> list:
    """One pipeline of each family as parameters of a test; the one with the most tokens is slow."""
    return [param for param in all_but() if param.values[0] in EACH_FAMILY]


def sample(pipe, inputs: dict, name: str, seed: int = 0, **more) -> Tensor:
    """Final latents of a run of 12 steps; each item of a batch has noise of its own."""
    texts = len(next(value for key, value in inputs.items() if key.startswith("prompt_embeds")))
    generators = [torch.Generator().manual_seed(seed + i) for i in range(texts)]
    steps = round(STEPS / 0.8) if name in FROM_VIDEO else STEPS
    generator = generators if texts > 1 else generators[0]
    return pipe(**inputs | more, num_inference_steps=steps, generator=generator, output_type="latent").frames


@cache
def stock(name: str) -> Tensor:
    """The latents of the pipeline as it comes."""
    pipe, inputs = TINY[name]()
    return sample(pipe, inputs, name)


def item(inputs: dict, index: int, texts: int) -> dict:
    """The inputs of one item of a batch."""
    is_batch = lambda value: isinstance(value, Tensor) and len(value) == texts
    return {key: value[index : index + 1] if is_batch(value) else value for key, value in inputs.items()}


def state(pipe) -> dict:
    """What a method could leave behind: attributes of the pipeline and of every module, and what they are."""
    modules = {
        f"{key}.{name}": {attribute: id(value) for attribute, value in vars(module).items()}
        for key, model in pipe.components.items()
        if key.startswith("transformer") and model is not None
        for name, module in model.named_modules()
    }
    return {**modules, "pipeline": sorted(vars(pipe)), "scheduler": sorted(vars(pipe.scheduler))}


def neutral_methods(name: str) -> list:
    """A neutral method of each kind that the pipeline takes."""
    return [method for key, method in NEUTRAL.items() if key != "disca" or name not in WITHOUT_STACK]


class Failure(Exception):
    """Raised in mid-run."""


def fail(pipe) -> None:
    raise Failure


def interrupt(pipe) -> None:
    pipe._interrupt = True


@contextmanager
def in_mid_run(pipe, act: Callable) -> Iterator[None]:
    """Call `act(pipe)` in the scheduler's seventh step: some pipelines take no callback."""
    step, calls = pipe.scheduler.step, []

    @wraps(step)
    def acting(*args, **named):
        calls.append(None)
        if len(calls) == 7:
            act(pipe)
        return step(*args, **named)

    pipe.scheduler.step = acting
    try:
        yield
    finally:
        del pipe.scheduler.step


@pytest.mark.parametrize("name", all_but())
@pytest.mark.parametrize("neutral", [False, True], ids=["no method", "neutral"])
def test_latents_are_the_stock_pipelines(name, neutral, installed_neutral):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, neutral_methods(name) if neutral else []) as trace:
        latents = sample(pipe, inputs, name)
    assert trace.summary()["steps"] == STEPS and trace.summary()["flops_ratio"] == 1
    assert torch.equal(latents, stock(name))


@pytest.mark.parametrize("name", all_but())
def test_a_run_leaves_nothing_to_the_next_one_nor_to_the_pipeline(name):
    pipe, inputs = TINY[name]()
    sample(pipe, inputs, name)
    before, methods = state(pipe), [CACHING, REDUCING, *([] if name in WITHOUT_STACK else [PREDICTING])]
    with accel.apply(pipe, methods):
        alone = sample(pipe, inputs, name)
        assert torch.equal(sample(pipe, inputs, name), alone)
    assert state(pipe) == before
    with pytest.raises(Failure), accel.apply(pipe, methods), in_mid_run(pipe, fail):
        sample(pipe, inputs, name)
    assert state(pipe) == before
    with accel.apply(pipe, methods):
        with in_mid_run(pipe, interrupt):
            sample(pipe, inputs, name, seed=3)
        assert torch.equal(sample(pipe, inputs, name), alone)
    assert state(pipe) == before and torch.equal(sample(pipe, inputs, name), stock(name))


@pytest.mark.parametrize("name", one_of_each_family())
def test_sizes_may_change_from_run_to_run(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [CACHING, REDUCING]):
        alone = sample(pipe, inputs, name)
        assert sample(pipe, inputs, name, width=2 * inputs["width"]).shape != alone.shape
        assert torch.equal(sample(pipe, inputs, name), alone)


@sees_acting("fastercache")
def test_fastercache_reuses_attention_and_rebuilds_the_unconditional_branch(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [CACHING]) as trace:
        assert not torch.equal(sample(pipe, inputs, name), stock(name))
    summary, rebuilt = trace.summary(), sum(not plan.guidance for plan in CACHING.plan(STEPS))
    assert summary["attention"]["reuse"] > 0 and summary["flops_ratio"] < 0.8
    if name in UNGUIDED:
        assert summary["calls"] == {"compute": STEPS}
        assert any("there is no unconditional branch to rebuild" in message for message in summary["messages"])
        return
    if name == "wan_22":  # the step in which the second transformer takes over has no CFG delta of it yet
        rebuilt -= 1
    assert summary["calls"] == {"compute": 2 * STEPS - rebuilt, "rebuild": rebuilt}


@pytest.mark.parametrize("name", all_but(*WITHOUT_STACK))
def test_fastercache_extrapolates_the_stack_in_the_planned_steps_of_both_branches(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [CACHING_STACK]) as trace:
        latents = sample(pipe, inputs, name)
    assert latents.isfinite().all() and not torch.equal(latents, stock(name))
    planned = [i for i, plan in enumerate(CACHING_STACK.plan(STEPS)) if not plan.attention]
    for branch in ("cond",) if name in UNGUIDED else ("cond", "uncond"):
        predicted = [e.step for e in trace.events.values() if (e.action, e.branch) == ("predict", branch)]
        assert predicted and (set(predicted) < set(planned) if name == "wan_22" else predicted == planned)


class AttentionLengths(TorchFunctionMode):
    """Records (queries, keys) of every softmax attention."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[int, int]] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            query, key = [*args, *(kwargs or {}).values()][:2]
            self.seen.add((query.shape[-2], key.shape[-2]))
        return func(*args, **(kwargs or {}))


@sees_acting("asymrnr")
def test_asymrnr_removes_half_of_the_video_tokens_and_no_text(name):
    pipe, inputs = TINY[name]()
    with AttentionLengths() as full:
        sample(pipe, inputs, name)
    with accel.apply(pipe, [REDUCING]) as trace, AttentionLengths() as reduced:
        assert not torch.equal(sample(pipe, inputs, name), stock(name))
    assert trace.summary()["attention"]["reduce"] > 0 and trace.summary()["flops_ratio"] < 1
    video = VIDEO_TOKENS.get(name, 48)
    lengths = [q for q, k in full.seen if q == k and video <= q <= video + MOST_TEXT_TOKENS]
    assert lengths and reduced.seen - full.seen == {(q - video // 2, q - video // 2) for q in lengths}


@sees_acting("disca", *WITHOUT_STACK)
def test_disca_predicts_the_blocks_of_both_branches(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [PREDICTING]) as trace:
        latents = sample(pipe, inputs, name)
    assert latents.isfinite().all() and not torch.equal(latents, stock(name))
    branches = 1 if name in UNGUIDED else 2
    assert trace.summary()["calls"] == {"compute": 8 * branches, "predict": 4 * branches}


@sees_acting("stepcache", *WITHOUT_STACK)
def test_stepcache_predicts_the_same_steps_in_both_branches(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [METHODS["stepcache"](threshold=1.2)]) as trace:
        latents = sample(pipe, inputs, name)
    assert latents.isfinite().all() and not torch.equal(latents, stock(name))
    calls = [e for e in trace.events.values() if e.layer == "denoiser"]
    steps = [{e.step: e.action for e in calls if e.branch == branch} for branch in ("cond", "uncond")]
    assert set(steps[0].values()) == {"compute", "predict"} and (name in UNGUIDED or steps[0] == steps[1])


def test_a_test_sees_each_method_act_where_the_support_table_says_yes(monkeypatch):
    monkeypatch.setattr(tiny, "build", MagicMock())  # the classes of the pipelines are enough
    monkeypatch.setattr(tiny, "assemble", lambda name, *_, **__: object.__new__(getattr(diffusers, name)))
    pipelines = {name: TINY[name]()[0] for name in NAMES}
    for (family, method), cell in support_cells().items():
        seen = [pipelines[name] for name in SEEN_TO_ACT.get(method, ())]
        for prefix in family.pipelines if cell.startswith("yes") else ():
            of_kind = [pipe for pipe in seen if family_of(pipe) is family and type(pipe).__name__.startswith(prefix)]
            assert of_kind, f"the table says {cell!r} of {method} on {prefix}*Pipeline, and no test sees that"


@pytest.mark.parametrize("method", [PREDICTING, CACHING_STACK], ids=["disca", "fastercache"])
@pytest.mark.parametrize("name", WITHOUT_STACK)
def test_predicting_blocks_is_refused_where_they_are_not_one_stack(name, method):
    pipe, _ = TINY[name]()
    before = state(pipe)
    others = [CACHING] if type(method) is not type(CACHING) else []
    with pytest.raises(AccelError, match="they are not one stack"), accel.apply(pipe, [*others, method]):
        pass
    assert state(pipe) == before


WITHOUT_BATCHES = ["wan_vace"]  # takes one generator for a whole batch


@pytest.mark.parametrize("name", all_but(*WITHOUT_BATCHES))
@pytest.mark.parametrize("method", [CACHING, METHODS["stepcache"](schedule="spread")], ids=["fastercache", "stepcache"])
def test_two_prompts_in_a_batch_equal_two_runs_under_a_cache(name, method):
    pipe, inputs = TINY[name](2)
    with accel.apply(pipe, [method]):
        both = sample(pipe, inputs, name)
        alone = [sample(pipe, item(inputs, i, 2), name, seed=i) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name, correction",
    [*(pytest.param(*p.values, "none", marks=p.marks) for p in one_of_each_family()), ("mochi", "linear")],
)  # Mochi's attention has one softmax for each item of a batch
def test_two_prompts_in_a_batch_equal_two_runs_under_asymrnr(name, correction):
    pipe, inputs = TINY[name](2)
    with accel.apply(pipe, [REDUCING.model_copy(update={"correction": correction})]) as trace:
        both, work = sample(pipe, inputs, name), trace.summary()["flops_ratio"]
        alone = [sample(pipe, item(inputs, i, 2), name, seed=i) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)
    assert work == pytest.approx(trace.summary()["flops_ratio"], abs=0.005)


def velocities(pipe, inputs: dict, name: str) -> Tensor:
    """The guided velocity of each step, all at the first step's latents."""
    seen = []
    keep = wraps(pipe.scheduler.step)(lambda velocity, t, latents, **_: seen.append(velocity) or (latents,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", keep)
        sample(pipe, inputs, name)
    return torch.stack(seen)


def some(cases: list, *slow) -> list:
    """Cases as parameters of a test, after which come those that are slow, as their kind is among the others."""
    return [
        *cases,
        *(pytest.param(*(case if isinstance(case, tuple) else [case]), marks=pytest.mark.slow) for case in slow),
    ]


GUIDED = some(
    ["wan", "cogvideox_2b", "ltx", "mochi", "kandinsky5"], "hunyuan_video_true_cfg", "hunyuan_video_15", "skyreels_v2"
)


@pytest.mark.parametrize("name", GUIDED)
def test_what_the_negative_prompt_changes_does_not_depend_on_the_prompt(name):
    pipe, inputs = TINY[name](2)
    caching = CACHING.model_copy(update={"guidance": False})  # both branches run in every step
    texts = [item(inputs, i, 2) for i in range(2)]
    is_negative = lambda key: key.startswith("negative_prompt_embeds") and "mask" not in key
    with accel.apply(pipe, [caching, REDUCING, PREDICTING]):
        changes = []
        for text in texts:
            other = {key: value.flip(-1) if is_negative(key) else value for key, value in text.items()}
            changes.append(velocities(pipe, text, name) - velocities(pipe, other, name))
    assert changes[0].abs().max() > 0.01
    torch.testing.assert_close(*changes, atol=1e-4, rtol=0)


SOLVERS = {
    "Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0),
    "DPM++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=3.0),
    "DDIM": lambda: diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    "DPM": lambda: diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction"),
}
NOT_THEIR_OWN = some(
    [
        ("wan", "Euler"),
        ("wan_22_5b", "DPM++"),
        ("hunyuan_video_true_cfg", "UniPC"),
        ("ltx", "UniPC"),
        ("cogvideox", "DDIM"),
    ],
    *(("wan", "DPM++"), ("wan_22", "Euler"), ("skyreels_v2", "Euler"), ("hunyuan_video_15", "UniPC")),
    *(("cogvideox_2b", "DPM"), ("cogvideox_video", "DDIM")),
)


@pytest.mark.parametrize("name, solver", NOT_THEIR_OWN)
def test_what_is_skipped_does_not_depend_on_the_solver(name, solver):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [CACHING, REDUCING]) as trace:
        sample(pipe, inputs, name)
        usual = trace.summary()
        pipe.scheduler = SOLVERS[solver]()
        assert sample(pipe, inputs, name).isfinite().all()
    for key in ("steps", "calls", "attention"):
        assert trace.summary()[key] == usual[key]


@pytest.mark.parametrize("name", one_of_each_family())
def test_methods_run_on_a_model_with_lora(name, installed_neutral):
    pipe, inputs = TINY[name]()
    linear = [key for key, module in pipe.transformer.named_modules() if isinstance(module, nn.Linear)]
    torch.manual_seed(0)
    pipe.transformer.add_adapter(
        LoraConfig(
            r=2, init_lora_weights=False, target_modules=[key for key in linear if key.endswith(("to_q", "to_query"))]
        )
    )
    baseline = sample(pipe, inputs, name)
    assert not torch.equal(baseline, stock(name))
    with accel.apply(pipe, neutral_methods(name)):
        assert torch.equal(sample(pipe, inputs, name), baseline)
    with accel.apply(pipe, [CACHING, REDUCING]) as trace:
        assert not torch.equal(sample(pipe, inputs, name), baseline)
    assert {"reuse", "reduce"} <= trace.summary()["attention"].keys()


@pytest.mark.parametrize("name", one_of_each_family())
def test_group_offloading_changes_no_bit(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [CACHING, REDUCING]):
        expected = sample(pipe, inputs, name)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    with accel.apply(pipe, [CACHING, REDUCING]):
        assert torch.equal(sample(pipe, inputs, name), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; CUDA_VISIBLE_DEVICES=0 shows it to the tests")
@pytest.mark.parametrize("name", one_of_each_family())
def test_model_offloading_changes_no_bit(name):
    pipe, inputs = TINY[name]()
    inputs = {key: value.to("cuda") if isinstance(value, Tensor) else value for key, value in inputs.items()}
    pipe.to("cuda")
    with accel.apply(pipe, [CACHING, REDUCING]):
        expected = sample(pipe, inputs, name)
    pipe.enable_model_cpu_offload()
    with accel.apply(pipe, [CACHING, REDUCING]):
        for _ in range(2):
            assert torch.equal(sample(pipe, inputs, name), expected)


WITH_FUSED_PROJECTIONS = [
    name
    for name in EACH_FAMILY
    if hasattr(type(TINY[name]()[0].transformer), "fuse_qkv_projections") and name != "kandinsky5"  # stock: an error
]


@pytest.mark.parametrize("name", WITH_FUSED_PROJECTIONS)
def test_fused_projections_change_the_rounding_alone(name):
    pipe, inputs = TINY[name]()
    with accel.apply(pipe, [CACHING, REDUCING]):
        expected = sample(pipe, inputs, name)
    pipe.transformer.fuse_qkv_projections()
    with accel.apply(pipe, [CACHING, REDUCING]):
        torch.testing.assert_close(sample(pipe, inputs, name), expected, atol=1e-4, rtol=0)
