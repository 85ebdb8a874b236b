"""A random Wan of the real class, two blocks wide 24, in a stock pipeline: small enough to run hundreds of steps."""

from __future__ import annotations

import json
import os
from copy import deepcopy

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests are of the CPU, also where there is a GPU

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file

from accel.families import wan
from accel.methods.disca.predictor import Predictor
from accel.students.interval_embedding import IntervalEmbedder
from accel.students.weights import marks
from accel.training.networks import Copies
from accel.training.stages import store
from accel.training.tasks.base import build_tokenizer
from accel.training.tasks.vae import build_vae

torch.set_num_threads(2)


def random_wan(seed: int = 0) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=48, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval()


def words_of(texts: list[str]) -> torch.Tensor:
    """Embeddings of texts that depend on their lengths, whatever else is embedded with them."""
    return torch.stack([torch.randn(6, 16, generator=torch.Generator().manual_seed(len(t))) for t in texts])


@pytest.fixture
def pipe() -> WanPipeline:
    return build_pipe()


@pytest.fixture
def two_models() -> WanPipeline:
    """As Wan 2.2: a second transformer takes over below a noise level."""
    return build_pipe(transformer_2=random_wan(1), boundary_ratio=0.7)


def build_pipe(**more) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=build_tokenizer(), text_encoder=None, vae=build_vae(8, 4).eval(), scheduler=scheduler,
        transformer=random_wan(), **more,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def students(pipe, tmp_path):
    """Random students of all kinds beside the pipeline's model, and predictors of the model itself."""
    pipe.register_to_config(_name_or_path=str(tmp_path))
    nets = Copies(pipe.transformer)
    nets.module.proj_out.weight.data.mul_(0.5)
    for n in (6, 8, 12, 16, 24, 48):
        levels = [1 - i / n for i in range(n + 1)]
        facts = {"levels": levels, "times": [1000 * s for s in levels[:-1]], "base": marks(pipe.transformer)}
        store(nets, tmp_path / f"gpd-N{n}", "gpd.json", {"steps": n, **facts})
    make_meanflow(pipe, tmp_path / "meanflow")
    for form in ("residual", "plain"):
        make_predictor(pipe, tmp_path / "predictor" / form, form)


def make_meanflow(pipe, folder, guidance=(1.0, 20.0)) -> None:
    """A random MeanFlow student of a pipeline's transformer."""
    whole = deepcopy(pipe.transformer)
    whole.condition_embedder = IntervalEmbedder(whole.condition_embedder)
    nets = Copies(whole)
    nets.module.proj_out.weight.data.mul_(0.5)
    for told in nets.module.condition_embedder.told.values():
        torch.nn.init.normal_(told.mlp.linear_2.weight)
    store(nets, folder, "meanflow.json", {"guidance": guidance, "longest": 0.3, "base": marks(pipe.transformer)})


def make_predictor(pipe, folder, form) -> None:
    """A random predictor for the model that the pipeline has now."""
    predictor = Predictor(wan, pipe.transformer, form, 1)
    if predictor.out is not None:
        torch.nn.init.normal_(predictor.out.weight)
    folder.mkdir(parents=True)
    save_file(predictor.state_dict(), folder / "model.safetensors")
    facts = {"form": form, "depth": 1, "student": marks(pipe.transformer)}
    facts["lessons"] = {"served": {8: 3}}
    (folder / "predictor.json").write_text(json.dumps(facts))


@pytest.fixture
def sample():
    """sample(pipe, steps=, guidance=, height=, on_step=, attention=): the final latents of one run."""

    def run(pipe, steps=20, guidance=4.0, height=64, on_step=None, seed=0, attention=None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        words = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))
        negative = words[1] if guidance > 1 else None
        return pipe(
            prompt_embeds=words[0], negative_prompt_embeds=negative, height=height, width=64, num_frames=5,
            num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="latent",
            callback_on_step_end=on_step, attention_kwargs=attention,
        ).frames  # fmt: skip

    return run
