"""Training DisCa's predictor: what it is held against, where the caches come from, and the discriminator."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from support import PREDICTOR_STEPS as STEPS
from support import build_pipe, make_meanflow, random_wan, timed
from support import predictor_task as task

from accel.families.wan import Wan
from accel.methods.disca.disca import select_full_steps
from accel.methods.disca.predictor import Predictor
from accel.ops.flow import euler
from accel.students.interval_embedding import IntervalEmbedder, pack_timestep
from accel.training import predictor_job as teach_predictor
from accel.training.feature_probe import FeatureProbe
from accel.training.jobs import DistillJob
from accel.training.loop import fit
from accel.training.networks import velocity
from accel.training.optim import OptimConfig
from accel.training.predictor_job import stage_recipes, train_predictor
from accel.training.tasks.predictor_fit import PredictorConfig


def test_a_watched_student_gives_what_it_gave_and_its_last_feature(pipe):
    watched, x, time = pipe.transformer, torch.randn(2, 4, 3, 4, 4), torch.tensor([700.0, 200.0])
    words = torch.randn(2, 6, 16)
    with torch.no_grad():
        plain = velocity(watched, x, time, words)
        student = FeatureProbe(watched)
        v, feature = student.whole(x, time, words)
        u, same = student.predicted(lambda hidden, cached, *_: cached, feature, x, time, words)
    assert torch.equal(v, plain) and torch.allclose(u, v, atol=1e-2) and torch.equal(same, feature)
    assert student.layers == [0, 1]


def test_an_untrained_residual_predictor_errs_by_what_the_feature_has_changed(pipe):
    learn = task(pipe)
    learn.trajectories.index = torch.tensor([2, 3, 4, 1])  # of anchors 0, 1 and 5
    learn.cached.normal_()
    x, words, cached = learn.trajectories.x.clone(), learn.trajectories.words.clone(), learn.cached.clone()
    time = learn._time()[2]
    with torch.no_grad():
        v, feature = learn.student.whole(x, time, words)
        u, _ = learn.student.predicted(lambda hidden, cached, *_: cached, cached, x, time, words)
    loss, logs = learn.loss(learn.module, 0, 0)
    each = [((a - b).square().mean() / size).item() for a, b, size in zip(cached, feature, feature.flatten(1).var(1))]
    errors = [((a - b).square().mean() / b.square().mean()).item() for a, b in zip(u, v)]
    assert logs["feature"] == pytest.approx(sum(each[:3]) / 3, rel=1e-3)  # at an anchor nothing is predicted
    assert logs["velocity"] == pytest.approx(sum(errors[:3]) / 3, rel=1e-3)
    assert loss.item() == pytest.approx(logs["velocity"] + 0.1 * logs["feature"], rel=1e-3)


def test_slots_that_are_all_at_anchors_go_on_until_there_is_something_to_predict(pipe):
    learn = task(pipe)
    assert (learn.trajectories.index == 0).all()
    loss, logs = learn.loss(learn.module, 0, 0)
    assert (learn.trajectories.index == 3).all()  # by whole passes over the anchors 0 and 1, and then the lesson at 2
    assert loss.item() > 0 and logs["velocity"] > 0 and learn.cached.abs().sum() > 0


def test_slots_run_as_the_predictor_is_served():
    config = PredictorConfig(guidance=(2, 5))
    runs = [config.run(random.Random(seed)) for seed in range(200)]
    assert {stride for stride, _ in runs} == {1, 2}
    assert {(stride, *anchors) for stride, anchors in runs} == {
        (stride, *(stride * step for step in select_full_steps(full, 20 // stride)))
        for stride, counts in ((1, range(7, 13)), (2, range(4, 7))) for full in counts
    }  # fmt: skip
    assert config.supported_runs == {20: 5, 10: 7}
    for given in ({"steps": 19}, {"full": (7, 20)}, {"steps": 4, "full": (2, 3)}):
        with pytest.raises(ValueError, match="leave nothing to predict"):
            PredictorConfig(guidance=(2, 5), **given)


def test_caches_are_refreshed_at_anchors_and_stay_between(pipe):
    learn = task(pipe)
    learn.trajectories.index = torch.tensor([2, 1, 3, 5])  # of anchors 0, 1 and 5
    before = learn.cached.normal_().clone()
    learn.loss(learn.module, 1, 0)
    assert [torch.equal(a, b) for a, b in zip(before, learn.cached)] == [True, False, True, False]


def test_runs_of_both_lengths_go_on_side_by_side(pipe):
    learn = task(pipe, strides=(1, 2), trajectories=16)
    learn.spread_timesteps()
    runs = [learn.config.run(rng) for rng in learn.trajectories.rngs("run")]
    place, before = learn.trajectories.index.clone(), learn.cached.clone()
    strides = torch.tensor([stride for stride, _ in runs])
    assert set(strides.tolist()) == {1, 2} and (place % strides == 0).all()
    learn.loss(learn.module, 0, 0)
    assert (learn.trajectories.index == (place + strides) % STEPS).all()
    kept = [torch.equal(a, b) for a, b in zip(before, learn.cached)]
    assert kept == [p not in anchors for p, (_, anchors) in zip(place.tolist(), runs)]


def test_slots_of_a_shorter_run_go_two_levels_in_one_step(pipe):
    learn = task(pipe, strides=(2,))  # three steps, of which the first and the last are whole
    learn.trajectories.index[:] = 2
    x, words = learn.trajectories.x.clone(), learn.trajectories.words.clone()
    now, then, time, _ = learn._time()
    with torch.no_grad():
        u, _ = learn.student.predicted(learn.module.predictor, learn.cached, x, time, words)
    assert learn.runs()[1].tolist() == 4 * [False]
    learn.loss(learn.module, 0, 0)
    assert (learn.trajectories.index == 4).all() and learn.runs()[1].all()
    torch.testing.assert_close(learn.trajectories.x, euler(x, u, now.double(), then.double()), rtol=1e-3, atol=1e-3)


def test_between_anchors_slots_go_on_as_predicted_and_beside_them_the_way_of_whole_passes(pipe):
    learn = task(pipe)  # anchors 0, 1 and 5
    learn.trajectories.index = torch.tensor([3, 3, 0, 0])
    learn.cached.normal_()
    x, words, cached = learn.trajectories.x.clone(), learn.trajectories.words.clone(), learn.cached.clone()
    now, then, time, _ = learn._time()
    with torch.no_grad():
        v, _ = learn.student.whole(x, time, words)
        u, _ = learn.student.predicted(learn.module.predictor, cached, x, time, words)
    learn.loss(learn.module, 0, 0)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(
        learn.trajectories.x, euler(x, torch.cat([u[:2], v[2:]]), now.double(), then.double()), **close
    )
    torch.testing.assert_close(learn.way, euler(x, v, now.double(), then.double()), **close)
    assert not torch.equal(learn.way[:2], learn.trajectories.x[:2]) and torch.equal(
        learn.way[2:], learn.trajectories.x[2:]
    )
    learn.loss(learn.module, 1, 0)
    assert torch.equal(learn.way, learn.trajectories.x)  # two come to the last anchor, two from one


@pytest.mark.parametrize("short", [0.0, 0.1])
def test_what_is_asked_of_a_slot_leads_to_where_whole_passes_lead(short, pipe, monkeypatch):
    """A prediction that would lead there but for a share of the whole pass errs by the square of that share."""
    learn = task(pipe)
    learn.trajectories.index[:] = 2
    now, then, *_ = learn._time()
    learn.trajectories.x = learn.way + 0.1 * torch.randn_like(learn.way)  # astray
    v, feature = learn._whole()
    u = (euler(learn.way, v, now, then) - learn.trajectories.x) / (then - now).view(-1, 1, 1, 1, 1) - short * v
    monkeypatch.setattr(learn.student, "predicted", lambda *_: (u, feature))
    learn._lesson(learn.module, logs := {})
    assert logs["velocity"] == pytest.approx(short**2, abs=1e-5)


def test_slots_are_staggered_with_the_anchor_before_in_their_cache(pipe):
    plain = task(pipe, trajectories=16)
    for _ in (0, 1):  # both are anchors, the next one is the last step
        with torch.no_grad():
            v, feature = plain.student.whole(plain.trajectories.x, plain._time()[2], plain.trajectories.words)
        plain.trajectories.move(v, plain.trajectories.index + 1)
    learn = task(pipe, trajectories=16)
    learn.spread_timesteps()
    place = learn.trajectories.index
    assert len(place.unique()) > 3
    assert (learn.cached.flatten(1).abs().sum(1) > 0).tolist() == (place > 0).tolist()
    torch.testing.assert_close(learn.cached[place > 1], feature[place > 1])


def test_the_second_stage_teaches_each_side_its_own_part(pipe):
    """What the predictor learns of being told apart has the weight of that; what the judge learns has its own."""
    learn = task(pipe, feature=0.0)
    learn.stage = 1
    _, _, time, after = learn._time()
    x, words, known = learn.trajectories.x, learn.trajectories.words, torch.tensor([0.0, 1, 1, 1])
    learn.cached.normal_()
    u, _ = learn.student.predicted(learn.module.predictor, learn.cached, x, time, words)
    grads = {}
    for sharpen in (0.0, 1e6):
        learn.config = learn.config.model_copy(update={"adversarial": sharpen})
        learn.module.zero_grad()
        loss = learn._judged(learn.module.judge, [x, u], after, words, known, logs := {})
        loss.backward(retain_graph=True)
        grads[sharpen] = {name: 0.0 if p.grad is None else p.grad.abs().sum().item()
                          for name, p in learn.module.named_parameters()}  # fmt: skip
    judge = next(name for name in grads[0.0] if name.startswith("judge") and grads[0.0][name])
    assert grads[0.0]["predictor.out.weight"] == 0 and grads[1e6]["predictor.out.weight"] > 0
    assert grads[1e6][judge] == pytest.approx(grads[0.0][judge], rel=0.01)  # spectral norms are estimated anew
    assert set(logs) == {"fooled", "judge right"}
    assert all(p.grad is None for p in learn.student.transformer.parameters())
    assert all(p.requires_grad for p in learn.module.parameters())


def test_a_stored_predictor_predicts_as_the_trained_one(pipe, tmp_path):
    learn = task(pipe)
    torch.nn.init.normal_(learn.module.predictor.out.weight)
    learn.save(tmp_path)
    again = Predictor(Wan(), random_wan(), "residual", 1)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x, words, time = learn.trajectories.x, learn.trajectories.words, learn._time()[2]
    learn.cached.normal_()
    with torch.no_grad():
        ways = [learn.student.predicted(p, learn.cached, x, time, words)[0] for p in (learn.module.predictor, again)]
    torch.testing.assert_close(*ways, rtol=3e-2, atol=3e-2)  # half precision
    assert not torch.allclose(ways[0], learn.student.predicted(lambda _, c, *__: c, learn.cached, x, time, words)[0])


@pytest.mark.parametrize("stage", [0, 1])
def test_a_resumed_stage_ends_with_the_weights_of_an_unbroken_one(stage, tmp_path):
    whole, first, second = tasks = [task(build_pipe()) for _ in range(3)]
    for learn in tasks:
        learn.stage = stage
        learn.trajectories.index[:] = 2  # and so on to 4, without a whole pass
        learn.cached.copy_(torch.randn(learn.cached.shape, generator=torch.Generator().manual_seed(5)))
    fit(whole, tmp_path / "whole", minutes=None, resume=False)
    assert fit(first, tmp_path / "parts", minutes=0, resume=False)["step"] == 1
    fit(second, tmp_path / "parts", minutes=None, resume=True)
    assert torch.equal(second.trajectories.x, whole.trajectories.x) and torch.equal(second.cached, whole.cached)
    for one, two in zip(whole.module.parameters(), second.module.parameters()):
        assert torch.equal(one, two)


def test_the_second_stage_is_shorter_and_finer():
    first, second = stage_recipes(OptimConfig(steps=90, lr=1e-3, matrix_lr=2e-3))
    assert (first.steps, second.steps, second.lr, second.matrix_lr) == (90, 30, 5e-4, 1e-3)


def test_without_a_student_nothing_is_trained(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(DistillJob, "pipeline", lambda self, device: pipe)
    monkeypatch.setattr(DistillJob, "beside", lambda self: tmp_path)
    with pytest.raises(ValueError, match="the student comes first: python -m accel train meanflow"):
        train_predictor(OptimConfig(steps=1, lr=1e-3), DistillJob(), "cpu", None, False, tmp_path / "out")


def test_a_trained_predictor_lies_beside_the_model_in_its_form(pipe, tmp_path, monkeypatch):
    from accel.runtime.models import ModelDefaults

    make_meanflow(pipe, tmp_path / "meanflow", (2.0, 5.0))
    file = tmp_path / "meanflow" / "meanflow.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher_guidance": 3.0}))
    defaults = ModelDefaults(height=32, width=32, frames=5, steps=4, guidance=3.0, text_length=6)
    timed(pipe)
    monkeypatch.setattr(DistillJob, "pipeline", lambda self, device: pipe)
    monkeypatch.setattr(DistillJob, "beside", lambda self: tmp_path)
    monkeypatch.setattr(teach_predictor, "model_defaults", lambda *_: defaults)
    monkeypatch.setattr("accel.training.jobs.LOOKS", 1)
    monkeypatch.setattr(teach_predictor, "quicken", lambda blocks, device: None)
    order = DistillJob(ablation="paper")
    done = train_predictor(OptimConfig(steps=3, lr=1e-3, warmup=1), order, "cpu", None, False, tmp_path / "out")
    assert done["finished"] and list(done["stages"]) == ["regression", "adversarial"]
    facts = json.loads((tmp_path / "predictor" / "paper" / "predictor.json").read_text())
    assert facts["form"] == "paper" and list(facts["stages"]) == ["regression", "adversarial"]
    assert (tmp_path / "out" / "match-only" / "predictor.json").is_file()
    assert not isinstance(pipe.transformer.condition_embedder, IntervalEmbedder)


def test_a_step_is_told_as_the_student_is_told_it(pipe):
    learn = task(pipe)
    learn.trajectories.index = torch.tensor([0, 1, 2, 3])
    now, then, time, after = learn._time()
    w = time[8:] / 1000
    assert torch.equal(time, pack_timestep(now, then, w)) and torch.equal(after, pack_timestep(then, then, w))
    assert ((w >= 2) & (w <= 5)).all()
