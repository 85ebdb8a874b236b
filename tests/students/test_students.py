"""A student in place of the denoiser: its scheduler, its weights, and the runs that are refused."""

import json
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from support import random_wan

import accel
from accel.errors import AccelError
from accel.methods import AsymRnR, FasterCache
from accel.methods.asymrnr.budget import Profile
from accel.methods.base import Method
from accel.methods.gpd import GPD
from accel.ops.token_matching import match
from accel.runtime.generate import preflight
from accel.runtime.presets import build_methods
from accel.runtime.run import Run
from accel.students.euler_scheduler import FixedSigmaEuler, use_scheduler
from accel.students.weights import fingerprint, load_int8_delta, save_int8_delta
from accel.training.networks import FullNetworks
from accel.training.stages import store

SIGMAS = [1.0, 0.75, 0.6, 0.4, 0.3, 0.1, 0.0]
TIMESTEPS = [999, 750, 600, 400, 300, 100]


def euler_sampling(pipe, steps):
    """Inside the context, the pipeline takes Euler steps on the noise levels of its own scheduler."""
    pipe.scheduler.set_timesteps(steps)
    return use_scheduler(pipe, FixedSigmaEuler(pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps.tolist()))


@pytest.fixture
def student(pipe, tmp_path) -> GPD:
    """A student of 6 steps in the model's folder: the base with its last projection halved."""
    pipe.register_to_config(_name_or_path=str(tmp_path))
    facts = {"steps": 6, "sigmas": SIGMAS, "timesteps": TIMESTEPS, "base_fingerprint": fingerprint(pipe.transformer)}
    nets = FullNetworks(pipe.transformer)
    nets.module.proj_out.weight.data.mul_(0.5)
    store(nets, tmp_path / "gpd-N6", "gpd.json", facts)
    return GPD(steps=6)


def test_a_student_runs_at_its_own_sigmas_and_the_pipeline_is_restored(student, pipe, sample):
    baseline, scheduler = sample(pipe), pipe.scheduler
    with accel.apply(pipe, [student]) as trace:
        sample(pipe, steps=6, guidance=1.0)
    assert trace.summary()["calls"] == {"compute": 6}
    assert [trace.sigmas[i] for i in range(6)] == pytest.approx(SIGMAS[:-1])
    assert pipe.scheduler is scheduler and torch.equal(sample(pipe), baseline)


def test_a_student_takes_euler_steps_along_its_velocity(student, pipe, sample):
    """Each state follows from the one before by the velocity of one call, at the timestep of that sigma."""
    seen = []

    class Spy(Method):
        @contextmanager
        def apply(self, host, trace):
            def spy(inner, x, **inputs):
                v = inner(x, **inputs)
                seen.append((x, v, inputs["timestep"].item()))
                return v

            with host.wrap_denoiser(spy):
                yield

    with accel.apply(pipe, [student, Spy()]):
        end = sample(pipe, steps=6, guidance=1.0)
    states = [*(x for x, _, _ in seen[1:]), end]
    for (x, v, time), after, t, r, timestep in zip(seen, states, SIGMAS, SIGMAS[1:], TIMESTEPS, strict=False):
        torch.testing.assert_close(after, x + (r - t) * v)
        assert time == timestep


def test_runs_that_a_student_cannot_make_are_refused_with_the_reason(student, pipe, sample):
    baseline = sample(pipe)
    for asked, reason in (
        (dict(steps=20, guidance=1.0), "this student makes 6 steps, not 20: set steps to 6, or choose another student"),
        (dict(steps=6, guidance=4.0), "a student has guidance distilled in: set guidance to 1"),
    ):
        with pytest.raises(ValueError, match=reason), accel.apply(pipe, [student]):
            sample(pipe, **asked)
    assert torch.equal(sample(pipe), baseline)


def test_a_negative_prompt_is_refused_because_the_pipeline_would_ignore_it(student, pipe, monkeypatch):
    words = torch.randn(1, 6, 16)

    def encode(
        self, prompt, negative_prompt=None, do_classifier_free_guidance=True, negative_prompt_embeds=None, **_
    ):  # fmt: skip
        return words, words

    monkeypatch.setattr(type(pipe), "encode_prompt", encode)
    given = dict(height=64, width=64, num_frames=5, num_inference_steps=6, guidance_scale=1.0, output_type="latent")
    with accel.apply(pipe, [student]):
        pipe("a star", **given)
        pipe("a star", negative_prompt=[""], **given)
        for negative in (dict(negative_prompt="blurry"), dict(negative_prompt_embeds=words)):
            with pytest.raises(ValueError, match="no unconditional branch for a negative prompt"):
                pipe("a star", **negative, **given)
    assert "encode_prompt" not in vars(pipe)


