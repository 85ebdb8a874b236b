"""Distillation jobs: ablations of equal compute, large models with LoRA, two processes, and jobs that are refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file
from support import build_pipe
from transformers import UMT5Config, UMT5EncoderModel

import accel
from accel.evaluation.suites import SUITES
from accel.families.wan import Wan
from accel.methods import DisCa, MeanFlow
from accel.methods.disca.predictor import Predictor
from accel.methods.gpd import GPD
from accel.runtime.models import TINY, model_defaults
from accel.students.interval_embedding import INTERVAL_EMBEDDER, IntervalEmbedder, pack_timestep, with_interval_embedder
from accel.students.loading import load_student
from accel.students.weights import NAME
from accel.training.feature_probe import FeatureProbe
from accel.training.gpd_job import GpdJob, describe_high_frequencies, iteration_cost
from accel.training.jobs import DistillJob, LoadedJob, goes_on
from accel.training.lora_networks import LoRANetworks
from accel.training.networks import FullNetworks, guided, velocity
from accel.training.optimizer import OptimConfig
from accel.training.parts import train_parts
from accel.training.rollouts import MeanFlowContext, RolloutContext
from accel.training.settings import OPTIM_CONFIGS
from accel.training.stages import store
from accel.training.tasks.gpd_distillation import GpdConfig, GpdTask
from accel.training.tasks.meanflow_distillation import MeanFlowConfig, MeanFlowTask
from accel.training.tasks.predictor_fit import PredictorConfig, PredictorTask


@pytest.mark.parametrize("ablation", GpdJob.ablations)
def test_every_ablation_costs_as_many_forward_passes_as_gpd(ablation):
    def spent(config):
        optims = GpdJob().optim_configs(OptimConfig(steps=110, lr=1e-3), config)
        return sum(r.steps * iteration_cost(config, k) for r, k in zip(optims, config.horizons, strict=True))

    assert spent(GpdConfig(**GpdJob.ablations[ablation](4.0))) == pytest.approx(spent(GpdConfig()), rel=0.01)


def test_the_bench_has_every_ablation_that_can_be_trained():
    rows = {name for suite in ("gpd-ablations", "gpd-guidance") for name in SUITES[suite].settings}
    assert rows - {"baseline, 48 steps"} == set(GpdJob.ablations)


def test_a_first_student_is_trained_on_from_its_difference(tiny_wan, tmp_path):
    (tmp_path / "accel.json").write_text('{"toy_world": true}')
    base, job = tiny_wan.transformer, DistillJob(model=str(tmp_path))
    loaded = LoadedJob(job, tiny_wan, model_defaults(tiny_wan, TINY), [], "cpu", tmp_path, goes_on=True)
    nets = FullNetworks(base)
    nets.module.proj_out.bias.data += 0.1
    (folder := tmp_path / "gpd-N48").mkdir()
    nets.save(folder)
    with GpdJob().build(loaded, OptimConfig(steps=1, lr=1e-3)) as (task, origin):
        bias = dict(task.module.named_parameters())["proj_out.bias"]
        torch.testing.assert_close(bias, base.proj_out.bias + 0.1, atol=1e-3, rtol=0)
        assert origin["init_from"] == "gpd-N48"


def test_only_a_job_that_is_resumed_without_having_begun_goes_on_from_the_models_student(tmp_path):
    (model := tmp_path / "model").mkdir()
    (model / "accel.json").write_text('{"toy_world": true}')
    job, out = DistillJob(model=str(model)), tmp_path / "out"
    assert not goes_on(job, True, out)  # there is no student
    (model / "gpd-N48").mkdir()
    assert goes_on(job, True, out) and not goes_on(job, False, out)
    assert not goes_on(replace(job, ablation="direct"), True, out)
    out.mkdir()
    (out / "job.json").write_text('{"init_from": "gpd-N48"}')
    assert goes_on(job, True, out) and not goes_on(job, False, out)
    (out / "job.json").write_text("{}")  # begun from the base model, and by now it has a student
    assert not goes_on(job, True, out)


@pytest.mark.parametrize(("ablation", "shared"), [("no-constraint", 7), ("halving", 1), ("annealed", 0), ("direct", 0),
                                             ("guidance-only", 0)])  # fmt: skip
def test_an_ablation_shares_the_stages_that_it_would_train_alike(ablation, shared):
    def record(ablation):
        config = GpdConfig(**GpdJob.ablations[ablation](4.0))
        optims = [optim.model_dump() for optim in GpdJob().optim_configs(OptimConfig(steps=110, lr=1e-3), config)]
        return {"base_fingerprint": [0.5], "config": config.model_dump(mode="json"), "optims": optims}

    stage_config = GpdJob().stage_config
    stages = range(len(record(ablation)["config"]["horizons"]))
    alike = [stage_config(record(ablation), stage) == stage_config(record("gpd"), stage) for stage in stages]
    assert alike == [stage < shared for stage in stages]


def test_the_cost_of_an_iteration_grows_with_the_horizon_for_direct_targets_only():
    assert [iteration_cost(GpdConfig(), k) for k in (1, 2, 8)] == [5, 6, 6]
    assert [iteration_cost(GpdConfig(target_scheme="direct"), k) for k in (1, 8)] == [5, 19]


@pytest.fixture(scope="module")
def large_template(tmp_path_factory) -> Path:
    """A pipeline folder that is not of the toy world, with a file of prompts beside it."""
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = build_pipe()
    pipe.register_modules(text_encoder=UMT5EncoderModel(text))
    folder = tmp_path_factory.mktemp("template") / "large"
    pipe.save_pretrained(folder)
    defaults = {"height": 32, "width": 32, "frames": 5, "steps": 20, "guidance": 3.0, "text_length": 8}
    (folder / "accel.json").write_text(json.dumps(defaults))
    (folder.parent / "prompts.txt").write_text("a red star\na blue disc\na green ring\na cyan cross\n")
    return folder


@pytest.fixture
def large(large_template, tmp_path) -> Path:
    """A copy of the pipeline folder and its prompts."""
    shutil.copytree(large_template.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "large"


def train(what: str, model: Path, minutes=None, resume=False, **job) -> dict:
    """Train a student of a large model, with one iteration in most stages."""
    with pytest.MonkeyPatch.context() as patch:
        steps = {"gpd": 1, "meanflow": 1, "predictor": 3}[what]
        config = {**OPTIM_CONFIGS["others"][what], "steps": steps, "lr": 1e-2}
        patch.setitem(OPTIM_CONFIGS["others"], what, config)
        patch.setattr("accel.training.gpd_job.FIRST_STAGE_FACTOR", 1)
        job = {"model": str(model), "prompts": model.parent / "prompts.txt"} | job
        return train_parts(what, minutes, resume, model.parent / "out", **job)


@pytest.fixture(scope="module")
def distilled(large_template, tmp_path_factory) -> Path:
    """The folder of a large model with its GPD students, which are LoRA adapters."""
    folder = tmp_path_factory.mktemp("distilled")
    shutil.copytree(large_template.parent, folder, dirs_exist_ok=True)
    done = train("gpd", folder / "large", rank=2)
    assert list(done["gpd"]["stages"]) == [f"k{k}" for k in range(1, 9)]
    return folder / "large"


def attributes(model: torch.nn.Module) -> dict[str, list[str]]:
    """The names of all attributes of a model's modules."""
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


