"""Which distillation: rivals of equal compute, large models by adapters, several processes, and orders refused."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file
from support import build_pipe
from transformers import UMT5Config, UMT5EncoderModel

import accel
from accel.evaluation import bench
from accel.families.wan import Wan
from accel.methods import DisCa, MeanFlow
from accel.methods.disca.predictor import Predictor
from accel.methods.gpd import GPD
from accel.students.interval_embedding import INTERVAL_EMBEDDER, IntervalEmbedder, pack_timestep, with_interval_embedder
from accel.students.loading import load_student
from accel.students.weights import NAME
from accel.training import OPTIM_CONFIGS, train_parts
from accel.training.feature_probe import FeatureProbe
from accel.training.gpd_job import ABLATIONS, _stage_config, cost, masked, stage_recipes
from accel.training.lora_networks import LoRANetworks
from accel.training.networks import FullNetworks, guided, velocity
from accel.training.optim import OptimConfig
from accel.training.rollouts import MeanFlowContext, RolloutContext
from accel.training.stages import store
from accel.training.tasks.gpd_distillation import GpdConfig, GpdTask
from accel.training.tasks.meanflow_distillation import MeanFlowConfig, MeanFlowTask
from accel.training.tasks.predictor_fit import PredictorConfig, PredictorTask


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_rival_costs_as_many_forward_passes_as_gpd(ablation):
    def spent(config):
        optims = stage_recipes(OptimConfig(steps=110, lr=1e-3), config)
        return sum(r.steps * cost(config, k) for r, k in zip(optims, config.horizons, strict=True))

    assert spent(GpdConfig(**ABLATIONS[ablation](4.0))) == pytest.approx(spent(GpdConfig()), rel=0.01)


def test_the_bench_knows_the_rivals_that_can_be_trained():
    assert {"gpd", *(name for names in bench.ABLATIONS.values() for name in names)} == set(ABLATIONS)


@pytest.mark.parametrize(("ablation", "shared"), [("no-constraint", 7), ("halving", 1), ("annealed", 0), ("direct", 0),
                                             ("guidance-only", 0)])  # fmt: skip
def test_a_rival_shares_the_stages_that_it_would_train_alike(ablation, shared):
    def order(ablation):
        config = GpdConfig(**ABLATIONS[ablation](4.0))
        optims = [optim.model_dump() for optim in stage_recipes(OptimConfig(steps=110, lr=1e-3), config)]
        return {"base_fingerprint": [0.5], "config": config.model_dump(mode="json"), "optims": optims}

    stages = range(len(order(ablation)["config"]["horizons"]))
    alike = [_stage_config(order(ablation), stage) == _stage_config(order("gpd"), stage) for stage in stages]
    assert alike == [stage < shared for stage in stages]


def test_the_cost_of_an_iteration_does_not_grow_with_the_horizon_but_directly_it_does():
    assert [cost(GpdConfig(), k) for k in (1, 2, 8)] == [5, 6, 6]
    assert [cost(GpdConfig(target_scheme="direct"), k) for k in (1, 8)] == [5, 19]


@pytest.fixture
def large(tmp_path) -> Path:
    """A pipeline folder that is not of the toy world, with a file of prompts beside it."""
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = build_pipe()
    pipe.register_modules(text_encoder=UMT5EncoderModel(text))
    folder = tmp_path / "large"
    pipe.save_pretrained(folder)
    defaults = {"height": 64, "width": 64, "frames": 5, "steps": 20, "guidance": 3.0, "text_length": 8}
    (folder / "accel.json").write_text(json.dumps(defaults))
    (tmp_path / "prompts.txt").write_text("a red star\na blue disc\na green ring\na cyan cross\n")
    return folder


def test_a_large_model_is_distilled_by_adapters_and_its_student_runs(large, tmp_path, monkeypatch, sample):
    monkeypatch.setitem(OPTIM_CONFIGS["others"], "gpd", {**OPTIM_CONFIGS["others"]["gpd"], "steps": 1, "lr": 1e-2})
    done = train_parts("gpd", None, False, tmp_path / "out", model=str(large), prompts=tmp_path / "prompts.txt", rank=2)
    assert list(done["gpd"]["stages"]) == [f"k{k}" for k in range(1, 9)]
    pipe = accel.load_pipeline(str(large))
    facts = json.loads((large / "gpd-N6" / "gpd.json").read_text())
    pipe.scheduler.set_timesteps(6)  # the model's own grid of as many steps
    assert facts["timesteps"] == pipe.scheduler.timesteps.tolist() and facts["shift"] == 3.0
    assert facts["sigmas"] == pytest.approx(pipe.scheduler.sigmas.tolist(), abs=1e-6)
    plain, before = sample(pipe), {name: sorted(vars(m)) for name, m in pipe.transformer.named_modules()}
    with accel.apply(pipe, [GPD(steps=6)]) as trace:
        assert sample(pipe, steps=6, guidance=1.0).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 6}
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    with accel.apply(pipe, [GPD(steps=6)]):
        with pytest.raises(ValueError, match="leave adapters and their scale alone"):
            sample(pipe, steps=6, guidance=1.0, attention={"scale": 0.5})
        pipe.transformer.disable_adapters()
        with pytest.raises(ValueError, match="leave adapters and their scale alone"):
            sample(pipe, steps=6, guidance=1.0)
    assert {name: sorted(vars(m)) for name, m in pipe.transformer.named_modules()} == before
    assert torch.equal(sample(pipe), plain)


def test_a_large_model_learns_mean_velocities_and_a_predictor_and_both_run(large, tmp_path, monkeypatch, sample):
    given = dict(model=str(large), prompts=tmp_path / "prompts.txt")
    for what, steps in (("meanflow", 1), ("predictor", 3)):
        monkeypatch.setitem(
            OPTIM_CONFIGS["others"], what, {**OPTIM_CONFIGS["others"][what], "steps": steps, "lr": 1e-2}
        )
    train_parts("meanflow", None, False, tmp_path / "out", rank=2, **given)
    train_parts("predictor", None, False, tmp_path / "out", **given)
    assert sorted(p.name for p in (large / "meanflow").iterdir()) == [
        "meanflow.json", "pytorch_lora_weights.safetensors", "told.safetensors",
    ]  # fmt: skip
    pipe = accel.load_pipeline(str(large))
    plain, before = sample(pipe), {name: sorted(vars(m)) for name, m in pipe.transformer.named_modules()}
    with accel.apply(pipe, [MeanFlow(steps=5, guidance=3), DisCa(num_full_steps=3)]) as trace:
        assert sample(pipe, steps=5, guidance=1.0).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 3, "predict": 2}
    assert {name: sorted(vars(m)) for name, m in pipe.transformer.named_modules()} == before
    assert torch.equal(sample(pipe), plain)


def test_full_weights_of_a_large_model_learn_too(large, tmp_path, monkeypatch, sample):
    monkeypatch.setitem(
        OPTIM_CONFIGS["others"], "meanflow", {**OPTIM_CONFIGS["others"]["meanflow"], "steps": 1, "lr": 1e-2}
    )
    given = dict(model=str(large), prompts=tmp_path / "prompts.txt", rank=0)
    train_parts("meanflow", None, False, tmp_path / "out", **given)
    assert (large / "meanflow" / "model.safetensors").is_file()
    pipe = accel.load_pipeline(str(large))
    plain = sample(pipe, steps=5)
    with accel.apply(pipe, [MeanFlow(steps=5, guidance=3)]):
        assert sample(pipe, steps=5, guidance=1.0).isfinite().all()
    assert torch.equal(sample(pipe, steps=5), plain)


def wan_1_3b() -> WanTransformer3DModel:
    """Random weights in the 1.3B layout, cut to two blocks, in half precision."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2)
    return model.to(torch.bfloat16)


