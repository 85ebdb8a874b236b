"""The video autoencoder: `AutoencoderKLWan`, 8x smaller in space and 2x in time, trained on rendered scenes.

The stock class walks through a clip in chunks with a feature cache, which is slow to train. `parallel_time`
computes the same function on the whole clip at once (`test_parallel_time_equals_the_stock_autoencoder`).
"""

from __future__ import annotations

import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import imageio.v3 as iio
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn

from ...evaluation.metrics import psnr
from ...runtime.models import record_hashes
from ...world.judge import read
from ...world.render import render
from ...world.scene import ATTRIBUTES, Scene, sample_scene
from ..optimizer import OptimConfig

# (until this share of the steps, frames (0: all), clips per batch)
CURRICULUM = ((0.4, 5, 4), (0.95, 9, 3), (1.0, 0, 2))
KL_WEIGHT = 1e-3
MIN_CHANNEL_STD = 0.1  # a latent channel whose mean varies less carries nothing: dead ones have 0.01, others 0.7


def build_vae(base_dim: int = 32, z_dim: int = 48) -> AutoencoderKLWan:
    """A fresh autoencoder; latents are (b, z, 1 + (f - 1) / 2, h / 8, w / 8)."""
    return AutoencoderKLWan(
        base_dim=base_dim,
        z_dim=z_dim,
        dim_mult=[1, 2],
        num_res_blocks=2,
        temperal_downsample=[True],
        latents_mean=[0.0] * z_dim,
        latents_std=[1.0] * z_dim,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=2,
        scale_factor_spatial=8,
    )


def _resample(self: WanResample, x: Tensor, feat_cache=None, feat_idx=None) -> Tensor:
    """`WanResample.forward` for a full clip (b, c, f, h, w): the first frame skips the temporal convolution."""
    if self.mode == "upsample3d" and x.shape[2] > 1:
        late = rearrange(self.time_conv(x[:, :, 1:]), "b (s c) f h w -> b c (f s) h w", s=2)
        x = torch.cat([x[:, :, :1], late], 2)
    b = len(x)
    x = self.resample(rearrange(x, "b c f h w -> (b f) c h w"))
    x = rearrange(x, "(b f) c h w -> b c f h w", b=b)
    if self.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], self.time_conv(x)], 2)
    return x