def test_students_that_are_missing_damaged_or_of_another_base_are_refused(student, pipe, tmp_path):
    def refuses(method, reason):
        with pytest.raises(ValueError, match=reason), accel.apply(pipe, [method]):
            pass

    refuses(GPD(steps=12), "there is no student 'gpd-N12' .*; there are gpd-N6")
    file = tmp_path / "gpd-N6" / "gpd.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({**facts, "base_fingerprint": [m + 1 for m in facts["base_fingerprint"]]}))
    refuses(student, "student 'gpd-N6' was made from another base model: train it from this one")
    file.write_text(json.dumps({"steps": 6}))
    refuses(student, "gpd.json is no student: sigmas Field required")
    file.write_bytes(b"\x89PNG\xff")
    refuses(student, "gpd.json is no student: Invalid JSON: ")


def test_a_student_folder_without_a_student_is_refused_though_the_setting_is_not_used():
    for name in ("gpd", "meanflow"):
        with pytest.raises(ValueError, match=f"there is no student 'nowhere' .{name}.student names"):
            build_methods({name: {"steps": 0, "student": "nowhere"}})


def test_fixed_sigmas_give_the_euler_step_in_float32():
    """A half-precision velocity is not rounded again: x + (.25 - .75) v."""
    scheduler = FixedSigmaEuler([0.75, 0.25, 0.0], [750, 250])
    scheduler.set_timesteps(2)
    x, v = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 4, 3, 8, 8).bfloat16()
    after = scheduler.step(v, scheduler.timesteps[0], x, return_dict=False)[0]
    assert torch.equal(after, x + (0.25 - 0.75) * v.float()) and after.dtype == torch.float32
    with pytest.raises(ValueError, match="these sigmas are for 2 steps, not 3"):
        scheduler.set_timesteps(3)


def test_a_baseline_sampled_with_euler_is_not_taken_for_a_student(students, pipe, sample, tmp_path):
    """AsymRnR matches as rarely as in a baseline, and does not say that its costs were measured without a student."""
    costs = {"blocks.0.attn1": [(1.0, 1.0)], "blocks.1.attn1": [(1.0, 1.0)]}
    Profile(grid=(3, 4, 4), steps=12, rate=0.5, costs=costs).save(tmp_path / "asymrnr.json")
    fixed = AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0.5, matching="global", correction="none")
    work = []
    for sampling in (nullcontext(), euler_sampling(pipe, 12)):
        with sampling:
            with accel.apply(pipe, [fixed]) as trace:
                sample(pipe, steps=12)
            work.append([event.compute_fraction for event in trace.events.values()])
            with accel.apply(pipe, [AsymRnR()]) as trace:
                sample(pipe, steps=12)
            assert not trace.messages
    assert work[0] == work[1]


@pytest.mark.parametrize("name", ["gpd", "meanflow"])
def test_students_run_alike_within_euler_sampling(name, students, pipe, sample):
    """They bring their own Euler scheduler; a scheduler that is swapped in after them is refused."""
    (method,) = build_methods({name: {"steps": 6}})
    with accel.apply(pipe, [method]):
        expected = sample(pipe, steps=6, guidance=1.0)
    with euler_sampling(pipe, 6), accel.apply(pipe, [method]):
        assert torch.equal(sample(pipe, steps=6, guidance=1.0), expected)
    with pytest.raises(ValueError, match="which FixedSigmaEuler cannot use: keep its scheduler"):
        with accel.apply(pipe, [method]), euler_sampling(pipe, 6):
            sample(pipe, steps=6, guidance=1.0)


@pytest.mark.parametrize("name", ["gpd", "meanflow"])
def test_a_student_runs_in_no_other_pipeline_and_no_other_model(name, students, pipe, sample):
    (method,) = build_methods({name: {"steps": 6}})
    other, model = WanPipeline.from_pipe(pipe), pipe.transformer
    other.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    with accel.apply(pipe, [method]):
        with pytest.raises(AccelError, match="which UniPCMultistepScheduler cannot use: keep its scheduler"):
            sample(other, steps=6, guidance=1.0)
        pipe.transformer = random_wan(5)
        with pytest.raises(AccelError, match="belongs to the transformer that the pipeline had"):
            sample(pipe, steps=6, guidance=1.0)
        pipe.transformer = model
        assert sample(pipe, steps=6, guidance=1.0).isfinite().all()


@pytest.mark.parametrize("name", ["gpd", "meanflow"])
def test_a_pipeline_made_of_one_under_a_student_does_not_keep_its_scheduler_unnoticed(name, students, pipe, sample):
    with accel.apply(pipe, build_methods({name: {"steps": 6}})):
        other = WanPipeline.from_pipe(pipe)
    with pytest.raises(AccelError, match="of an accel.apply that has ended: give the pipeline one of its own"):
        sample(other, steps=6, guidance=1.0)
    other.scheduler = pipe.scheduler
    assert sample(other).equal(sample(pipe))