def test_a_large_model_is_distilled_into_lora_students_that_run(distilled, sample):
    pipe = accel.load_pipeline(str(distilled))
    facts = json.loads((distilled / "gpd-N6" / "gpd.json").read_text())
    pipe.scheduler.set_timesteps(6)  # the model's own schedule of as many steps
    assert facts["timesteps"] == pipe.scheduler.timesteps.tolist() and facts["shift"] == 3.0
    assert facts["sigmas"] == pytest.approx(pipe.scheduler.sigmas.tolist(), abs=1e-6)
    baseline, before = sample(pipe), attributes(pipe.transformer)
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
    assert attributes(pipe.transformer) == before
    assert torch.equal(sample(pipe), baseline)


def test_a_student_leaves_the_users_own_lora_on(distilled, sample):
    pipe = accel.load_pipeline(str(distilled))
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    names = list(pipe.transformer.state_dict())
    styled = sample(pipe, steps=5)
    with accel.apply(pipe, [GPD(steps=6)]):
        assert pipe.transformer.active_adapters() == ["style", NAME]
    assert pipe.transformer.active_adapters() == ["style"] and torch.equal(sample(pipe, steps=5), styled)
    pipe.transformer.disable_adapters()
    baseline = sample(pipe, steps=5)
    with accel.apply(pipe, [GPD(steps=6)]):
        assert pipe.transformer.active_adapters() == [NAME]
    assert torch.equal(sample(pipe, steps=5), baseline) and not torch.equal(baseline, styled)
    assert list(pipe.transformer.state_dict()) == names


