"""The video autoencoder: `AutoencoderKLWan`, 8x smaller in space and 2x in time, trained on rendered scenes.

The stock class walks through a clip in chunks with a feature cache, which is slow to train. `parallel_time`
computes the same function on the whole clip at once (`test_parallel_time_equals_the_stock_autoencoder`).
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn

from ..world.render import render
from ..world.scene import sample_scene
from .fit import Recipe

# until this share of the steps: frames (0: all), clips a batch
CURRICULUM = ((0.20, 1, 48), (0.40, 5, 16), (0.95, 9, 10), (1.0, 0, 5))


def build_vae(base_dim: int = 32, z_dim: int = 16) -> AutoencoderKLWan:
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
    """`WanResample.forward` for a whole clip (b, c, f, h, w): the first frame passes the time axis untouched."""
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
    """Inside, `vae.encoder` and `vae.decoder` take whole clips without a feature cache."""
    sites = [m for m in vae.modules() if isinstance(m, WanResample)]
    for site in sites:
        site.forward = MethodType(_resample, site)
    try:
        yield
    finally:
        for site in sites:
            del site.forward


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


def clips(n: int, frames: int, size: int, seed: int, held_out: bool = False, device="cpu") -> Tensor:
    """n rendered clips (n, 3, f, h, w) in [-1, 1]; a single frame is taken anywhere in its clip."""
    rng = random.Random(seed)
    whole = [render(sample_scene(rng, held_out), max(frames, 9), size, device) for _ in range(n)]
    starts = [rng.randrange(len(c) - frames + 1) for c in whole]
    x = torch.stack([c[s : s + frames] for c, s in zip(whole, starts)])
    return rearrange(x, "b f h w c -> b c f h w").float() / 127.5 - 1


class VaeTask:
    """L1 + MSE reconstruction with a light pull of the latents towards a unit Gaussian."""

    def __init__(self, recipe: Recipe, size: int = 64, frames: int = 17, kl: float = 1e-4):
        torch.manual_seed(recipe.seed)
        self.recipe, self.size, self.frames, self.kl = recipe, size, frames, kl
        self.module = Autoencoder(build_vae())

    def start_from(self, folder: Path) -> None:
        """Begin with the weights of a finished autoencoder; the schedule and the optimizer start anew."""
        self.module.vae.load_state_dict(AutoencoderKLWan.from_pretrained(folder).state_dict())

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        share = step / self.recipe.steps
        frames, n = next((f or self.frames, n) for until, f, n in CURRICULUM if share < until)
        device = next(model.parameters()).device
        x = clips(n, frames, self.size, seed, device=device)
        grid = (n, self.module.vae.config.z_dim, 1 + (frames - 1) // 2, self.size // 8, self.size // 8)
        noise = torch.randn(grid, generator=torch.Generator().manual_seed(seed)).to(device)
        y, mean, logvar = model(x, noise)
        error = y.float() - x
        mse, mean, logvar = error.square().mean(), mean.float(), logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = -10 * torch.log10(mse / 4)
        return error.abs().mean() + 4 * mse + self.kl * kl, {"psnr": psnr.item(), "kl": kl.item()}

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        x = clips(6, 9, self.size, 1, held_out=True, device=next(self.module.parameters()).device)
        y = self.module.decode(self.module.encode(x)[0]).clamp(-1, 1)
        rows = rearrange(torch.stack([x, y]), "s b c f h w -> (b s h) (f w) c")
        iio.imwrite(path, ((rows + 1) * 127.5).round().to(torch.uint8).cpu().numpy())


@torch.no_grad()
def finish(task: VaeTask, folder: Path) -> dict:
    """Write the autoencoder in diffusers layout with its latents' mean and deviation; PSNR on held-out clips.

    The latents' statistics come from training scenes, the PSNR from held-out scenes through the stock chunked path.
    """
    vae = task.module.vae.eval()
    made = lambda n, seed, **kind: clips(n, task.frames, task.size, seed, device=vae.device, **kind)
    z = torch.cat([task.module.encode(made(16, 10_000 + i))[0] for i in range(16)])
    mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    clear_weights(folder)
    vae.save_pretrained(folder, max_shard_size="9MB")
    psnr = torch.cat([_psnr(vae, made(8, 20_000 + i, held_out=True)) for i in range(8)])
    half = 1.96 * psnr.std().item() / len(psnr) ** 0.5
    return {"psnr": round(psnr.mean().item(), 2), "interval": round(half, 2), "n": len(psnr)}


def _psnr(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    """PSNR (b,) in dB of clips through the stock encoder and decoder."""
    y = vae.decode(vae.encode(x).latent_dist.mode()).sample
    return -10 * torch.log10(F.mse_loss(y, x, reduction="none").mean((1, 2, 3, 4)) / 4)


def clear_weights(folder: Path) -> None:
    """Remove the weight files of a folder: shards of another count would stay beside the new ones."""
    for file in Path(folder).glob("*.safetensors*"):
        file.unlink()
