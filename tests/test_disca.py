"""DisCa: anchors, the one cached tensor, what predicts between anchors, and what is refused."""

import pytest
import torch
from conftest import make_meanflow, make_predictor, random_wan
from safetensors.torch import load_file

import accel
from accel.families import wan
from accel.methods import AsymRnR, DisCa, FasterCache, MeanFlow
from accel.methods.base import Ahead
from accel.methods.disca.disca import Cache, spread
from accel.methods.disca.predictor import Predictor, flops
from accel.students.interval_embedding import TOLD, conditioned
from accel.students.loading import placed


@pytest.mark.parametrize(
    "full, count, anchors",
    [
        (2, 6, [0, 5]), (3, 6, [0, 1, 5]), (4, 6, [0, 1, 2, 5]), (6, 6, [0, 1, 2, 3, 4, 5]),
        (9, 6, [0, 1, 2, 3, 4, 5]), (8, 20, [0, 1, 2, 5, 9, 12, 16, 19]),
    ],
)  # fmt: skip
def test_anchors_are_the_first_three_and_the_last_step_and_the_rest_is_spread(full, count, anchors):
    assert spread(full, count) == anchors


def test_every_number_of_full_passes_gives_as_many_anchors():
    for count in range(1, 51):
        for full in range(2, count + 1):
            anchors = spread(full, count)
            assert (
                len(anchors) == full
                and sorted(set(anchors)) == anchors
                and anchors[0] == 0
                and anchors[-1] == count - 1
            )


def test_anchors_can_be_given():
    assert DisCa(anchors="0 1, 2 5").steps(6) == [0, 1, 2, 5]
    for wrong, reason in (("1 2", "must rise from 0"), ("0 5 3", "must rise from 0"), ("0 x", "are not whole numbers")):
        with pytest.raises(ValueError, match=reason):
            DisCa(anchors=wrong)
    with pytest.raises(ValueError, match="disca.anchors ends with step 9, a run of 8 steps with 7: both full"):
        DisCa(anchors="0 9").steps(8)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_taylor_series_of_an_order_is_exact_for_a_line_or_less(order):
    cache, line = Cache(), lambda i: torch.full((1, 2, 3), 2.0 + 3 * i * (order > 0))
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
    with accel.apply(pipe, [DisCa(form="reuse", anchors="0 1 7")]) as trace:
        sample(pipe, steps=8, guidance=4.0)
    assert counted.calls == [6, 6]
    predicted = {(e.step, e.branch) for e in trace.events.values() if e.action == "predict"}
    assert predicted == {(i, b) for i in (2, 3, 4, 5, 6) for b in ("cond", "uncond")}
    assert trace.extras["disca"]["anchors"] == [0, 1, 7]


@pytest.mark.parametrize("form", ["reuse", "taylor-1"])
def test_all_anchors_are_bitwise_the_plain_run(form, pipe, sample):
    plain = sample(pipe, steps=6)
    with accel.apply(pipe, [DisCa(form=form, full=6)]) as trace:
        assert torch.equal(sample(pipe, steps=6), plain)
    assert trace.notes == ["DisCa does nothing: all 6 steps are full passes at this setting"]


def test_reuse_holds_one_tensor_for_a_branch_and_says_so_before(pipe, sample):
    model = pipe.transformer
    latents = torch.empty(1, 4, 3, 8, 8, device="meta")
    for guided, form, tensors in ((False, "reuse", 1), (True, "reuse", 2), (False, "taylor-2", 3)):
        method = DisCa(form=form, full=4)
        with accel.apply(pipe, [method]) as trace:
            sample(pipe, steps=8, guidance=4.0 if guided else 1.0, height=32 * 2)
        tokens = 3 * (64 // pipe.vae_scale_factor_spatial // 2) ** 2
        assert trace.bytes_held == tensors * tokens * 24 * 4
        assert method.forecast(Ahead(model, wan, latents, 8, guided, 2)) == trace.bytes_held


def test_predictions_are_never_kept(pipe, sample):
    """Between anchors 0 and 4 reuse gives the feature of step 0, not of a step between."""
    kept = []

    class Spy(DisCa):
        def steps(self, count):
            return [0, 4, 5]

    original = Cache.refresh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cache, "refresh", lambda self, i, f, order: (kept.append(i), original(self, i, f, order))[1])
        with accel.apply(pipe, [Spy(form="reuse")]):
            sample(pipe, steps=6, guidance=1.0)
    assert kept == [0, 4, 5]


@pytest.mark.parametrize("form", ["reuse", "taylor-1", "taylor-2"])
@pytest.mark.parametrize("height", [64, 32])
def test_another_run_in_the_same_block_starts_afresh(height, form, pipe, sample):
    """A Taylor series would take in the anchors of the run before."""
    methods = [DisCa(form=form, full=3)]
    with accel.apply(pipe, methods):
        sample(pipe, steps=6, guidance=1.0)
        second = sample(pipe, steps=6, guidance=1.0, height=height, seed=1)
    with accel.apply(pipe, methods):
        assert torch.equal(sample(pipe, steps=6, guidance=1.0, height=height, seed=1), second)


@pytest.fixture
def served(pipe, tmp_path):
    """A pipeline with a MeanFlow student, and predictors of that."""
    pipe.register_to_config(_name_or_path=str(tmp_path))
    folder = tmp_path / "meanflow"
    make_meanflow(pipe, folder)
    with placed(folder, pipe.transformer), conditioned(pipe.transformer, load_file(folder / TOLD)):
        for form in ("residual", "plain"):
            make_predictor(pipe, tmp_path / "predictor" / form, form)
    return pipe