@pytest.mark.slow
def test_a_large_model_is_distilled_into_meanflow_with_a_predictor_and_both_run(large, sample):
    train("meanflow", large, rank=2)
    train("predictor", large)
    assert sorted(p.name for p in (large / "meanflow").iterdir()) == [
        "interval_embedder.safetensors", "meanflow.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    config = json.loads((large / "meanflow" / "meanflow.json").read_text())["config"]
    assert config["warm"] == 1  # a third of the steps, so that a short stage sees the whole correction
    pipe = accel.load_pipeline(str(large))
    baseline, before = sample(pipe), attributes(pipe.transformer)
    with accel.apply(pipe, [MeanFlow(steps=5, guidance=3), DisCa(num_full_steps=3)]) as trace:
        assert sample(pipe, steps=5, guidance=1.0).isfinite().all()
    assert trace.summary()["calls"] == {"compute": 3, "predict": 2}
    assert attributes(pipe.transformer) == before
    assert torch.equal(sample(pipe), baseline)


@pytest.mark.slow
def test_all_weights_of_a_large_model_can_be_trained(large, sample):
    train("meanflow", large, rank=0)
    assert (large / "meanflow" / "model.safetensors").is_file()
    pipe = accel.load_pipeline(str(large))
    baseline = sample(pipe, steps=5)
    with accel.apply(pipe, [MeanFlow(steps=5, guidance=3)]):
        assert sample(pipe, steps=5, guidance=1.0).isfinite().all()
    assert torch.equal(sample(pipe, steps=5), baseline)


def test_a_job_is_resumed_with_the_prompts_that_it_began_with(large):
    train("gpd", large, minutes=1e-9, rank=2)
    (large.parent / "prompts.txt").write_text("a red ring\na blue disc\na green ring\na cyan cross\n")
    with pytest.raises(ValueError, match="holds another job"):
        train("gpd", large, minutes=1e-9, resume=True, rank=2)


def half_precision_wan() -> WanTransformer3DModel:
    """Random weights in half precision with the layout of Wan 2.1, but one block and narrow."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, text_dim=32, ffn_dim=64, num_layers=1, in_channels=16
    )
    return model.to(torch.bfloat16)


def constant_prompt_context(text: torch.Tensor, sigmas: torch.Tensor) -> RolloutContext:
    """A context with one prompt's embeddings (1, n, d), for latents of that layout."""
    encode = lambda texts: text.expand(len(texts), -1, -1)
    return RolloutContext(encode, lambda rng: "a", sigmas, 1000 * sigmas[:-1], (16, 2, 4, 4))


def test_lora_learns_mean_velocities_of_a_half_precision_model():
    model = half_precision_wan()
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    x, text, sigmas = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 6, 32), torch.tensor([1.0, 0.5, 0.0]).double()
    nets = LoRANetworks(model, rank=4)
    context = MeanFlowContext(**vars(constant_prompt_context(text, sigmas)), guidance=3.0)
    config = MeanFlowConfig(
        base_steps=2, steps=(2, 1), guidance=(2, 5), max_interval=0.5, zero_interval_fraction=0, trajectories=1,
        max_stride=1, warm=1,
    )  # fmt: skip
    task = MeanFlowTask(OptimConfig(steps=2, lr=1e-3), config, nets, context)
    timestep = pack_timestep(torch.tensor([0.7]), torch.tensor([0.7]), torch.tensor([3.0]))
    for stage in (0, 1):
        task.stage = stage
        loss, logs = task.loss(nets.module, 0, 0)
        loss.backward()
        assert loss.isfinite() and (stage == 0 or logs["correction"] > 0)
    trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert trained and all(".current." in name or ".scalars." in name for name in trained)
    assert any("time_embedder.linear_1.lora_B" in name for name in trained)
    before = nets.previous(x, timestep, text)
    with torch.no_grad():
        model.condition_embedder.scalars["end"].mlp.linear_2.weight.add_(0.1)
    assert torch.equal(nets.previous(x, timestep, text), before)
    assert not torch.equal(velocity(model, x, timestep, text), before)