def plain_ground(words, levels) -> RolloutContext:
    """One prompt's embeddings (1, n, d), and levels, for latents of that layout."""
    encode = lambda texts: words.expand(len(texts), -1, -1)
    return RolloutContext(encode, lambda rng: "a", levels, 1000 * levels[:-1], (16, 2, 4, 4))


def test_the_wan_1_3b_layout_learns_mean_velocities_by_adapters():
    model = wan_1_3b()
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    x, words, levels = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 4096), torch.tensor([1.0, 0.5, 0.0]).double()
    nets = LoRANetworks(model, rank=4)
    context = MeanFlowContext(**vars(plain_ground(words, levels)), guidance=3.0)
    config = MeanFlowConfig(
        base_steps=2, steps=(2, 1), guidance=(2, 5), max_interval=0.5, equal=0, trajectories=1, max_stride=1, warm=1
    )
    task = MeanFlowTask(OptimConfig(steps=2, lr=1e-3), config, nets, context)
    told = pack_timestep(torch.tensor([0.7]), torch.tensor([0.7]), torch.tensor([3.0]))
    for stage in (0, 1):
        task.stage = stage
        loss, logs = task.loss(nets.module, 0, 0)
        loss.backward()
        assert loss.isfinite() and (stage == 0 or logs["correction"] > 0)
    learnt = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert learnt and all(".current." in name or ".scalars." in name for name in learnt)
    assert any("time_embedder.linear_1.lora_B" in name for name in learnt)
    before = nets.previous(x, told, words)
    with torch.no_grad():
        model.condition_embedder.scalars["end"].mlp.linear_2.weight.add_(0.1)
    assert torch.equal(nets.previous(x, told, words), before)
    assert not torch.equal(velocity(model, x, told, words), before)


