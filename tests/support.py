"""Small random models of the real classes and other things that several tests build."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from accel.families.wan import Wan
from accel.methods.disca.predictor import Predictor
from accel.methods.fittedsolver import Solver
from accel.runtime.models import ModelDefaults
from accel.students.interval_embedding import IntervalEmbedder
from accel.students.weights import fingerprint
from accel.training.feature_probe import FeatureProbe
from accel.training.networks import FullNetworks
from accel.training.optimizer import OptimConfig
from accel.training.rollouts import MeanFlowContext, RolloutContext, rollout_context
from accel.training.stages import store
from accel.training.tasks.base_model import build_tokenizer
from accel.training.tasks.gpd_distillation import GpdConfig, GpdTask
from accel.training.tasks.meanflow_distillation import MeanFlowConfig, MeanFlowTask
from accel.training.tasks.predictor_fit import PredictorConfig, PredictorTask
from accel.training.tasks.vae import build_vae

SPREAD = 0.5  # deviation of the data in a Gaussian toy problem: x0 ~ N(0, SPREAD^2)
PREDICTOR_STEPS = 6


def random_wan(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval()


def words_of(texts: list[str]) -> torch.Tensor:
    """Embeddings (b, 6, 16) of texts that depend on each text's length alone."""
    return torch.stack([torch.randn(6, 16, generator=torch.Generator().manual_seed(len(t))) for t in texts])


def build_pipe(**more) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=build_tokenizer(), text_encoder=None, vae=build_vae(8, 4).eval(), scheduler=scheduler,
        transformer=random_wan(), **more,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_meanflow(pipe, folder, guidance=(1.0, 20.0)) -> None:
    """A random MeanFlow student of a pipeline's transformer."""
    transformer = deepcopy(pipe.transformer)
    transformer.condition_embedder = IntervalEmbedder(transformer.condition_embedder)
    nets = FullNetworks(transformer)
    nets.module.proj_out.weight.data.mul_(0.5)
    for scalar in nets.module.condition_embedder.scalars.values():
        torch.nn.init.normal_(scalar.mlp.linear_2.weight)
    store(
        nets,
        folder,
        "meanflow.json",
        {"guidance": guidance, "max_interval": 0.3, "base_fingerprint": fingerprint(pipe.transformer)},
    )


def make_predictor(pipe, folder, form) -> None:
    """A random predictor for the pipeline's current transformer."""
    predictor = Predictor(Wan(), pipe.transformer, form, 1)
    if predictor.out is not None:
        torch.nn.init.normal_(predictor.out.weight)
    folder.mkdir(parents=True)
    save_file(predictor.state_dict(), folder / "model.safetensors")
    facts = {"form": form, "depth": 1, "student_fingerprint": fingerprint(pipe.transformer)}
    facts["config"] = {"supported_runs": {8: 3}}
    (folder / "predictor.json").write_text(json.dumps(facts))


def deviation(t):
    """Standard deviation of x at sigma t, for Gaussian data and noise."""
    return ((1 - t) ** 2 * SPREAD**2 + t**2).sqrt()


def instant(x, t):
    """The velocity at sigma t in closed form: the logarithmic derivative of the deviation, times x."""
    return x * (t - (1 - t) * SPREAD**2) / deviation(t) ** 2


def mean(x, t, r):
    """The mean velocity from sigma t to r in closed form: x_r / x_t is the ratio of the deviations."""
    return x * (1 - deviation(r) / deviation(t)) / (t - r)


def timed(pipe, steps=4) -> MeanFlowContext:
    """A rollout context of a few steps on random prompts, whose timesteps are packed for a MeanFlow student."""
    defaults = ModelDefaults(height=32, width=32, frames=5, steps=4, guidance=3.0, text_length=6)
    pipe.encode_prompt = lambda texts, **_: (torch.stack([torch.full((6, 16), len(t) / 9) for t in texts]),)
    return MeanFlowContext(
        **vars(rollout_context(pipe, defaults, steps, lambda rng: "a" * rng.randrange(1, 9))), guidance=3.0
    )