def test_a_predictor_learns_in_float32_while_its_half_precision_student_stays_frozen():
    model = half_precision_wan()
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    text, sigmas = torch.randn(1, 6, 32), torch.linspace(1, 0, 5).double()
    context = MeanFlowContext(**vars(constant_prompt_context(text, sigmas)), guidance=3.0)
    config = PredictorConfig(steps=4, guidance=(2, 5), trajectories=1, full=(2, 3), strides=(1,))
    predictor, student = Predictor(Wan(), model, "residual", 1), FeatureProbe(model, checkpointing=True)
    task = PredictorTask(OptimConfig(steps=2, lr=1e-3), config, student, predictor, context, (2, 2, 2))
    task.stage, task.trajectories.index[:] = 1, 2
    task.cached.normal_()
    loss, logs = task.loss(task.module, 0, 0)
    loss.backward()
    assert loss.isfinite() and logs["velocity"] > 0
    assert predictor.out.weight.grad.any() and all(p.grad is None for p in model.parameters())
    assert {p.dtype for p in predictor.parameters()} == {torch.float32} and not task.cached.isnan().any()


def test_only_the_current_lora_of_a_half_precision_model_is_trained_and_in_float32():
    model = half_precision_wan()
    x, t, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([700]), torch.randn(1, 6, 32)
    base = guided(model, x, t, text, 0 * text, 3.0)
    nets = LoRANetworks(model, rank=4)
    context = constant_prompt_context(text, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    config = GpdConfig(base_steps=2, trajectories=1, horizons=(2,))
    loss, _ = GpdTask(OptimConfig(steps=2, lr=1e-3), config, nets, context).loss(nets.module, 0, 0)
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all(".current." in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.requires_grad == (".current." in name) for name, p in model.named_parameters())
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1)
    v = velocity(model, x, t, text)
    assert torch.equal(nets.teacher(x, t, text, 0 * text, 3.0), base)
    assert (nets.previous(x, t, text) - v).abs().max() > 0.1
    nets.next_stage()
    assert torch.equal(nets.previous(x, t, text), v) and torch.equal(velocity(model, x, t, text), v)