def test_a_predictor_for_the_wan_1_3b_layout_learns_while_the_student_stays_frozen_in_half_precision():
    model = wan_1_3b()
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    words, levels = torch.randn(1, 6, 4096), torch.linspace(1, 0, 5).double()
    context = MeanFlowContext(**vars(plain_ground(words, levels)), guidance=3.0)
    config = PredictorConfig(steps=4, guidance=(2, 5), trajectories=1, full=(2, 3), strides=(1,))
    predictor = Predictor(Wan(), model, "residual", 1)
    learn = PredictorTask(
        OptimConfig(steps=2, lr=1e-3), config, FeatureProbe(model, spare=True), predictor, context, (2, 2, 2)
    )
    learn.stage, learn.trajectories.index[:] = 1, 2
    learn.cached.normal_()
    loss, logs = learn.loss(learn.module, 0, 0)
    loss.backward()
    assert loss.isfinite() and logs["velocity"] > 0
    assert predictor.out.weight.grad.any() and all(p.grad is None for p in model.parameters())
    assert {p.dtype for p in predictor.parameters()} == {torch.float32} and not learn.cached.isnan().any()


def test_a_training_is_resumed_with_the_prompts_that_it_began_with(large, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIM_CONFIGS["others"], "gpd", {**OPTIM_CONFIGS["others"]["gpd"], "steps": 1})
    given = dict(model=str(large), prompts=tmp_path / "prompts.txt", rank=2)
    train_parts("gpd", 1e-9, False, tmp_path / "out", **given)
    (tmp_path / "prompts.txt").write_text("a red ring\na blue disc\na green ring\na cyan cross\n")
    with pytest.raises(ValueError, match="holds another training"):
        train_parts("gpd", 1e-9, True, tmp_path / "out", **given)


def test_full_weights_are_refused_where_a_lora_is_on(pipe, tmp_path):
    store(FullNetworks(pipe.transformer), tmp_path, "gpd.json", {})
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match="unload the LoRA first"):
        load_student(tmp_path, pipe.transformer)


def test_the_shipped_models_students_are_made_as_recorded_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="leave --slots out"):
        train_parts("gpd", 0, False, tmp_path, trajectories=8)


def test_a_student_leaves_the_users_own_adapter_on(large, tmp_path, monkeypatch, sample):
    monkeypatch.setitem(OPTIM_CONFIGS["others"], "gpd", {**OPTIM_CONFIGS["others"]["gpd"], "steps": 1, "lr": 1e-2})
    train_parts("gpd", None, False, tmp_path / "out", model=str(large), prompts=tmp_path / "prompts.txt", rank=2)
    pipe = accel.load_pipeline(str(large))
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    names = list(pipe.transformer.state_dict())
    styled = sample(pipe)
    with accel.apply(pipe, [GPD(steps=6)]):
        assert pipe.transformer.active_adapters() == ["style", NAME]
    assert pipe.transformer.active_adapters() == ["style"] and torch.equal(sample(pipe), styled)
    pipe.transformer.disable_adapters()
    plain = sample(pipe)
    with accel.apply(pipe, [GPD(steps=6)]):
        assert pipe.transformer.active_adapters() == [NAME]
    assert torch.equal(sample(pipe), plain) and not torch.equal(plain, styled)
    assert list(pipe.transformer.state_dict()) == names