@contextmanager
def parallel_time(vae: AutoencoderKLWan):
    """Let `vae.encoder` and `vae.decoder` take full clips without a feature cache, for the time of the context."""
    layers = [m for m in vae.modules() if isinstance(m, WanResample)]
    for layer in layers:
        layer.forward = MethodType(_resample, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class Autoencoder(nn.Module):
    """Frames to reconstruction in one differentiable call, for training."""

    def __init__(self, vae: AutoencoderKLWan):
        super().__init__()
        self.vae = vae

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of (b, 3, f, h, w) in [-1, 1]."""
        vae = self.vae
        with parallel_time(vae):
            mean, logvar = vae.quant_conv(vae.encoder(patchify(x, vae.config.patch_size))).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        vae = self.vae
        with parallel_time(vae):
            return unpatchify(vae.decoder(vae.post_quant_conv(z)), vae.config.patch_size)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(x)
        return self.decode(mean + noise * (0.5 * logvar).exp()), mean, logvar


def clips(n: int, frames: int, size: int, seed: int, held_out=False, device="cpu") -> Tensor:
    """n rendered clips (n, 3, f, h, w) in [-1, 1]; short ones start at a random frame of a longer clip."""
    rng = random.Random(seed)
    rendered = [render(sample_scene(rng, held_out), max(frames, 9), size, device) for _ in range(n)]
    starts = [rng.randrange(len(c) - frames + 1) for c in rendered]
    return torch.stack([to_unit(c[s : s + frames]) for c, s in zip(rendered, starts)])


def to_unit(frames: Tensor) -> Tensor:
    """uint8 frames (f, h, w, c) as (c, f, h, w) in [-1, 1]."""
    return rearrange(frames, "f h w c -> c f h w").float() / 127.5 - 1


def from_unit(x: Tensor) -> Tensor:
    """The inverse of `to_unit`, rounded and clipped."""
    return ((rearrange(x, "c f h w -> f h w c") + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class VaeTask:
    """L1 + MSE reconstruction with a small KL penalty of the latents to a unit Gaussian."""

    def __init__(self, optim: OptimConfig, size: int = 96, frames: int = 17):
        torch.manual_seed(optim.seed)
        self.optim, self.size, self.frames = optim, size, frames
        self.module, self.keeps_latents = Autoencoder(build_vae()), False

    def start_from(self, folder: Path) -> None:
        """Load the weights of a finished autoencoder; the schedule and the optimizer start anew."""
        self.module.vae = AutoencoderKLWan.from_pretrained(folder)

    def keep_latents(self) -> None:
        """Train the decoder alone: a base model is there, which knows these latents."""
        for part in (self.module.vae.encoder, self.module.vae.quant_conv):
            part.requires_grad_(False)
        self.keeps_latents = True

    def shape_as(self, state: Path) -> None:
        """Use as many latent channels as a checkpoint: a run that started from finished weights has fewer."""
        weights = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["module"]
        channels = len(weights["vae.post_quant_conv.weight"])
        if channels != self.module.vae.config.z_dim:
            self.module.vae = build_vae(z_dim=channels)

    def matrices(self) -> list[nn.Parameter]:
        """The kernels of all convolutions that are trained, for Muon."""
        return [p for p in self.module.parameters() if p.requires_grad and p.ndim > 3 and min(p.shape[:2]) > 1]

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        share = step / self.optim.steps
        frames, n = next((f or self.frames, n) for until, f, n in CURRICULUM if share < until)
        n *= self.optim.batch
        device = next(model.parameters()).device
        x = clips(n, frames, self.size, seed, device=device)
        grid = (n, self.module.vae.config.z_dim, 1 + (frames - 1) // 2, self.size // 8, self.size // 8)
        noise = torch.randn(grid, generator=torch.Generator().manual_seed(seed)).to(device)
        y, mean, logvar = model(x, noise)
        error = y.float() - x
        mse, mean, logvar = error.square().mean(), mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = -10 * torch.log10(mse / 4)
        return error.abs().mean() + 4 * mse + KL_WEIGHT * kl, {"psnr": psnr.item(), "kl": kl.item()}

    @torch.no_grad()
    def sample_grid(self, path: Path) -> None:
        x = clips(6, 9, self.size, 1, True, next(self.module.parameters()).device)
        y = self.module.decode(self.module.encode(x)[0])
        rows = rearrange(torch.stack([x, y]), "s b c f h w -> c 1 (b s h) (f w)")
        iio.imwrite(path, from_unit(rows)[0].cpu().numpy())


def trains_encoder(state: Path) -> bool:
    """Whether a checkpoint is of a run that trains the whole autoencoder; it holds what is trained."""
    weights = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["module"]
    return any(name.startswith("vae.encoder") for name in weights)


@torch.no_grad()
def finish(task: VaeTask, folder: Path) -> dict:
    """Write the autoencoder in diffusers layout with its latents' mean and deviation; returns how good it is.

    The latents' statistics come from training scenes. PSNR, and the attributes that the judge reads from the
    reconstruction, come from held-out scenes through the stock chunked path.
    """
    vae = task.module.vae.eval()
    if not task.keeps_latents:
        scenes = (clips(16, task.frames, task.size, 10_000 + i, False, vae.device) for i in range(16))
        z = torch.cat([task.module.encode(x)[0] for x in scenes])
        mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        vae = without_dead_channels(vae)
    made = folder.with_name(folder.name + ".part")
    vae.half().save_pretrained(made, max_shard_size="9MB")  # half the size on disk; loads as float32
    record_hashes(made)
    replace_files(made, folder)
    vae.float()
    rng = random.Random("held-out reconstructions")
    readings = [_mark(vae, sample_scene(rng, True), task.frames, task.size) for _ in range(64)]
    psnr = torch.tensor([p for p, _ in readings])
    half = 1.96 * psnr.std().item() / len(psnr) ** 0.5
    seen = {a: round(sum(right[a] for _, right in readings) / len(readings), 3) for a in ATTRIBUTES}
    return {"psnr": round(psnr.mean().item(), 2), "interval": round(half, 2), "n": len(psnr), "read": seen}


@torch.no_grad()
def without_dead_channels(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """The same autoencoder without the latent channels whose mean hardly varies between positions.

    The KL penalty leaves channels that carry nothing. Normalised to deviation 1, their noise would be as large a part
    of the denoiser's target as the picture. The 1x1 convolutions around the latents are merged into their neighbours;
    at the borders, where those pad with zeros, a part of their bias is lost (0.2 dB).
    """
    z, mean = vae.config.z_dim, torch.tensor(vae.config.latents_mean, device=vae.device)
    alive = [i for i, deviation in enumerate(vae.config.latents_std) if deviation > MIN_CHANNEL_STD]
    if len(alive) == z:
        return vae
    state, rows = vae.state_dict(), torch.tensor(alive + [z + i for i in alive])
    into, shift = state["quant_conv.weight"][rows].flatten(1), state["quant_conv.bias"][rows]
    out, rest = state["post_quant_conv.weight"].flatten(1), state["post_quant_conv.bias"].clone()
    dead = [i for i in range(z) if i not in alive]
    rest, out = rest + out[:, dead] @ mean[dead], out[:, alive]
    bias = torch.linalg.lstsq(out, rest[:, None]).solution[:, 0]
    kernel = state["decoder.conv_in.weight"]
    state |= {
        "encoder.conv_out.weight": torch.einsum("oi,i...->o...", into, state["encoder.conv_out.weight"]),
        "encoder.conv_out.bias": into @ state["encoder.conv_out.bias"] + shift,
        "quant_conv.weight": torch.eye(2 * len(alive))[:, :, None, None, None],
        "quant_conv.bias": torch.zeros(2 * len(alive)),
        "post_quant_conv.weight": torch.eye(len(alive))[:, :, None, None, None],
        "post_quant_conv.bias": bias,
        "decoder.conv_in.weight": torch.einsum("oi...,ij->oj...", kernel, out),
        "decoder.conv_in.bias": state["decoder.conv_in.bias"] + kernel.sum((2, 3, 4)) @ (rest - out @ bias),
    }
    statistics = {name: [vae.config[name][i] for i in alive] for name in ("latents_mean", "latents_std")}
    small = AutoencoderKLWan.from_config({**vae.config, **statistics, "z_dim": len(alive)})
    small.load_state_dict(state)
    return small.to(vae.device).eval()


def _mark(vae: AutoencoderKLWan, scene: Scene, frames: int, size: int) -> tuple[float, dict[str, bool]]:
    """PSNR in dB of a scene through the stock encoder and decoder, and which attributes the judge reads correctly."""
    x = render(scene, frames, size, vae.device)
    y = from_unit(vae.decode(vae.encode(to_unit(x)[None]).latent_dist.mode()).sample[0])
    x, y = x.cpu().numpy(), y.cpu().numpy()
    seen = read(y)
    return psnr(x, y), {a: seen[a] == value for a, value in scene.attributes.items()}


def replace_files(made: Path, folder: Path) -> None:
    """Move the files of a finished folder, and of its subfolders, over those of another folder.

    Old weights are deleted first, because a different number of shards would leave some of them in place.
    """
    files = [file.relative_to(made) for file in made.rglob("*") if file.is_file()]
    for part in {file.parent for file in files}:
        (folder / part).mkdir(parents=True, exist_ok=True)
        for old in (folder / part).glob("*.safetensors*"):
            old.unlink()
    for file in files:
        os.replace(made / file, folder / file)
    shutil.rmtree(made)
