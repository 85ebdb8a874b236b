"""DisCa: full steps, the cached tensor, what predicts between full steps, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file
from support import build_pipe, euler_as_fitted_solver, make_meanflow, make_predictor, random_wan

import accel
from accel.families.wan import Wan
from accel.methods import AsymRnR, DisCa, FasterCache, FittedSolver, MeanFlow
from accel.methods.base import RunSpec
from accel.methods.disca.disca import select_full_steps
from accel.methods.disca.predictor import Predictor
from accel.methods.disca.predictor_manifest import predictor_flops
from accel.ops.taylor import TaylorCache
from accel.students.interval_embedding import INTERVAL_EMBEDDER, with_interval_embedder
from accel.students.loading import load_student


@pytest.mark.parametrize(
    "num_full_steps, count, full_steps",
    [
        (2, 6, [0, 5]), (3, 6, [0, 1, 5]), (4, 6, [0, 1, 2, 5]), (6, 6, [0, 1, 2, 3, 4, 5]),
        (9, 6, [0, 1, 2, 3, 4, 5]), (8, 20, [0, 1, 2, 5, 9, 12, 16, 19]),
    ],
)  # fmt: skip
def test_full_steps_are_the_first_three_the_last_and_others_spread_between(num_full_steps, count, full_steps):
    assert select_full_steps(num_full_steps, count) == full_steps


def test_there_are_as_many_full_steps_as_asked_for_from_the_first_to_the_last():
    for count in range(1, 51):
        for full in range(2, count + 1):
            steps = select_full_steps(full, count)
            assert len(steps) == full and sorted(set(steps)) == steps
            assert steps[0] == 0 and steps[-1] == count - 1


def test_full_steps_can_be_given():
    assert DisCa(full_steps="0 1, 2 5").planned_steps(6) == [0, 1, 2, 5]
    for wrong, reason in (("1 2", "must rise from 0"), ("0 5 3", "must rise from 0"), ("0 x", "are not whole numbers")):
        with pytest.raises(ValueError, match=reason):
            DisCa(full_steps=wrong)
    with pytest.raises(ValueError, match="ends with step 9, but a run of 8 steps ends with step 7"):
        DisCa(full_steps="0 9").planned_steps(8)


def test_blocks_run_at_full_steps_only_in_each_branch(pipe, sample):
    calls = [0, 0]

    def count(i):
        calls[i] += 1

    for i, block in enumerate(pipe.transformer.blocks):
        block.ffn.register_forward_hook(lambda *_, i=i: count(i))
    with accel.apply(pipe, [DisCa(predictor="reuse", full_steps="0 1 7")]) as trace:
        sample(pipe, steps=8, guidance=4.0)
    assert calls == [6, 6]
    predicted = {(e.step, e.branch) for e in trace.events.values() if e.action == "predict"}
    assert predicted == {(i, b) for i in (2, 3, 4, 5, 6) for b in ("cond", "uncond")}
    assert trace.method_data["disca"]["full_steps"] == [0, 1, 7]


def test_a_branch_that_a_fitted_solver_leaves_out_is_predicted_from_the_last_full_step_alone(pipe, sample, tmp_path):
    """Full steps 0, 1, 5, 9, 11; the unconditional branch has the first two of them, and runs again at 7 and 10."""
    solver = euler_as_fitted_solver(pipe, 12, uncond_steps=[0, 1, 2, 7, 10])
    (file := tmp_path / "solver.json").write_text(solver.model_dump_json())
    methods = [DisCa(predictor="reuse", full_steps="0 1 5 9 11"), FittedSolver(steps=12, solver=str(file))]
    with accel.apply(pipe, methods) as trace:
        sample(pipe, steps=12)
    action = lambda step, branch: trace.events[step, branch, "denoiser"].action
    assert [action(i, "uncond") for i in (0, 1, 2, 7, 10)] == ["compute", "compute", "predict", "compute", "compute"]
    assert [i for i in range(12) if action(i, "cond") == "compute"] == [0, 1, 5, 9, 11]


def test_full_steps_that_another_method_asks_for_are_counted_in_the_report(pipe, sample):
    """CFG-Cache needs the steps whose delta it takes in full."""
    with accel.apply(pipe, [DisCa(predictor="reuse", num_full_steps=8), FasterCache(attention=False)]) as trace:
        sample(pipe)
    full = [e.step for e in trace.events.values() if (e.branch, e.layer, e.action) == ("cond", "denoiser", "compute")]
    assert trace.method_data["disca"]["full_steps"] == sorted(full) and len(full) > 8
    assert any(f"DisCa: {len(full)} of 20 forward passes are full" in message for message in trace.messages)


@pytest.mark.parametrize("more", [{"full_steps": "0 1 7"}, {}])
def test_a_list_of_full_steps_acts_and_without_one_fifty_are_all_of_any_run(more, pipe, sample):
    method, count = DisCa(predictor="reuse", num_full_steps=50, **more), 8 if more else 60
    assert method.is_neutral == (not more)
    with accel.apply(pipe, [method]) as trace:
        sample(pipe, steps=count)
    assert (trace.summary()["flops_ratio"] < 1) == bool(more)
    does_nothing = f"DisCa does nothing: all {count} steps are full forward passes at this setting"
    assert trace.messages == [does_nothing] or more


@pytest.mark.parametrize("form", ["reuse", "taylor-1"])
def test_full_steps_only_are_bitwise_the_baseline(form, pipe, sample):
    baseline = sample(pipe, steps=6)
    with accel.apply(pipe, [DisCa(predictor=form, num_full_steps=6)]) as trace:
        assert torch.equal(sample(pipe, steps=6), baseline)
    assert trace.messages == ["DisCa does nothing: all 6 steps are full forward passes at this setting"]


def test_the_memory_estimate_is_the_cached_tensors_of_each_branch(pipe, sample):
    model = pipe.transformer
    latents = torch.empty(1, 4, 3, 8, 8, device="meta")
    for guided, form, tensors in ((False, "reuse", 1), (True, "reuse", 2), (False, "taylor-2", 3)):
        method = DisCa(predictor=form, num_full_steps=4)
        with accel.apply(pipe, [method]) as trace:
            sample(pipe, steps=8, guidance=4.0 if guided else 1.0, height=32 * 2)
        tokens = 3 * (64 // pipe.vae_scale_factor_spatial // 2) ** 2
        assert trace.peak_bytes == tensors * tokens * 24 * 4
        assert method.estimate_memory(RunSpec(model, Wan(), latents, (3, 4, 4), 8, guided, 2)) == trace.peak_bytes


def test_predictions_are_never_cached(pipe, sample, monkeypatch):
    """Between full steps 0 and 4, only the output of step 0 is cached."""
    cached, refresh = [], TaylorCache.refresh

    def spy(self, step, feature, order):
        cached.append(step)
        refresh(self, step, feature, order)

    monkeypatch.setattr(TaylorCache, "refresh", spy)
    with accel.apply(pipe, [DisCa(predictor="reuse", full_steps="0 4 5")]):
        sample(pipe, steps=6, guidance=1.0)
    assert cached == [0, 4]  # after the last step nothing is predicted


@pytest.mark.parametrize("form", ["reuse", "taylor-1", "taylor-2"])
@pytest.mark.parametrize("height", [64, 32])
def test_a_second_run_in_the_same_context_starts_with_an_empty_cache(height, form, pipe, sample):
    """A Taylor series would otherwise use the full steps of the run before."""
    methods = [DisCa(predictor=form, num_full_steps=3)]
    with accel.apply(pipe, methods):
        sample(pipe, steps=6, guidance=1.0)
        second = sample(pipe, steps=6, guidance=1.0, height=height, seed=1)
    with accel.apply(pipe, methods):
        assert torch.equal(sample(pipe, steps=6, guidance=1.0, height=height, seed=1), second)


@pytest.fixture
def student_pipe(pipe, tmp_path):
    """A pipeline with a MeanFlow student and predictors for it."""
    pipe.register_to_config(_name_or_path=str(tmp_path))
    folder = tmp_path / "meanflow"
    make_meanflow(pipe, folder)
    with (
        load_student(folder, pipe.transformer),
        with_interval_embedder(pipe.transformer, load_file(folder / INTERVAL_EMBEDDER)),
    ):
        for form in ("residual", "paper"):
            make_predictor(pipe, tmp_path / "predictor" / form, form)
    return pipe


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_a_predictor_acts_between_the_full_steps_of_its_student(form, student_pipe, sample):
    methods = [MeanFlow(steps=8), DisCa(num_full_steps=4, predictor=form)]
    with accel.apply(student_pipe, methods[:1]):
        full = sample(student_pipe, steps=8, guidance=1.0)
    with accel.apply(student_pipe, methods) as trace:
        assert not torch.equal(sample(student_pipe, steps=8, guidance=1.0), full)
    assert trace.summary()["calls"] == {"compute": 4, "predict": 4}
    assert trace.messages[-1].startswith("DisCa: 4 of 8 forward passes are full; a predicted one took ")
    with accel.apply(student_pipe, [methods[0], DisCa(num_full_steps=8, predictor=form)]):
        assert torch.equal(sample(student_pipe, steps=8, guidance=1.0), full)


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_the_memory_estimate_is_the_predictor_and_one_tensor(form, student_pipe, sample):
    student, method = MeanFlow(steps=8), DisCa(num_full_steps=4, predictor=form)
    with accel.apply(student_pipe, [student]) as alone:
        sample(student_pipe, steps=8, guidance=1.0)
    with accel.apply(student_pipe, [student, method]) as trace:
        sample(student_pipe, steps=8, guidance=1.0)
    tokens = 3 * (64 // student_pipe.vae_scale_factor_spatial // 2) ** 2
    weights = sum(p.numel() for p in Predictor(Wan(), student_pipe.transformer, form, 1).parameters())
    assert trace.peak_bytes - alone.peak_bytes == 4 * (weights + tokens * 24)
    assert trace.estimated_bytes == trace.peak_bytes


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("method", "action"),
    [(AsymRnR(schedule="fixed", query_rate=0.5, start=0), "reduce"), (FasterCache(attention_start=0), "reuse")],
)
def test_predictor_and_student_combine_with_methods_that_save_attention(method, action, order, student_pipe, sample):
    with accel.apply(student_pipe, [MeanFlow(steps=15), *[DisCa(num_full_steps=11), method][::order]]) as trace:
        assert sample(student_pipe, steps=15, guidance=1.0).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 11, "predict": 4} and trace.summary()["attention"][action]


def test_an_untrained_residual_predictor_is_reuse():
    model = random_wan()
    predictor = Predictor(Wan(), model, "residual", 1)
    hidden, cached = torch.randn(1, 12, 24), torch.randn(1, 12, 24)
    text, time, rope = torch.randn(1, 6, 24), torch.randn(1, 6, 24), model.rope(torch.randn(1, 4, 3, 4, 4))
    assert torch.equal(predictor(hidden, cached, torch.ones(1), text, time, rope), cached)


@pytest.mark.parametrize("form", ["residual", "paper", "guided-base"])
def test_the_flops_of_a_predictor_are_those_of_its_blocks_and_of_its_linear_layers_on_tokens(form):
    predictor = Predictor(Wan(), random_wan(), form, 2)
    layers = [layer for layer in (*predictor.fuse, predictor.out) if isinstance(layer, torch.nn.Linear)]
    on_tokens = sum(2 * 100 * layer.weight.numel() for layer in layers)
    assert predictor_flops(form, 2, 100, 24, 1000) == 2000 + on_tokens


def test_the_work_of_predictions_is_counted(student_pipe, sample):
    with accel.apply(student_pipe, [MeanFlow(steps=8), DisCa(num_full_steps=4)]) as trace:
        sample(student_pipe, steps=8, guidance=1.0)
    full, block = trace.flops["denoiser"], trace.flops["blocks.0"]
    tokens = 3 * (64 // student_pipe.vae_scale_factor_spatial // 2) ** 2
    layers = 2 * tokens * (48 * 24 + 24 * 24 + 24 * 24)
    share = (full - 2 * block + block + layers) / full
    assert trace.summary()["flops_ratio"] == pytest.approx((4 + 4 * share) / 8, rel=1e-4)


@pytest.mark.parametrize(
    "methods, reason",
    [
        ([DisCa()], "belongs to another model than the one that runs: put the meanflow"),
        ([DisCa(), MeanFlow(steps=8)], "belongs to another model than the one that runs: put the meanflow"),
        (
            [MeanFlow(steps=8), DisCa(predictor_dir="nowhere")],
            "there is no predictor 'nowhere' .disca.predictor_dir names another",
        ),
    ],
)
def test_a_predictor_without_its_student_is_refused(methods, reason, student_pipe, sample):
    baseline = sample(student_pipe, steps=4)
    with pytest.raises(ValueError, match=reason), accel.apply(student_pipe, methods):
        pass
    assert torch.equal(sample(student_pipe, steps=4), baseline)


def test_a_predictor_of_the_base_model_is_given_the_gap_in_both_branches(pipe, sample, tmp_path, monkeypatch):
    make_predictor(pipe, tmp_path / "guided-base", "guided-base")
    method, gaps = DisCa(predictor="guided-base", predictor_dir=str(tmp_path / "guided-base"), num_full_steps=4), []
    monkeypatch.setattr(
        Predictor, "forward", lambda self, hidden, cached, gap, *_: (gaps.append(gap.item()), cached)[1]
    )
    with accel.apply(pipe, method) as trace:
        sample(pipe, steps=8)
    sigmas = trace.sigmas  # the full steps are 0, 1, 2 and 7
    expected = [sigmas[2] - sigmas[i] for i in (3, 4, 5, 6) for _ in ("cond", "uncond")]
    assert gaps == pytest.approx(expected, rel=1e-4)


def test_a_predictor_of_the_base_model_is_refused_with_a_student(student_pipe, tmp_path):
    make_predictor(student_pipe, tmp_path / "predictor" / "guided-base", "guided-base")
    with (
        pytest.raises(ValueError, match="another model than the one that runs: run the model that it was trained for"),
        accel.apply(student_pipe, [MeanFlow(steps=8), DisCa(predictor="guided-base")]),
    ):
        pass


def test_a_predictor_of_one_transformer_is_refused_beside_a_second_one(tmp_path):
    pipe = build_pipe(transformer_2=random_wan(1), boundary_ratio=0.7)
    make_predictor(pipe, tmp_path / "predictor", "guided-base")
    method = DisCa(predictor="guided-base", predictor_dir=str(tmp_path / "predictor"))
    with pytest.raises(ValueError, match="of one transformer, and this pipeline has 2: choose reuse or taylor-1"):
        with accel.apply(pipe, method):
            pass


def test_a_single_step_has_nothing_to_predict(student_pipe, sample):
    with pytest.raises(ValueError, match="disca and a run of 1 step do not go together"):
        with accel.apply(student_pipe, [DisCa(predictor="reuse")]):
            sample(student_pipe, steps=1, guidance=1.0)


def test_a_run_that_the_predictor_was_not_trained_for_is_reported(student_pipe, sample):
    with accel.apply(student_pipe, [MeanFlow(steps=10), DisCa(num_full_steps=4)]) as trace:
        sample(student_pipe, steps=10, guidance=1.0)
    assert trace.messages[0] == (
        "DisCa: this predictor was trained for runs of 8 steps, full steps up to 3 apart; "
        "this run has 10, up to 7 apart"
    )


def test_a_predictor_of_another_form_is_refused(student_pipe):
    folder = DisCa(predictor="paper").weights_dir(student_pipe.name_or_path)
    with pytest.raises(ValueError, match="disca.predictor = residual, but the predictor in 'paper' has the form paper"):
        with accel.apply(student_pipe, [MeanFlow(steps=8), DisCa(predictor_dir=str(folder))]):
            pass


def test_compiled_blocks_stay_compiled(pipe, sample):
    """No predicted step recompiles the blocks."""
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        accel.apply(pipe, [DisCa(predictor="reuse", num_full_steps=5)]) as trace,
    ):
        sample(pipe, steps=14, guidance=1.0)
    assert trace.summary()["calls"] == {"compute": 5, "predict": 9}


def test_a_predictor_dir_without_a_predictor_is_refused_though_the_setting_is_not_used():
    with pytest.raises(ValueError, match="there is no predictor 'nowhere'"):
        DisCa(predictor="reuse", predictor_dir="nowhere")