def test_adapters_of_the_wan_1_3b_layout_learn_alone_in_float32():
    model = wan_1_3b()
    x, t, words = torch.randn(1, 16, 2, 4, 4), torch.tensor([700]), torch.randn(1, 6, 4096)
    base = guided(model, x, t, words, 0 * words, 3.0)
    nets = LoRANetworks(model, rank=4)
    levels = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    context = plain_ground(words, levels)
    task = GpdTask(OptimConfig(steps=2, lr=1e-3), GpdConfig(base_steps=2, trajectories=1, horizons=(2,)), nets, context)
    loss, _ = task.loss(nets.module, 0, 0)
    loss.backward()
    learnt = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert learnt and all(".current." in name and p.dtype == torch.float32 for name, p in learnt.items())
    assert all(p.requires_grad == (".current." in name) for name, p in model.named_parameters())
    with torch.no_grad():
        for p in learnt.values():
            p.add_(0.01)
    v = velocity(model, x, t, words)
    assert torch.equal(nets.teacher(x, t, words, 0 * words, 3.0), base)
    assert (nets.previous(x, t, words) - v).abs().max() > 0.1
    nets.next_stage()
    assert torch.equal(nets.previous(x, t, words), v) and torch.equal(velocity(model, x, t, words), v)


def test_the_mask_of_the_constraint_is_spelled_out():
    assert masked((28, 5, 4, 4)) == "temporal frequencies ..##., spatial ones .## ### ### ###"


def test_a_model_of_two_transformers_is_refused(two_models, monkeypatch, tmp_path):
    monkeypatch.setattr("accel.training.jobs.load_pipeline", lambda *_: two_models)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="with one transformer can be distilled: Wan 2.1, not 2.2"):
        train_parts("gpd", None, False, tmp_path / "out", model="other/model", prompts=tmp_path / "prompts.txt")


@pytest.mark.parametrize("interval", [False, True])
def test_a_stored_adapter_goes_the_way_of_the_trained_one(interval, tmp_path):
    model = build_pipe().transformer
    if interval:
        model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    nets, t = LoRANetworks(model, 2), torch.tensor([500.0])
    x, words = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 6, 16)
    for name, weight in model.named_parameters():
        if "current" in name or "scalars" in name:
            torch.nn.init.normal_(weight, std=0.1)
    time = pack_timestep(t / 1000, t / 2000, torch.tensor([3.0])) if interval else t
    store(nets, tmp_path, "gpd.json", {})
    fresh = build_pipe().transformer
    with torch.no_grad(), load_student(tmp_path, fresh):
        told = with_interval_embedder(fresh, load_file(tmp_path / INTERVAL_EMBEDDER)) if interval else nullcontext()
        with told:
            torch.testing.assert_close(velocity(fresh, x, time, words), velocity(model, x, time, words))
        assert not torch.allclose(velocity(fresh, x, t, words), velocity(build_pipe().transformer, x, t, words))


def test_orders_that_cannot_be_are_refused_with_the_reason(large, tmp_path):
    for asked, reason in (
        (dict(ablation="quartering"), "unknown arm 'quartering'; there are gpd, no-constraint"),
        (dict(model=str(large)), "this model needs prompts to train on: give --prompts FILE"),
        (dict(model=str(large), prompts=tmp_path / "none.txt"), "give --prompts FILE"),
    ):
        with pytest.raises(ValueError, match=reason):
            train_parts("gpd", None, False, tmp_path / "out", **asked)
    with pytest.raises(ValueError, match="--rank is for gpd, meanflow, predictor alone, not for base"):
        train_parts("base", None, False, tmp_path / "out", rank=4)
    with pytest.raises(ValueError, match="its students are whole: leave --rank out"):
        train_parts("gpd", None, False, tmp_path / "out", rank=4)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="has 2 prompts: 3 are needed, 2 of them to look at"):
        train_parts("gpd", None, False, tmp_path / "out", model=str(large), prompts=tmp_path / "prompts.txt")


def launch(worker: str, n: int, folder: Path) -> None:
    """Run a worker of this folder in n processes that know of each other, by gloo."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    path = os.pathsep.join(
        [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    given = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = [str(Path(__file__).parent / worker), str(folder), str(n)]
    done = subprocess.run([*start, *script], env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_processes_of_mean_flow_and_of_a_predictor_stay_together(tmp_path):
    launch("predictor_worker.py", 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=True) for i in range(2))
    for name in ("mean", "predictor"):
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True))


def test_two_processes_learn_what_one_learns(tmp_path):
    def run(n: int) -> tuple[float, dict]:
        folder = tmp_path / str(n)
        launch("gpd_worker.py", n, folder)
        line = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
        return line["loss"], torch.load(folder / "state.pt", weights_only=True)

    (one, whole), (two, parts) = run(1), run(2)
    assert one == pytest.approx(two, rel=0.01)  # after 20 iterations in bfloat16
    assert torch.equal(whole["task"]["index"], parts["task"]["index"])
    for name, weight in whole["module"].items():
        torch.testing.assert_close(parts["module"][name], weight, rtol=0.02, atol=2e-3)
