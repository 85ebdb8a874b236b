"""DisCa: anchors, the one cached tensor, what predicts between anchors, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file
from support import make_meanflow, make_predictor, random_wan

import accel
from accel.families.wan import Wan
from accel.methods import AsymRnR, DisCa, FasterCache, MeanFlow
from accel.methods.base import RunSpec
from accel.methods.disca.disca import TaylorCache, select_full_steps
from accel.methods.disca.predictor import Predictor, flops
from accel.students.interval_embedding import INTERVAL_EMBEDDER, with_interval_embedder
from accel.students.loading import load_student


@pytest.mark.parametrize(
    "full, count, anchors",
    [
        (2, 6, [0, 5]), (3, 6, [0, 1, 5]), (4, 6, [0, 1, 2, 5]), (6, 6, [0, 1, 2, 3, 4, 5]),
        (9, 6, [0, 1, 2, 3, 4, 5]), (8, 20, [0, 1, 2, 5, 9, 12, 16, 19]),
    ],
)  # fmt: skip
def test_anchors_are_the_first_three_and_the_last_step_and_the_rest_is_spread(full, count, anchors):
    assert select_full_steps(full, count) == anchors


def test_every_number_of_full_passes_gives_as_many_anchors():
    for count in range(1, 51):
        for full in range(2, count + 1):
            anchors = select_full_steps(full, count)
            assert (
                len(anchors) == full
                and sorted(set(anchors)) == anchors
                and anchors[0] == 0
                and anchors[-1] == count - 1
            )


def test_anchors_can_be_given():
    assert DisCa(full_steps="0 1, 2 5").steps(6) == [0, 1, 2, 5]
    for wrong, reason in (("1 2", "must rise from 0"), ("0 5 3", "must rise from 0"), ("0 x", "are not whole numbers")):
        with pytest.raises(ValueError, match=reason):
            DisCa(full_steps=wrong)
    with pytest.raises(ValueError, match="disca.full_steps ends with step 9, a run of 8 steps with 7: both full"):
        DisCa(full_steps="0 9").steps(8)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_taylor_series_of_an_order_is_exact_for_a_line_or_less(order):
    cache, line = TaylorCache(), lambda i: torch.full((1, 2, 3), 2.0 + 3 * i * (order > 0))
    for i in (0, 2, 5):
        cache.refresh(i, line(i), order)
    assert len(cache.terms) == order + 1
    torch.testing.assert_close(cache.extrapolate(9), line(9))


class Counted:
    """Counts how often the blocks of a model run."""

    def __init__(self, model):
        self.calls = [0] * len(model.blocks)
        for i, block in enumerate(model.blocks):
            block.ffn.register_forward_hook(lambda *_, i=i: self._count(i))

    def _count(self, i):
        self.calls[i] += 1


def test_blocks_run_at_anchors_alone_in_each_branch(pipe, sample):
    counted = Counted(pipe.transformer)
    with accel.apply(pipe, [DisCa(predictor="reuse", full_steps="0 1 7")]) as trace:
        sample(pipe, steps=8, guidance=4.0)
    assert counted.calls == [6, 6]
    predicted = {(e.step, e.branch) for e in trace.events.values() if e.action == "predict"}
    assert predicted == {(i, b) for i in (2, 3, 4, 5, 6) for b in ("cond", "uncond")}
    assert trace.method_data["disca"]["full_steps"] == [0, 1, 7]


@pytest.mark.parametrize("form", ["reuse", "taylor-1"])
def test_all_anchors_are_bitwise_the_plain_run(form, pipe, sample):
    plain = sample(pipe, steps=6)
    with accel.apply(pipe, [DisCa(predictor=form, num_full_steps=6)]) as trace:
        assert torch.equal(sample(pipe, steps=6), plain)
    assert trace.messages == ["DisCa does nothing: all 6 steps are full passes at this setting"]


def test_reuse_holds_one_tensor_for_a_branch_and_says_so_before(pipe, sample):
    model = pipe.transformer
    latents = torch.empty(1, 4, 3, 8, 8, device="meta")
    for guided, form, tensors in ((False, "reuse", 1), (True, "reuse", 2), (False, "taylor-2", 3)):
        method = DisCa(predictor=form, num_full_steps=4)
        with accel.apply(pipe, [method]) as trace:
            sample(pipe, steps=8, guidance=4.0 if guided else 1.0, height=32 * 2)
        tokens = 3 * (64 // pipe.vae_scale_factor_spatial // 2) ** 2
        assert trace.peak_bytes == tensors * tokens * 24 * 4
        assert method.estimate_memory(RunSpec(model, Wan(), latents, 8, guided, 2)) == trace.peak_bytes


def test_predictions_are_never_kept(pipe, sample):
    """Between anchors 0 and 4 reuse gives the feature of step 0, not of a step between."""
    kept = []

    class Spy(DisCa):
        def steps(self, count):
            return [0, 4, 5]

    original = TaylorCache.refresh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            TaylorCache, "refresh", lambda self, i, f, order: (kept.append(i), original(self, i, f, order))[1]
        )
        with accel.apply(pipe, [Spy(predictor="reuse")]):
            sample(pipe, steps=6, guidance=1.0)
    assert kept == [0, 4, 5]


@pytest.mark.parametrize("form", ["reuse", "taylor-1", "taylor-2"])
@pytest.mark.parametrize("height", [64, 32])
def test_another_run_in_the_same_block_starts_afresh(height, form, pipe, sample):
    """A Taylor series would take in the anchors of the run before."""
    methods = [DisCa(predictor=form, num_full_steps=3)]
    with accel.apply(pipe, methods):
        sample(pipe, steps=6, guidance=1.0)
        second = sample(pipe, steps=6, guidance=1.0, height=height, seed=1)
    with accel.apply(pipe, methods):
        assert torch.equal(sample(pipe, steps=6, guidance=1.0, height=height, seed=1), second)


@pytest.fixture
def supported_runs(pipe, tmp_path):
    """A pipeline with a MeanFlow student, and predictors of that."""
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
def test_a_predictor_acts_between_the_students_anchors(form, supported_runs, sample):
    methods = [MeanFlow(steps=8), DisCa(num_full_steps=4, predictor=form)]
    with accel.apply(supported_runs, methods[:1]):
        whole = sample(supported_runs, steps=8, guidance=1.0)
    with accel.apply(supported_runs, methods) as trace:
        assert not torch.equal(sample(supported_runs, steps=8, guidance=1.0), whole)
    assert trace.summary()["calls"] == {"compute": 4, "predict": 4}
    assert trace.messages[-1].startswith("DisCa: 4 of 8 passes are whole; a predicted one took ")
    with accel.apply(supported_runs, [methods[0], DisCa(num_full_steps=8, predictor=form)]):
        assert torch.equal(sample(supported_runs, steps=8, guidance=1.0), whole)


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_a_predictor_holds_itself_and_one_tensor_and_says_so_before(form, supported_runs, sample):
    student, method = MeanFlow(steps=8), DisCa(num_full_steps=4, predictor=form)
    with accel.apply(supported_runs, [student]) as alone:
        sample(supported_runs, steps=8, guidance=1.0)
    with accel.apply(supported_runs, [student, method]) as trace:
        sample(supported_runs, steps=8, guidance=1.0)
    tokens = 3 * (64 // supported_runs.vae_scale_factor_spatial // 2) ** 2
    weights = sum(p.numel() for p in Predictor(Wan(), supported_runs.transformer, form, 1).parameters())
    assert trace.peak_bytes - alone.peak_bytes == 4 * (weights + tokens * 24)
    assert trace.estimated_bytes == trace.peak_bytes


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("method", "action"),
    [(AsymRnR(schedule="fixed", query_rate=0.5, start=0), "reduce"), (FasterCache(attention_start=0), "reuse")],
)
def test_predictor_and_student_go_together_with_what_saves_attention(method, action, order, supported_runs, sample):
    with accel.apply(supported_runs, [MeanFlow(steps=15), *[DisCa(num_full_steps=11), method][::order]]) as trace:
        assert sample(supported_runs, steps=15, guidance=1.0).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 11, "predict": 4} and trace.summary()["attention"][action]


def test_a_residual_predictor_that_is_not_trained_is_reuse():
    model = random_wan()
    predictor = Predictor(Wan(), model, "residual", 1)
    inputs = torch.randn(1, 6, 24), torch.randn(1, 6, 24), model.rope(torch.randn(1, 4, 3, 4, 4))
    hidden, cached = torch.randn(1, 12, 24), torch.randn(1, 12, 24)
    time = torch.randn(1, 6, 24)
    assert torch.equal(predictor(hidden, cached, inputs[0], time, inputs[2]), cached)


def test_the_work_of_a_prediction_is_counted(supported_runs, sample):
    with accel.apply(supported_runs, [MeanFlow(steps=8), DisCa(num_full_steps=4)]) as trace:
        sample(supported_runs, steps=8, guidance=1.0)
    whole, block = trace.flops["denoiser"], trace.flops["blocks.0"]
    predictor = Predictor(Wan(), supported_runs.transformer, "residual", 1)
    tokens = 3 * (64 // supported_runs.vae_scale_factor_spatial // 2) ** 2
    layers = 2 * tokens * (48 * 24 + 24 * 24 + 24 * 24)
    assert flops(predictor, tokens, block) == block + layers
    share = (whole - 2 * block + block + layers) / whole
    assert trace.summary()["flops_ratio"] == pytest.approx((4 + 4 * share) / 8, rel=1e-4)


@pytest.mark.parametrize(
    "methods, reason",
    [
        ([DisCa()], "belongs to another model than the one that runs: put the meanflow"),
        ([DisCa(), MeanFlow(steps=8)], "belongs to another model than the one that runs: put the meanflow"),
        (
            [MeanFlow(steps=8), DisCa(predictor_dir="nowhere")],
            "there is no predictor 'nowhere' in that place .disca.predictor_dir names another",
        ),
    ],
)
def test_a_predictor_without_its_student_is_refused(methods, reason, supported_runs, sample):
    plain = sample(supported_runs, steps=4)
    with pytest.raises(ValueError, match=reason), accel.apply(supported_runs, methods):
        pass
    assert torch.equal(sample(supported_runs, steps=4), plain)


def test_a_single_step_has_nothing_to_predict(supported_runs, sample):
    with pytest.raises(ValueError, match="disca and a run of 1 step do not go together"):
        with accel.apply(supported_runs, [DisCa(predictor="reuse")]):
            sample(supported_runs, steps=1, guidance=1.0)


def test_a_run_that_the_predictor_was_not_made_for_is_told(supported_runs, sample):
    with accel.apply(supported_runs, [MeanFlow(steps=10), DisCa(num_full_steps=4)]) as trace:
        sample(supported_runs, steps=10, guidance=1.0)
    assert trace.messages[0] == (
        "DisCa: this predictor learnt runs of 8 steps, full steps up to 3 apart; this run has 10, up to 7 apart"
    )


def test_a_predictor_of_another_form_is_refused(supported_runs):
    plain = DisCa(predictor="paper").weights_dir(supported_runs.name_or_path)
    with pytest.raises(ValueError, match="disca.predictor = residual, but the predictor in 'paper' has the form paper"):
        with accel.apply(supported_runs, [MeanFlow(steps=8), DisCa(predictor=str(plain))]):
            pass


def test_compiled_blocks_stay_compiled(pipe, sample):
    """Of many predicted steps none is a reason to compile anew; two shapes of graph at most: with and without cache."""
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        accel.apply(pipe, [DisCa(predictor="reuse", num_full_steps=5)]) as trace,
    ):
        sample(pipe, steps=14, guidance=1.0)
    assert trace.summary()["calls"] == {"compute": 5, "predict": 9}
