"""The tiny Wan: text encoder and transformer trained jointly by flow matching on rendered, captioned clips.

The velocity target is eps - x0 on x_sigma = (1 - sigma) x0 + sigma eps (Lipman et al., arXiv 2210.02747).
Training sees mostly single frames at first, then more and more full clips. Clips are encoded once.

Two choices prepare the model for its later use:
- `WanPipeline` pads the text to a fixed length with zero embeddings that are *not* masked. The number of these padding
  keys varies between batches (`PaddingWeightedAttention`), so a prompt acts the same at any `max_sequence_length`.
- The time embedding uses low frequencies only (`smooth_time`). This bounds the network's derivative in time, which
  MeanFlow students need.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from functools import cached_property
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ...files import atomic_write
from ...runtime.cpu_quota import cpu_quota
from ...runtime.latents import normalize
from ...runtime.models import record_hashes
from ...world.render import render
from ...world.scene import Scene, caption, held_out_prompts, sample_scene, vocabulary
from ..fast_blocks import CrossAttention, has_fast_bfloat16, use_dense_attention
from ..optimizer import OptimConfig
from .vae import Autoencoder, replace_files, to_unit

MAX_TOKENS = 32  # a prompt is padded or truncated to so many tokens
MAX_TIME_FREQUENCY = 0.012  # radians per unit of the timesteps of 0 to 1000
SHIFT = 3.0  # of the training sigmas: sigma = SHIFT u / (1 + (SHIFT - 1) u)
# Until this share of the steps, each step draws one of these (latent frames (0: all), clips per batch).
# Single frames come most often at first: outlines are a matter of space, and a frame costs a fifteenth of a clip.
CURRICULUM = (
    (0.50, ((1, 32), (1, 32), (1, 32), (3, 12))),
    (0.75, ((1, 32), (3, 12), (5, 7), (0, 4))),
    (1.00, ((3, 12), (5, 7), (0, 4), (0, 4))),
)
# Share of the clips that spin, three times as in the grammar: only a spin shows a shape at every angle.
SPINS = 1 / 3


def build_tokenizer(start: Path | None = None) -> PreTrainedTokenizerFast:
    """Word-level tokenizer of the closed vocabulary; unknown words become <unk>, and every text ends with </s>.

    The words of the tokenizer in the folder `start` keep their ids; new words come after them.
    """
    words = ["<pad>", "</s>", "<unk>"]
    if start:
        known = PreTrainedTokenizerFast.from_pretrained(start).get_vocab()
        words = sorted(known, key=known.get)
    words += [w for w in vocabulary() if w not in words]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"[^\w]+"), "removed")]
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=MAX_TOKENS, **special)


def build_models(words: int, latent: int = 16) -> tuple[UMT5EncoderModel, WanTransformer3DModel]:
    """A text encoder for so many words and a transformer with random weights: 4 heads x 48, 8 blocks, patch size 1."""
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=words, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=4, attention_head_dim=48, in_channels=latent, out_channels=latent,
        text_dim=128, freq_dim=128, ffn_dim=512, num_layers=8, cross_attn_norm=True, rope_max_seq_len=64,
    )  # fmt: skip
    smooth_time(transformer)
    return text, transformer


def smooth_time(transformer: WanTransformer3DModel) -> None:
    """Zero the weights of time frequencies above `MAX_TIME_FREQUENCY`, and keep them at zero."""
    half = transformer.config.freq_dim // 2
    low = (10_000.0 ** (-torch.arange(half) / half) <= MAX_TIME_FREQUENCY).float().repeat(2)
    weight = transformer.condition_embedder.time_embedder.linear_1.weight
    with torch.no_grad():
        weight.mul_(low / low.mean().sqrt())
    weight.register_hook(lambda grad: grad * low.to(grad))


class PaddingWeightedAttention(CrossAttention):
    """Cross-attention that weighs the few padding keys as if there were many."""

    def weigh(self, mask: Tensor, total: int) -> None:
        """Let the padding of `mask` (b, text), which is 1 at words, count as `total` - words keys."""
        pads = (1 - mask).sum(-1, keepdim=True)
        more = (total - mask.sum(-1, keepdim=True)) / pads
        self.bias = ((1 - mask) * more.log())[:, None, None]


class SubsampledRoPE(nn.Module):
    """Rotary embedding for some latent frames of a clip, each at its own position in time."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope, self.frames = rope, [0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.frames[-1] + 1
        tables = self.rope(x[:, :, :1].expand(-1, -1, f, -1, -1))
        return tuple(t.unflatten(1, (f, -1))[:, self.frames].flatten(1, 2) for t in tables)