def shifted_sigmas(n: int, shift: float = 3.0) -> torch.Tensor:
    """Noise levels (n + 1,) of a schedule of n steps that is shifted towards noise."""
    u = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    return shift * u / (1 + (shift - 1) * u)


def gpd_task(pipe, steps=48, rank_and_world=(0, 1), **config) -> GpdTask:
    """Guided progressive distillation of a pipeline's transformer from a schedule of so many steps."""
    sigmas = shifted_sigmas(steps)
    draw_prompt = lambda rng: "a" * rng.randrange(1, 9)
    context = RolloutContext(words_of, draw_prompt, sigmas, (1000 * sigmas[:-1]).long(), (4, 3, 8, 8))
    config = GpdConfig(**{"trajectories": 2, "base_steps": steps} | config)
    optim = OptimConfig(steps=10, lr=1e-3)
    return GpdTask(optim, config, FullNetworks(pipe.transformer), context, rank_and_world)


def meanflow_task(pipe, rank_and_world=(0, 1), **config) -> MeanFlowTask:
    """Restricted MeanFlow of a pipeline's transformer on a schedule of four steps."""
    if not isinstance(pipe.transformer.condition_embedder, IntervalEmbedder):
        pipe.transformer.condition_embedder = IntervalEmbedder(pipe.transformer.condition_embedder)
    fields = {"base_steps": 4, "steps": (4, 2), "guidance": (2.0, 5.0), "max_interval": 0.5, "trajectories": 4,
              "max_stride": 1, "warm": 1} | config  # fmt: skip
    optim, nets = OptimConfig(steps=4, lr=1e-3), FullNetworks(pipe.transformer)
    return MeanFlowTask(optim, MeanFlowConfig(**fields), nets, timed(pipe), rank_and_world)


def predictor_task(pipe, form="residual", rank_and_world=(0, 1), **config) -> PredictorTask:
    """Training a predictor of a pipeline's transformer, on a schedule of `PREDICTOR_STEPS` steps."""
    if not isinstance(pipe.transformer.condition_embedder, IntervalEmbedder):
        pipe.transformer.condition_embedder = IntervalEmbedder(pipe.transformer.condition_embedder)
    torch.manual_seed(0)
    predictor = Predictor(Wan(), pipe.transformer, form, 1)
    stack = pipe.transformer.blocks[0]
    pipe.transformer.blocks = getattr(stack, "blocks", pipe.transformer.blocks)
    fields = {"steps": PREDICTOR_STEPS, "guidance": (2.0, 5.0), "trajectories": 4, "full": (3, 3), "strides": (1,)}
    config, optim = PredictorConfig(**fields | config), OptimConfig(steps=3, lr=1e-3, warmup=1, ema=0.0)
    student, context = FeatureProbe(pipe.transformer), timed(pipe, PREDICTOR_STEPS)
    return PredictorTask(optim, config, student, predictor, context, (3, 2, 2), rank_and_world)


def euler_as_fitted_solver(pipe, steps: int, uncond_steps: Sequence[int], guidance: float = 4.0) -> Solver:
    """Euler's steps as a fitted solver; where the unconditional branch is left out, its last output stands for it."""
    pipe.scheduler.set_timesteps(steps)
    sigmas, times = pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps.tolist()
    weights, outputs = [], []
    for step in range(steps):
        outputs += ["cond", "uncond"] if step in uncond_steps else ["cond"]
        row, distance = [1.0] + [0.0] * len(outputs), sigmas[step + 1] - sigmas[step]
        for branch, scale in (("cond", guidance), ("uncond", 1 - guidance)):
            row[len(outputs) - outputs[::-1].index(branch)] = scale * distance
        weights.append(row)
    return Solver(
        steps=steps, guidance=guidance, sigmas=sigmas, timesteps=times, uncond_steps=list(uncond_steps),
        weights=weights, base_fingerprint=fingerprint(pipe.transformer),
    )  # fmt: skip