def test_a_base_model_is_recognised_in_half_precision(student, pipe):
    pipe.transformer.to(torch.bfloat16)
    with accel.apply(pipe, [student]):
        assert pipe.transformer.proj_out.weight.dtype == torch.bfloat16


def test_differences_are_stored_to_a_hundredth_of_the_largest_in_their_row(pipe, tmp_path):
    base, other = pipe.transformer, deepcopy(pipe.transformer)
    for p in other.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.01)
    save_int8_delta(other, base, tmp_path / "w.safetensors")
    for (name, found), p, q in zip(
        load_int8_delta(base, tmp_path / "w.safetensors").items(), other.parameters(), base.parameters(), strict=True
    ):
        rows = (p - q).flatten(min(1, p.ndim - 1)).abs().amax(-1, keepdim=True)
        assert ((found - p).flatten(min(1, p.ndim - 1)).abs() <= 0.005 * rows + 1e-6).all(), name
    assert (tmp_path / "w.safetensors").stat().st_size < 2.5 * sum(p.numel() for p in base.parameters())


def test_a_students_weights_are_in_one_buffer_for_each_dtype(pipe, tmp_path):
    base = pipe.transformer.to(torch.bfloat16)
    base.proj_out.float()
    save_int8_delta(base, base, tmp_path / "w.safetensors")
    made, own = load_int8_delta(base, tmp_path / "w.safetensors"), dict(base.named_parameters())
    assert made.keys() == own.keys() and all(
        w.equal(own[name]) and w.dtype == own[name].dtype for name, w in made.items()
    )
    assert len({w.untyped_storage().data_ptr() for w in made.values()}) == 2


def test_differences_from_a_model_of_another_shape_are_refused(pipe, tmp_path):
    base, other = pipe.transformer.proj_out, torch.nn.Linear(3, 2)
    save_int8_delta(other, other, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds weights of another architecture"):
        load_int8_delta(base, tmp_path / "w.safetensors")


@pytest.mark.parametrize("order", [1, -1])
def test_attention_is_reused_under_a_student_of_24_steps_and_off_under_one_of_6(order, students, pipe, sample):
    for steps, acts in ((24, True), (6, False)):
        with accel.apply(pipe, [GPD(steps=steps), FasterCache()][::order]) as trace:
            sample(pipe, steps=steps, guidance=1.0)
        summary = trace.summary()
        assert summary["calls"] == {"compute": steps} and (summary["flops_ratio"] < 0.95) == acts
        assert any("6 steps are too few" in message for message in summary["messages"]) != acts


def test_methods_that_cannot_save_anything_are_reported_before_the_run(students, pipe):
    methods = {"gpd": {"steps": 6}, "fastercache": {}, "asymrnr": {"start": 1.0}, "disca": {"predictor": "reuse"}}
    size = {"height": 64, "width": 64, "frames": 5}
    run = Run(model=pipe.name_or_path, prompt="p", **size, steps=6, guidance=1.0, methods=methods)
    memory, *inactive_reasons = preflight(run, pipe)
    assert memory.startswith("The methods will hold up to ")
    assert inactive_reasons == [
        "FasterCache is off: 6 steps are too few, it needs at least 10",
        "AsymRnR does nothing: at these settings no token is removed",
        "DisCa does nothing: all 6 steps are full forward passes at this setting",
    ]


def test_under_a_student_every_step_is_matched_anew(students, pipe, sample, monkeypatch):
    """24 baseline steps match in every third; two blocks, queries and keys."""
    made = []
    monkeypatch.setattr("accel.methods.asymrnr.plan_cache.match", lambda *a, **k: made.append(1) or match(*a, **k))
    reduction = AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0.5, start=0.5, correction="none")
    for methods, steps in (([GPD(steps=24)], 12), ([], 4)):
        made.clear()
        with accel.apply(pipe, [*methods, reduction]):
            sample(pipe, steps=24, guidance=1.0)
        assert len(made) == steps * 2 * 2


@pytest.mark.parametrize(("correction", "reduced"), [("none", 4), ("linear", 2)])
def test_tokens_are_reduced_under_a_student_of_few_steps(correction, reduced, students, pipe, sample):
    """From the third of 6 steps on, in two blocks; with correction every second attention runs full."""
    reduction = AsymRnR(schedule="fixed", query_rate=0.5, kv_rate=0.5, start=0.3, correction=correction)
    with accel.apply(pipe, [GPD(steps=6), reduction]) as trace:
        sample(pipe, steps=6, guidance=1.0)
    assert trace.summary()["attention"]["reduce"] == 2 * reduced
    assert trace.summary()["calls"] == {"compute": 6}