@pytest.mark.parametrize("form", ["residual", "plain"])
def test_a_predictor_acts_between_the_students_anchors(form, served, sample):
    methods = [MeanFlow(steps=8), DisCa(full=4, form=form)]
    with accel.apply(served, methods[:1]):
        whole = sample(served, steps=8, guidance=1.0)
    with accel.apply(served, methods) as trace:
        assert not torch.equal(sample(served, steps=8, guidance=1.0), whole)
    assert trace.summary()["calls"] == {"compute": 4, "predict": 4}
    assert trace.notes[-1].startswith("DisCa: 4 of 8 passes are whole; a predicted one took ")
    with accel.apply(served, [methods[0], DisCa(full=8, form=form)]):
        assert torch.equal(sample(served, steps=8, guidance=1.0), whole)


@pytest.mark.parametrize("form", ["residual", "plain"])
def test_a_predictor_holds_itself_and_one_tensor_and_says_so_before(form, served, sample):
    student, method = MeanFlow(steps=8), DisCa(full=4, form=form)
    with accel.apply(served, [student]) as alone:
        sample(served, steps=8, guidance=1.0)
    with accel.apply(served, [student, method]) as trace:
        sample(served, steps=8, guidance=1.0)
    tokens = 3 * (64 // served.vae_scale_factor_spatial // 2) ** 2
    weights = sum(p.numel() for p in Predictor(wan, served.transformer, form, 1).parameters())
    assert trace.bytes_held - alone.bytes_held == 4 * (weights + tokens * 24)
    assert trace.bytes_forecast == trace.bytes_held


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("method", "action"),
    [(AsymRnR(schedule="fixed", query_rate=0.5, start=0), "reduce"), (FasterCache(attention_start=0), "reuse")],
)
def test_predictor_and_student_go_together_with_what_saves_attention(method, action, order, served, sample):
    with accel.apply(served, [MeanFlow(steps=15), *[DisCa(full=11), method][::order]]) as trace:
        assert sample(served, steps=15, guidance=1.0).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 11, "predict": 4} and trace.summary()["attention"][action]


def test_a_residual_predictor_that_is_not_trained_is_reuse():
    model = random_wan()
    predictor = Predictor(wan, model, "residual", 1)
    inputs = torch.randn(1, 6, 24), torch.randn(1, 6, 24), model.rope(torch.randn(1, 4, 3, 4, 4))
    hidden, cached = torch.randn(1, 12, 24), torch.randn(1, 12, 24)
    time = torch.randn(1, 6, 24)
    assert torch.equal(predictor(hidden, cached, inputs[0], time, inputs[2]), cached)


def test_the_work_of_a_prediction_is_counted(served, sample):
    with accel.apply(served, [MeanFlow(steps=8), DisCa(full=4)]) as trace:
        sample(served, steps=8, guidance=1.0)
    whole, block = trace.flops["denoiser"], trace.flops["blocks.0"]
    predictor = Predictor(wan, served.transformer, "residual", 1)
    tokens = 3 * (64 // served.vae_scale_factor_spatial // 2) ** 2
    layers = 2 * tokens * (48 * 24 + 24 * 24 + 24 * 24)
    assert flops(predictor, tokens, block) == block + layers
    share = (whole - 2 * block + block + layers) / whole
    assert trace.summary()["work"] == pytest.approx((4 + 4 * share) / 8, rel=1e-4)


@pytest.mark.parametrize(
    "methods, reason",
    [
        ([DisCa()], "belongs to another model than the one that runs: put the meanflow"),
        ([DisCa(), MeanFlow(steps=8)], "belongs to another model than the one that runs: put the meanflow"),
        (
            [MeanFlow(steps=8), DisCa(predictor="nowhere")],
            "there is no predictor 'nowhere' in that place .disca.predictor names another",
        ),
    ],
)
def test_a_predictor_without_its_student_is_refused(methods, reason, served, sample):
    plain = sample(served, steps=4)
    with pytest.raises(ValueError, match=reason), accel.apply(served, methods):
        pass
    assert torch.equal(sample(served, steps=4), plain)


def test_a_single_step_has_nothing_to_predict(served, sample):
    with pytest.raises(ValueError, match="disca and a run of 1 step do not go together"):
        with accel.apply(served, [DisCa(form="reuse")]):
            sample(served, steps=1, guidance=1.0)


def test_a_run_that_the_predictor_was_not_made_for_is_told(served, sample):
    with accel.apply(served, [MeanFlow(steps=10), DisCa(full=4)]) as trace:
        sample(served, steps=10, guidance=1.0)
    assert trace.notes[0] == (
        "DisCa: this predictor learnt runs of 8 steps, anchors up to 3 apart; this run has 10, up to 7 apart"
    )


def test_a_predictor_of_another_form_is_refused(served):
    plain = DisCa(form="plain").folder(served.name_or_path)
    with pytest.raises(ValueError, match="disca.form = residual, but predictor 'plain' has the form plain"):
        with accel.apply(served, [MeanFlow(steps=8), DisCa(predictor=str(plain))]):
            pass


def test_compiled_blocks_stay_compiled(pipe, sample):
    """Of many predicted steps none is a reason to compile anew; two shapes of graph at most: with and without cache."""
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), accel.apply(pipe, [DisCa(form="reuse", full=5)]) as trace:
        sample(pipe, steps=14, guidance=1.0)
    assert trace.summary()["calls"] == {"compute": 5, "predict": 9}