class Denoiser(nn.Module):
    """Text encoder and transformer as one trainable module."""

    def __init__(self, text: UMT5EncoderModel, transformer: WanTransformer3DModel, device: str = "cpu"):
        super().__init__()
        self.text, self.transformer = text.to(device), transformer.to(device)
        self.text_attention, transformer.rope = PaddingWeightedAttention(), SubsampledRoPE(transformer.rope)
        use_dense_attention(transformer.blocks, device)
        for block in transformer.blocks:
            block.attn2.set_processor(self.text_attention)

    def forward(self, x: Tensor, frames: list[int], sigma: Tensor, ids: Tensor, mask: Tensor, total: int) -> Tensor:
        """Velocity (b, c, f, h, w) at sigma (b,) for token ids (b, text); `frames`: positions of the f frames."""
        self.transformer.rope.frames = frames
        words = self.text(ids, mask).last_hidden_state * mask[..., None]
        self.text_attention.weigh(mask.to(words.dtype), total)
        return self.transformer(x, 1000 * sigma, words, return_dict=False)[0]


class LatentDataset:
    """Normalised latents (clips, c, f, h, w) of rendered training clips with their scenes, encoded once into a file."""

    def __init__(self, vae: AutoencoderKLWan, n: int, frames: int, size: int, seed: int, file: Path, device):
        rng = random.Random(f"pool {seed}")
        vae = vae.to(device).eval()
        self.scenes = [training_scene(rng) for _ in range(n)]
        probe = sum(render(s, 3, size).sum().item() for s in self.scenes[:64])  # changes with the world
        encoder = sum(p.double().sum().item() for part in (vae.encoder, vae.quant_conv) for p in part.parameters())
        made = {"of": repr((n, frames, seed, SPINS, probe, encoder))}
        if not file.is_file() or safe_open(file, "pt").metadata() != made:
            auto, clips = Autoencoder(vae), tqdm(rendered(self.scenes, frames, size, device), desc="encoding clips")
            file.parent.mkdir(parents=True, exist_ok=True)
            latents = torch.cat([normalize(vae, _encode(auto, c, device)).half() for c in clips]).contiguous()
            with atomic_write(file) as part:
                save_file({"latents": latents}, part, made)
        self.latents = load_file(file)["latents"].to(device)

    def draw(self, n: int, frames: int, rng: random.Random) -> tuple[Tensor, list[int], list[str]]:
        """Latents of n clips at some frames, their positions, and captions.

        A single frame is any one of the clip; several are the first one and random later ones.
        """
        pick = [rng.randrange(len(self.scenes)) for _ in range(n)]
        total = self.latents.shape[2]
        times = [0, *sorted(rng.sample(range(1, total), frames - 1))] if frames > 1 else [rng.randrange(total)]
        return self.latents[pick][:, :, times].float(), times, [caption(self.scenes[i], rng) for i in pick]


class Clips(Dataset):
    """Rendered scenes: uint8 arrays (f, h, w, 3)."""

    def __init__(self, scenes: list[Scene], frames: int, size: int):
        self.scenes, self.frames, self.size = scenes, frames, size

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> np.ndarray:
        return render(self.scenes[i], self.frames, self.size).numpy()


def rendered(scenes: list[Scene], frames: int, size: int, device: str) -> DataLoader:
    """Batches of rendered scenes, in order. For a GPU, which would wait for them, all CPUs that may be used render."""
    workers = (cpu_quota() or os.cpu_count()) if torch.device(device).type == "cuda" else 0
    return DataLoader(Clips(scenes, frames, size), 16, num_workers=workers, collate_fn=list)


def training_scene(rng: random.Random) -> Scene:
    """A scene from the combinations that are not held out; it spins with probability `SPINS`."""
    spins = rng.random() < SPINS
    while True:
        scene = sample_scene(rng)
        if (scene.objects[0].motion == "spins") == spins:
            return scene


def _encode(auto: Autoencoder, clips: list[np.ndarray], device: str) -> Tensor:
    x = torch.stack([to_unit(torch.from_numpy(clip)) for clip in clips]).to(device)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=has_fast_bfloat16(str(x.device))):
        return auto.encode(x)[0].float()


