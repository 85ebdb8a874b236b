"""Training DisCa's predictor: targets, caches, trajectories as at inference, and the adversarial stage."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from support import PREDICTOR_STEPS as STEPS
from support import build_pipe, make_meanflow, predictor_task, random_wan, timed

import accel
from accel.families.wan import Wan
from accel.methods import DisCa
from accel.methods.disca.disca import select_full_steps
from accel.methods.disca.predictor import Predictor
from accel.ops.flow import euler
from accel.runtime.models import ModelDefaults
from accel.students.interval_embedding import IntervalEmbedder, pack_timestep
from accel.training.feature_probe import FeatureProbe, GuidedProbe
from accel.training.jobs import DistillJob, run_job
from accel.training.loop import fit
from accel.training.networks import velocity
from accel.training.optimizer import OptimConfig
from accel.training.predictor_job import PredictorJob
from accel.training.tasks.predictor_fit import PredictorConfig


def test_probing_a_student_changes_no_output_and_gives_its_last_feature(pipe):
    student, x, time = pipe.transformer, torch.randn(2, 4, 3, 4, 4), torch.tensor([700.0, 200.0])
    text = torch.randn(2, 6, 16)
    with torch.no_grad():
        original = velocity(student, x, time, text)
        probe = FeatureProbe(student)
        v, feature = probe.full_forward(x, time, text)
        u, same = probe.predicted_forward(lambda hidden, cached, *_: cached, feature, torch.zeros(2), x, time, text)
    assert torch.equal(v, original) and torch.allclose(u, v, atol=1e-2) and torch.equal(same, feature)
    assert probe.layers == [0, 1]


def test_an_untrained_residual_predictor_errs_by_the_change_of_the_feature(pipe):
    task = predictor_task(pipe)
    task.trajectories.index = torch.tensor([2, 3, 4, 1])  # the full steps are 0, 1 and 5
    task.cached.normal_()
    x, text, cached = task.trajectories.x.clone(), task.trajectories.text.clone(), task.cached.clone()
    time = task._interval()[2]
    with torch.no_grad():
        v, feature = task.student.full_forward(x, time, text)
        u, _ = task.student.predicted_forward(lambda hidden, cached, *_: cached, cached, task._gap(), x, time, text)
    loss, logs = task.loss(task.module, 0, 0)
    each = [((a - b).square().mean() / size).item() for a, b, size in zip(cached, feature, feature.flatten(1).var(1))]
    errors = [((a - b).square().mean() / b.square().mean()).item() for a, b in zip(u, v)]
    assert logs["feature"] == pytest.approx(sum(each[:3]) / 3, rel=1e-3)  # at a full step nothing is predicted
    assert logs["velocity"] == pytest.approx(sum(errors[:3]) / 3, rel=1e-3)
    assert loss.item() == pytest.approx(logs["velocity"] + 0.1 * logs["feature"], rel=1e-3)


def test_trajectories_that_are_all_at_full_steps_move_on_until_there_is_something_to_predict(pipe):
    task = predictor_task(pipe)
    assert (task.trajectories.index == 0).all()
    loss, logs = task.loss(task.module, 0, 0)
    assert (task.trajectories.index == 3).all()  # full forward passes at steps 0 and 1, r an iteration at 2
    assert loss.item() > 0 and logs["velocity"] > 0 and task.cached.abs().sum() > 0


def test_runs_in_training_are_those_at_inference():
    config = PredictorConfig(guidance=(2, 5))
    runs = [config.draw_run(random.Random(seed)) for seed in range(200)]
    assert {stride for stride, _ in runs} == {1, 2}
    assert {(stride, *full_steps) for stride, full_steps in runs} == {
        (stride, *(stride * step for step in select_full_steps(full, 20 // stride)))
        for stride, counts in ((1, range(7, 13)), (2, range(4, 7))) for full in counts
    }  # fmt: skip
    assert config.supported_runs == {20: 5, 10: 7}
    for given in ({"steps": 19}, {"full": (7, 20)}, {"steps": 4, "full": (2, 3)}):
        with pytest.raises(ValueError, match="leave nothing to predict"):
            PredictorConfig(guidance=(2, 5), **given)


def test_caches_are_refreshed_at_full_steps_only(pipe):
    task = predictor_task(pipe)
    task.trajectories.index = torch.tensor([2, 1, 3, 5])  # the full steps are 0, 1 and 5
    before = task.cached.normal_().clone()
    task.loss(task.module, 1, 0)
    assert [torch.equal(a, b) for a, b in zip(before, task.cached)] == [True, False, True, False]


def test_runs_of_both_lengths_are_trained_together(pipe):
    task = predictor_task(pipe, strides=(1, 2), trajectories=16)
    task.spread_timesteps()
    runs = [task.config.draw_run(rng) for rng in task.trajectories.rngs("run")]
    place, before = task.trajectories.index.clone(), task.cached.clone()
    strides = torch.tensor([stride for stride, _ in runs])
    assert set(strides.tolist()) == {1, 2} and (place % strides == 0).all()
    task.loss(task.module, 0, 0)
    assert (task.trajectories.index == (place + strides) % STEPS).all()
    unchanged = [torch.equal(a, b) for a, b in zip(before, task.cached)]
    assert unchanged == [p not in full_steps for p, (_, full_steps) in zip(place.tolist(), runs)]


def test_steps_of_a_shorter_run_are_twice_as_long(pipe):
    task = predictor_task(pipe, strides=(2,))  # three steps, the first and the last of them full
    task.trajectories.index[:] = 2
    x, text = task.trajectories.x.clone(), task.trajectories.text.clone()
    t, r, time, _ = task._interval()
    with torch.no_grad():
        u, _ = task.student.predicted_forward(task.module.predictor, task.cached, task._gap(), x, time, text)
    assert task.runs()[1].tolist() == 4 * [False]
    task.loss(task.module, 0, 0)
    assert (task.trajectories.index == 4).all() and task.runs()[1].all()
    torch.testing.assert_close(task.trajectories.x, euler(x, u, t.double(), r.double()), rtol=1e-3, atol=1e-3)


def test_between_full_steps_x_follows_the_prediction_and_the_reference_full_forward_passes(pipe):
    task = predictor_task(pipe)  # the full steps are 0, 1 and 5
    task.trajectories.index = torch.tensor([3, 3, 0, 0])
    task.cached.normal_()
    x, text, cached = task.trajectories.x.clone(), task.trajectories.text.clone(), task.cached.clone()
    t, r, time, _ = task._interval()
    with torch.no_grad():
        v, _ = task.student.full_forward(x, time, text)
        u, _ = task.student.predicted_forward(task.module.predictor, cached, task._gap(), x, time, text)
    task.loss(task.module, 0, 0)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(
        task.trajectories.x, euler(x, torch.cat([u[:2], v[2:]]), t.double(), r.double()), **close
    )
    torch.testing.assert_close(task.reference, euler(x, v, t.double(), r.double()), **close)
    assert not torch.equal(task.reference[:2], task.trajectories.x[:2])
    assert torch.equal(task.reference[2:], task.trajectories.x[2:])
    task.loss(task.module, 1, 0)
    assert torch.equal(task.reference, task.trajectories.x)  # two arrive at the last full step, two come from one


@pytest.mark.parametrize("short", [0.0, 0.1])
def test_the_target_leads_by_the_next_full_step_to_where_full_forward_passes_lead(short, pipe, monkeypatch):
    """A prediction that falls short of it by a fraction of the full pass has that fraction squared as its error."""
    task = predictor_task(pipe)  # the full steps are 0, 1 and 5
    task.trajectories.index[:] = 2
    t, end = task._interval()[0], task.context.sigmas[5].float().expand(4)
    task.trajectories.x = task.reference + 0.1 * torch.randn_like(task.reference)  # astray
    v, feature = task._full_forward()
    u = (euler(task.reference, v, t, end) - task.trajectories.x) / (end - t).view(-1, 1, 1, 1, 1) - short * v
    monkeypatch.setattr(task.student, "predicted_forward", lambda *_: (u, feature))
    task._loss(task.module, logs := {})
    assert logs["velocity"] == pytest.approx(short**2, abs=1e-5)


def test_spread_trajectories_have_the_feature_of_their_last_full_step_in_the_cache(pipe):
    stepped = predictor_task(pipe, trajectories=16)
    pool = stepped.trajectories
    for _ in (0, 1):  # both are full steps, the next one is the last step
        with torch.no_grad():
            v, feature = stepped.student.full_forward(pool.x, stepped._interval()[2], pool.text)
        pool.move(v, pool.index + 1)
    task = predictor_task(pipe, trajectories=16)
    task.spread_timesteps()
    place = task.trajectories.index
    assert len(place.unique()) > 3
    assert (task.cached.flatten(1).abs().sum(1) > 0).tolist() == (place > 0).tolist()
    torch.testing.assert_close(task.cached[place > 1], feature[place > 1])


def test_in_the_second_stage_predictor_and_discriminator_each_learn_from_their_own_loss(pipe):
    """The weight of the adversarial loss scales the predictor's gradient and not the discriminator's."""
    task = predictor_task(pipe, feature=0.0)
    task.stage = 1
    _, _, time, after = task._interval()
    x, text, known = task.trajectories.x, task.trajectories.text, torch.tensor([0.0, 1, 1, 1])
    task.cached.normal_()
    u, _ = task.student.predicted_forward(task.module.predictor, task.cached, task._gap(), x, time, text)
    grads = {}
    for weight in (0.0, 1e6):
        task.config = task.config.model_copy(update={"adversarial": weight})
        task.module.zero_grad()
        loss = task._adversarial_loss(task.module.discriminator, [x, u], after, text, known, logs := {})
        loss.backward(retain_graph=True)
        grads[weight] = {name: 0.0 if p.grad is None else p.grad.abs().sum().item()
                          for name, p in task.module.named_parameters()}  # fmt: skip
    head = next(name for name in grads[0.0] if name.startswith("discriminator") and grads[0.0][name])
    assert grads[0.0]["predictor.out.weight"] == 0 and grads[1e6]["predictor.out.weight"] > 0
    assert grads[1e6][head] == pytest.approx(
        grads[0.0][head], rel=0.01
    )  # each call updates the estimated spectral norms
    assert set(logs) == {"generator_loss", "discriminator_accuracy"}
    assert all(p.grad is None for p in task.student.transformer.parameters())
    assert all(p.requires_grad for p in task.module.parameters())


def test_a_stored_predictor_predicts_as_the_trained_one(pipe, tmp_path):
    task = predictor_task(pipe)
    torch.nn.init.normal_(task.module.predictor.out.weight)
    task.save(tmp_path)
    again = Predictor(Wan(), random_wan(), "residual", 1)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x, text, time, gap = task.trajectories.x, task.trajectories.text, task._interval()[2], task._gap()
    task.cached.normal_()
    with torch.no_grad():
        velocities = [
            task.student.predicted_forward(p, task.cached, gap, x, time, text)[0]
            for p in (task.module.predictor, again)
        ]
    torch.testing.assert_close(*velocities, rtol=3e-2, atol=3e-2)  # half precision
    assert not torch.allclose(
        velocities[0], task.student.predicted_forward(lambda _, c, *__: c, task.cached, gap, x, time, text)[0]
    )


@pytest.mark.parametrize("stage", [0, 1])
def test_a_resumed_stage_ends_with_the_weights_of_an_unbroken_one(stage, tmp_path):
    unbroken, first, second = tasks = [predictor_task(build_pipe()) for _ in range(3)]
    for task in tasks:
        task.stage = stage
        task.trajectories.index[:] = 2  # so that steps 2 to 4 need no full forward pass
        task.cached.copy_(torch.randn(task.cached.shape, generator=torch.Generator().manual_seed(5)))
    fit(unbroken, tmp_path / "unbroken", minutes=None, resume=False)
    assert fit(first, tmp_path / "parts", minutes=0, resume=False)["step"] == 1
    fit(second, tmp_path / "parts", minutes=None, resume=True)
    assert torch.equal(second.trajectories.x, unbroken.trajectories.x) and torch.equal(second.cached, unbroken.cached)
    for one, two in zip(unbroken.module.parameters(), second.module.parameters()):
        assert torch.equal(one, two)


def test_the_second_stage_is_shorter_with_lower_rates():
    optim, config = OptimConfig(steps=90, lr=1e-3, matrix_lr=2e-3), PredictorConfig(guidance=None)
    first, second = PredictorJob().optim_configs(optim, config)
    assert (first.steps, second.steps, second.lr, second.matrix_lr) == (90, 30, 5e-4, 1e-3)
    alone = config.model_copy(update={"adversarial": 0})
    assert PredictorJob().optim_configs(optim, alone) == [first]


@pytest.fixture
def toy_job(pipe, tmp_path, monkeypatch) -> DistillJob:
    """A job whose model is the small pipeline in place of the shipped one, in a folder without students."""
    defaults = ModelDefaults(height=32, width=32, frames=5, steps=4, guidance=3.0, text_length=6)
    timed(pipe)
    monkeypatch.setattr("accel.training.jobs.load_pipeline", lambda *_: pipe)
    monkeypatch.setattr("accel.training.jobs.model_defaults", lambda *_: defaults)
    monkeypatch.setattr(DistillJob, "model_dir", lambda self: tmp_path)
    monkeypatch.setattr("accel.training.jobs.TOY_VALIDATION_PROMPTS", 1)
    monkeypatch.setattr("accel.training.predictor_job.optimize_blocks", lambda blocks, device: None)
    return DistillJob(ablation="paper")


def test_without_a_student_no_predictor_is_trained(toy_job, tmp_path):
    with pytest.raises(ValueError, match="the student comes first: python -m accel train meanflow"):
        run_job(PredictorJob(), OptimConfig(steps=1, lr=1e-3), toy_job, "cpu", None, False, tmp_path / "out")


def test_a_trained_predictor_is_stored_in_the_models_folder_by_its_form(toy_job, pipe, tmp_path):
    make_meanflow(pipe, tmp_path / "meanflow", (2.0, 5.0))
    file = tmp_path / "meanflow" / "meanflow.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher_guidance": 3.0}))
    optim = OptimConfig(steps=3, lr=1e-3, warmup=1)
    done = run_job(PredictorJob(), optim, toy_job, "cpu", None, False, tmp_path / "out")
    assert done["finished"] and list(done["stages"]) == ["regression", "adversarial"]
    facts = json.loads((tmp_path / "predictor" / "paper" / "predictor.json").read_text())
    assert facts["form"] == "paper" and list(facts["stages"]) == ["regression", "adversarial"]
    assert (tmp_path / "out" / "regression-only" / "predictor.json").is_file()
    assert not isinstance(pipe.transformer.condition_embedder, IntervalEmbedder)


def test_the_student_is_given_both_ends_of_its_step_and_the_guidance(pipe):
    task = predictor_task(pipe)
    task.trajectories.index = torch.tensor([0, 1, 2, 3])
    t, r, time, after = task._interval()
    w = time[8:] / 1000
    assert torch.equal(time, pack_timestep(t, r, w)) and torch.equal(after, pack_timestep(r, r, w))
    assert ((w >= 2) & (w <= 5)).all()


def test_the_gap_is_how_much_sigma_has_fallen_since_the_last_full_step(pipe):
    task = predictor_task(pipe)  # the full steps are 0, 1 and 5
    task.trajectories.index = torch.tensor([0, 1, 3, 4])
    sigmas = task.context.sigmas
    assert task._gap().tolist() == pytest.approx([0, 0, sigmas[1] - sigmas[3], sigmas[1] - sigmas[4]])


@torch.no_grad()
def test_a_guided_probe_combines_two_branches_and_keeps_the_features_of_both(pipe):
    x, time, text, empty = (
        torch.randn(2, 4, 3, 4, 4),
        torch.tensor([700.0, 200.0]),
        torch.randn(2, 6, 16),
        torch.zeros(1, 6, 16),
    )
    cond, uncond = (velocity(pipe.transformer, x, time, words) for words in (text, empty.expand(2, -1, -1)))
    probe = GuidedProbe(FeatureProbe(pipe.transformer), empty, 4.0)
    v, feature = probe.full_forward(x, time, text)
    close = {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(v, uncond + 4 * (cond - uncond), **close)
    assert feature.shape == (2, 2 * 12, 24)
    u, same = probe.predicted_forward(lambda hidden, cached, *_: cached, feature, torch.zeros(2), x, time, text)
    assert torch.equal(same, feature)
    torch.testing.assert_close(u, v, **close)


def test_a_predictor_of_the_base_model_itself_is_trained_and_runs(toy_job, pipe, sample, tmp_path, monkeypatch):
    runs = {"steps": 6, "strides": (1,), "full": (3, 3), "guidance": None, "adversarial": 0}
    monkeypatch.setattr("accel.training.predictor_job.GUIDED_RUNS", runs)
    optim, job = OptimConfig(steps=3, lr=1e-3, warmup=1), replace(toy_job, ablation="guided-base")
    assert run_job(PredictorJob(), optim, job, "cpu", None, False, tmp_path / "out")["finished"]
    facts = json.loads((tmp_path / "predictor" / "guided-base" / "predictor.json").read_text())
    assert facts["depth"] == 2 and facts["config"]["supported_runs"] == {"6": 4}
    assert list(facts["stages"]) == ["regression"]
    del pipe.encode_prompt  # the stand-in of the training
    pipe.register_to_config(_name_or_path=str(tmp_path))
    with accel.apply(pipe, DisCa(predictor="guided-base", num_full_steps=3)) as trace:
        assert sample(pipe, steps=6).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 6, "predict": 6}
    assert len(trace.messages) == 1 and "3 of 6 forward passes are full" in trace.messages[0]