def test_the_velocity_of_a_model_that_several_processes_share_is_its_own():
    class Shared(torch.nn.Module):
        """As DistributedDataParallel: a call goes on, an attribute does not."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs, **named):
            return self.module(*inputs, **named)

    model = build_pipe().transformer
    inputs = torch.randn(1, 4, 3, 8, 8), torch.tensor([500.0]), torch.randn(1, 6, 16)
    with torch.no_grad():
        assert torch.equal(velocity(Shared(model), *inputs), velocity(model, *inputs))


@pytest.mark.parametrize("has_interval", [False, True])
def test_a_stored_lora_gives_the_velocities_of_the_trained_one(has_interval, tmp_path):
    model = build_pipe().transformer
    if has_interval:
        model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    nets, t = LoRANetworks(model, 2), torch.tensor([500.0])
    x, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 6, 16)
    for name, weight in model.named_parameters():
        if "current" in name or "scalars" in name:
            torch.nn.init.normal_(weight, std=0.1)
    timestep = pack_timestep(t / 1000, t / 2000, torch.tensor([3.0])) if has_interval else t
    store(nets, tmp_path, "gpd.json", {})
    fresh = build_pipe().transformer
    with torch.no_grad(), load_student(tmp_path, fresh):
        if has_interval:
            with with_interval_embedder(fresh, load_file(tmp_path / INTERVAL_EMBEDDER)):
                torch.testing.assert_close(velocity(fresh, x, timestep, text), velocity(model, x, timestep, text))
        else:
            torch.testing.assert_close(velocity(fresh, x, t, text), velocity(model, x, t, text))
        assert not torch.allclose(velocity(fresh, x, t, text), velocity(build_pipe().transformer, x, t, text))


def test_full_weights_are_refused_where_a_lora_is_on(pipe, tmp_path):
    store(FullNetworks(pipe.transformer), tmp_path, "gpd.json", {})
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match="unload the LoRA first"), load_student(tmp_path, pipe.transformer):
        pass


def test_high_frequencies_are_drawn_as_text():
    assert describe_high_frequencies((28, 5, 4, 4)) == "temporal frequencies ..##., spatial ones .## ### ### ###"


def test_a_model_of_two_transformers_is_refused(two_models, monkeypatch, tmp_path):
    monkeypatch.setattr("accel.training.jobs.load_pipeline", lambda *_: two_models)
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="with one transformer can be distilled: Wan 2.1, not 2.2"):
        train_parts("gpd", None, False, tmp_path / "out", model="other/model", prompts=tmp_path / "prompts.txt")


def test_impossible_jobs_are_refused_with_the_reason(large, tmp_path):
    for job, reason in (
        (dict(ablation="quartering"), "unknown ablation 'quartering'; available: gpd, no-constraint"),
        (dict(model=str(large)), "this model needs prompts to train on: give --prompts FILE"),
        (dict(model=str(large), prompts=tmp_path / "none.txt"), "give --prompts FILE"),
        (dict(rank=4), "all weights of its students are trained: leave --rank out"),
        (dict(trajectories=8), "leave --trajectories out"),
    ):
        with pytest.raises(ValueError, match=reason):
            train_parts("gpd", None, False, tmp_path / "out", **job)
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="has 2 prompts: at least 3 are needed, 2 of them for validation"):
        train_parts("gpd", None, False, tmp_path / "out", model=str(large), prompts=tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match="--rank is for gpd, meanflow, predictor only, not for base"):
        train_parts("base", None, False, tmp_path / "out", rank=4)


def train_in_processes(n: int, folder: Path) -> None:
    """Run the worker in n processes that are connected by gloo."""
    here = Path(__file__).parent
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    path = os.pathsep.join([str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    script = [str(here / "distributed_worker.py"), str(folder), str(n)]
    done = subprocess.run([*start, *script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """A folder in which two processes have trained every kind of student."""
    folder = tmp_path_factory.mktemp("distributed")
    train_in_processes(2, folder)
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")  # they share a run that takes long
@pytest.mark.parametrize("student", ["gpd", "meanflow", "predictor"])
def test_two_processes_end_with_the_same_weights(student, two_processes):
    first, second = (torch.load(two_processes / f"{i}.pt", weights_only=True)[student] for i in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.xdist_group("two processes")
def test_two_processes_learn_what_one_learns(two_processes, tmp_path):
    train_in_processes(1, tmp_path)
    folders = [folder / "gpd" for folder in (tmp_path, two_processes)]
    one, two = (json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["loss"] for folder in folders)
    assert one == pytest.approx(two, rel=0.01)  # after 20 iterations in bfloat16
    one, two = (torch.load(folder / "state.pt", weights_only=True) for folder in folders)
    assert torch.equal(one["task"]["index"], two["task"]["index"])
    for name, weight in one["module"].items():
        torch.testing.assert_close(two["module"][name], weight, rtol=0.02, atol=2e-3)