class BaseTask:
    """Flow matching on the latents of rendered clips: mostly single frames at first, then more and more full clips."""

    def __init__(
        self, optim: OptimConfig, vae: AutoencoderKLWan, size: int, frames: int, clips: int, folder: Path,
        device: str = "cpu", compiled: bool = False, start: Path | None = None,
    ):  # fmt: skip
        torch.manual_seed(optim.seed)
        self.optim, self.vae, self.size, self.frames = optim, vae, size, frames
        self.tokenizer = build_tokenizer(start and start / "tokenizer")
        self.module = Denoiser(*build_models(len(self.tokenizer), vae.config.z_dim), device)
        if compiled:
            self.module.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self.clips, self.folder, self.device = clips, folder, device

    @cached_property
    def dataset(self) -> LatentDataset:
        """The clips, encoded when they are first needed; an export needs none."""
        file = self.folder / "pool.safetensors"
        with torch.autocast(torch.device(self.device).type, enabled=False):  # that of a step which asks first
            return LatentDataset(self.vae, self.clips, self.frames, self.size, self.optim.seed, file, self.device)

    def matrices(self) -> list[nn.Parameter]:
        """The weights of the blocks' linear layers, for Muon."""
        return [p for p in self.module.transformer.blocks.parameters() if p.ndim == 2]

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        rng, device = random.Random(seed), self.dataset.latents.device
        noise = torch.Generator(device).manual_seed(seed)
        frames, n = self._lengths(step / self.optim.steps, rng)
        n *= self.optim.batch
        x0, times, captions = self.dataset.draw(n, frames or self.dataset.latents.shape[2], rng)
        captions = ["" if rng.random() < 0.1 else c for c in captions]
        tokens = self.tokenizer(captions, padding="max_length", max_length=MAX_TOKENS - 8, return_tensors="pt").to(
            device
        )
        eps = torch.randn(x0.shape, generator=noise, device=device)
        # stratified, for a loss with less variance
        u = (torch.arange(n, device=device) + torch.rand(n, generator=noise, device=device)) / n
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        s = sigma[:, None, None, None, None]
        words = tokens.input_ids, tokens.attention_mask, rng.choice((MAX_TOKENS, 512))
        v = model((1 - s) * x0 + s * eps, times, sigma, *words)
        return (v.float() - (eps - x0)).square().mean(), {}

    def _lengths(self, share: float, rng: random.Random) -> tuple[int, int]:
        """Latent frames (0: all) and clips per batch after a share of the steps."""
        return rng.choice(next(pairs for until, pairs in CURRICULUM if share < until))

    def start_from(self, folder: Path) -> None:
        """Load the weights of a finished pipeline; the schedule and the optimizer start anew.

        The first and last layer stay random if the autoencoder has another number of latent channels. Words that the
        pipeline does not know get small random embeddings.
        """
        text = UMT5EncoderModel.from_pretrained(folder / "text_encoder")
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
        fresh = self.module.transformer.state_dict()
        new = len(self.tokenizer) - text.config.vocab_size
        if new > 0:
            known = text.shared.weight.detach()
            text.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            text.shared.weight.data[-new:] = 0.3 * known.std() * torch.randn(new, known.shape[1])
        self.module.text.load_state_dict(text.state_dict())
        self.module.transformer.load_state_dict(
            {name: w if w.shape == fresh[name].shape else fresh[name] for name, w in transformer.items()}
        )

    def pipeline(self) -> WanPipeline:
        """The model in its present state as a stock pipeline, whose transformer is a copy with stock processors."""
        transformer = WanTransformer3DModel.from_config(self.module.transformer.config)
        transformer.load_state_dict(self.module.transformer.state_dict())
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        )
        return WanPipeline(
            tokenizer=self.tokenizer, text_encoder=self.module.text, vae=self.vae, scheduler=scheduler,
            transformer=transformer.to(self.device),
        )  # fmt: skip

    def sample_grid(self, path: Path) -> None:
        """Write a picture with nine frames of each of some held-out prompts, generated in a few guided steps."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        length = dict(height=self.size, width=self.size, num_frames=self.frames, max_sequence_length=MAX_TOKENS)
        noise = torch.Generator().manual_seed(0)
        texts = held_out_prompts(2, 1)  # each takes seconds
        out = pipe(texts, num_inference_steps=8, guidance_scale=5.0, generator=noise, **length)
        frames = torch.as_tensor(out.frames)[:, :: max(1, self.frames // 8)]
        iio.imwrite(path, (rearrange(frames, "b f h w c -> (b h) (f w) c") * 255).round().to(torch.uint8).cpu().numpy())


def finish(task: BaseTask, folder: Path) -> None:
    """Write the pipeline into a folder in diffusers layout, every file under 10 MB.

    An autoencoder that is there stays: its decoder may have been trained on meanwhile.
    """
    pipe, made = task.pipeline(), folder.with_name(folder.name + ".part")
    pipe.transformer.half(), pipe.vae.half()  # half the size on disk; stock loading makes them float32 again
    pipe.save_pretrained(made, safe_serialization=True, max_shard_size="9MB")
    if (folder / "vae").is_dir():
        shutil.rmtree(made / "vae")
    for file in made.glob("*/config.json"):  # diffusers stores the local path from which a part was loaded
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    record_hashes(made)
    replace_files(made, folder)
