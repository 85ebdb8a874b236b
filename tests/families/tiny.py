"""Tiny random pipelines of the real diffusers classes: two blocks, width 32, 48 to 192 video tokens.

`TINY[name](texts)` returns (pipe, kwargs): `pipe(**kwargs, num_inference_steps=, generator=, output_type="latent")`
runs a batch of so many texts, each with embeddings of its own. There is no text encoder; the autoencoder is real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

Tiny = tuple[DiffusionPipeline, dict]

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM
TOKENS, TEXT_DIM = 6, 16  # text
CHANNELS = 4  # latents
SIZE = {"height": 64, "width": 64, "num_frames": 9}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
WITHOUT_TEXT = {"text_encoder": None, "tokenizer": None}
TWO_ENCODERS = {**WITHOUT_TEXT, "text_encoder_2": None, "tokenizer_2": None}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from torch's global generator with a seed of our own, and leave it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(name: str, seed: int = 0, **config) -> nn.Module:
    """A seeded random model of a diffusers class; weights that start at zero are random too, so that each one tells."""
    with seeded(seed):
        model = getattr(diffusers, name)(**config)
        for weights in model.parameters():
            if not weights.any():
                nn.init.normal_(weights, std=0.05)
    return model.eval()


def assemble(name: str, components: dict, **config) -> DiffusionPipeline:
    """A quiet pipeline of a diffusers class."""
    pipe = getattr(diffusers, name)(**components, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Normal values; the item i of a batch has the seed `seed + i`, whatever the size of the batch."""
    draw = lambda i: torch.randn(shape[1:], generator=torch.Generator().manual_seed(seed + i))
    return torch.stack([draw(i) for i in range(shape[0])])


def picture(*shape: int) -> Tensor:
    """Pixels in 0 to 1."""
    return noise(*shape, seed=70).sigmoid()


def photo() -> Image.Image:
    """An image for pipelines that encode one for the whole batch."""
    return Image.fromarray((255 * picture(64, 64, 3)).to(torch.uint8).numpy())


def padding_mask(texts: int, tokens: int = TOKENS, dtype: torch.dtype = torch.long) -> Tensor:
    """Mask (b, n) of texts of which each is a token shorter than the one before; the first has two of padding."""
    lengths = tokens - 2 - torch.arange(texts) % 3
    return (torch.arange(tokens) < lengths[:, None]).to(dtype)


def embeddings(texts: int) -> dict:
    """Embeddings (b, n, d) of the texts and of the empty text."""
    return {
        "prompt_embeds": noise(texts, TOKENS, TEXT_DIM, seed=10),
        "negative_prompt_embeds": noise(1, TOKENS, TEXT_DIM, seed=50).repeat(texts, 1, 1),
    }


def masks(texts: int) -> dict:
    """Attention masks (b, n) of the texts and of the empty text."""
    negative = padding_mask(1, TOKENS - 1).repeat(texts, 1)
    return {
        "prompt_attention_mask": padding_mask(texts),
        "negative_prompt_attention_mask": nn.functional.pad(negative, (0, 1)),
    }


# Wan


def wan_transformer(name: str = "WanTransformer3DModel", seed: int = 0, **config) -> nn.Module:
    """A transformer of the Wan family."""
    fields = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "text_dim": TEXT_DIM, "freq_dim": 32, "ffn_dim": 48, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return build(name, seed, **fields | config)


def wan_parts(**config) -> dict:
    """The components of a Wan pipeline; `config` is the transformer's."""
    vae = build(
        "AutoencoderKLWan", base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    return {**WITHOUT_TEXT, "vae": vae, "scheduler": scheduler, "transformer": wan_transformer(**config)}


def wan(texts: int = 1, **config) -> Tiny:
    """Wan 2.1 text to video; `config` is the pipeline's."""
    return assemble("WanPipeline", wan_parts(), **config), {**SIZE, **embeddings(texts)}


def wan_22(texts: int = 1) -> Tiny:
    """Wan 2.2 A14B: a second transformer takes over below a sigma."""
    return wan(texts, transformer_2=wan_transformer(seed=1), boundary_ratio=0.7)


def wan_22_5b(texts: int = 1) -> Tiny:
    """Wan 2.2 5B: a timestep for each token."""
    return wan(texts, expand_timesteps=True)


def wan_image(texts: int = 1) -> Tiny:
    """Wan 2.1 image to video: latents of the image and a mask beside the noise, and embeddings of the image."""
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    with seeded(0):
        encoder = CLIPVisionModel(config).eval()
    processor = CLIPImageProcessor(size=8, crop_size=8)
    parts = {**wan_parts(in_channels=2 * CHANNELS + 4, image_dim=8), "image_encoder": encoder}
    pipe = assemble("WanImageToVideoPipeline", {**parts, "image_processor": processor})
    return pipe, {**SIZE, **embeddings(texts), "image": photo()}


def wan_22_5b_image(texts: int = 1) -> Tiny:
    """Wan 2.2 5B image to video: the image is the first latent frame, whose tokens have the timestep 0."""
    parts = {**wan_parts(), "image_encoder": None, "image_processor": None}
    pipe = assemble("WanImageToVideoPipeline", parts, expand_timesteps=True)
    return pipe, {**SIZE, **embeddings(texts), "image": photo()}


def wan_video(texts: int = 1) -> Tiny:
    """Wan 2.1 video to video, from the middle of the schedule."""
    pipe = assemble("WanVideoToVideoPipeline", wan_parts())
    return pipe, {**embeddings(texts), "video": picture(texts, 9, 3, 64, 64), "height": 64, "width": 64}


def wan_vace(texts: int = 1) -> Tiny:
    """Wan 2.1 VACE: control blocks add to the hidden states between blocks."""
    parts = wan_parts(name="WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=2 * CHANNELS + 64)
    return assemble("WanVACEPipeline", parts), {**SIZE, **embeddings(texts), "num_frames": 13}


def skyreels_v2(texts: int = 1) -> Tiny:
    """SkyReels-V2 text to video: Wan's transformer with another time embedding."""
    pipe = assemble("SkyReelsV2Pipeline", wan_parts(name="SkyReelsV2Transformer3DModel"))
    return pipe, {**SIZE, **embeddings(texts)}


# CogVideoX


def cogvideox_parts(scheduler: str = "CogVideoXDPMScheduler", **config) -> dict:
    """The components of a CogVideoX pipeline; `config` is the transformer's."""
    fields = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "time_embed_dim": 8, "text_embed_dim": TEXT_DIM, "num_layers": 2, "sample_width": 8, "sample_height": 8,
        "sample_frames": 9, "max_text_seq_length": TOKENS, "use_rotary_positional_embeddings": True,
    }  # fmt: skip
    vae = build(
        "AutoencoderKLCogVideoX", block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS, layers_per_block=1,
        norm_num_groups=2,
    )  # fmt: skip
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {
        **WITHOUT_TEXT, "vae": vae, "scheduler": getattr(diffusers, scheduler)(**options),
        "transformer": build("CogVideoXTransformer3DModel", **fields | config),
    }  # fmt: skip


def cogvideox(texts: int = 1, **parts) -> Tiny:
    """CogVideoX 5B: rotary positions, the DPM scheduler; guidance in one batch."""
    return assemble("CogVideoXPipeline", cogvideox_parts(**parts)), {**SIZE, **embeddings(texts)}


def cogvideox_2b(texts: int = 1) -> Tiny:
    """CogVideoX 2B: absolute positions, the DDIM scheduler."""
    return cogvideox(texts, scheduler="CogVideoXDDIMScheduler", use_rotary_positional_embeddings=False)


def cogvideox_15(texts: int = 1) -> Tiny:
    """CogVideoX 1.5: patches of two latent frames, the first of which may be padding."""
    pipe, inputs = cogvideox(texts, patch_size_t=2, patch_bias=False)
    return pipe, {**inputs, "num_frames": 17}


def cogvideox_image(texts: int = 1) -> Tiny:
    """CogVideoX 5B image to video: latents of the image beside the noise, learned positions."""
    parts = cogvideox_parts(in_channels=2 * CHANNELS, use_learned_positional_embeddings=True)
    pipe = assemble("CogVideoXImageToVideoPipeline", parts)
    return pipe, {**SIZE, **embeddings(texts), "image": picture(texts, 3, 64, 64)}


def cogvideox_video(texts: int = 1) -> Tiny:
    """CogVideoX 5B video to video, from the middle of the schedule."""
    pipe = assemble("CogVideoXVideoToVideoPipeline", cogvideox_parts())
    return pipe, {**embeddings(texts), "video": picture(texts, 9, 3, 64, 64), "height": 64, "width": 64}


# HunyuanVideo


def hunyuan_vae(**config) -> nn.Module:
    """The autoencoder of HunyuanVideo and Kandinsky 5."""
    fields = {
        "latent_channels": CHANNELS, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
    }  # fmt: skip
    return build("AutoencoderKLHunyuanVideo", **fields | config)


def hunyuan_parts(**config) -> dict:
    """The components of a HunyuanVideo pipeline; `config` is the transformer's."""
    fields = {
        "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": CHANNELS, "out_channels": CHANNELS,
        "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
    }  # fmt: skip
    transformer = build("HunyuanVideoTransformer3DModel", **fields | config)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return {**TWO_ENCODERS, "vae": hunyuan_vae(), "scheduler": scheduler, "transformer": transformer}


def hunyuan_inputs(texts: int) -> dict:
    """Embeddings, pooled embeddings and masks."""
    pooled = {
        "pooled_prompt_embeds": noise(texts, 8, seed=30),
        "negative_pooled_prompt_embeds": noise(1, 8, seed=60).repeat(texts, 1),
    }
    return {**SIZE, **embeddings(texts), **masks(texts), **pooled}


def hunyuan_video(texts: int = 1, **inputs) -> Tiny:
    """HunyuanVideo text to video with guidance in its embedding: a joint sequence, single blocks after double ones."""
    return assemble("HunyuanVideoPipeline", hunyuan_parts()), {**hunyuan_inputs(texts), **inputs}


def hunyuan_video_true_cfg(texts: int = 1) -> Tiny:
    """The same with a negative prompt, in two calls."""
    return hunyuan_video(texts, true_cfg_scale=4.0)


def hunyuan_video_image(texts: int = 1) -> Tiny:
    """HunyuanVideo image to video: the image replaces the first latent frame and its tokens' modulation."""
    parts = {**hunyuan_parts(image_condition_type="token_replace"), "image_processor": None}
    pipe = assemble("HunyuanVideoImageToVideoPipeline", parts)
    return pipe, {**hunyuan_inputs(texts), "image": picture(texts, 3, 64, 64), "true_cfg_scale": 4.0}


def hunyuan_skyreels(texts: int = 1) -> Tiny:
    """SkyReels V1 image to video: the image's latents beside the noise, guidance in two calls without a context."""
    pipe = assemble("HunyuanSkyreelsImageToVideoPipeline", hunyuan_parts(in_channels=2 * CHANNELS))
    return pipe, {**hunyuan_inputs(texts), "image": picture(texts, 3, 64, 64)}


def hunyuan_video_15(texts: int = 1) -> Tiny:
    """HunyuanVideo 1.5 text to video: two text encoders and an image's place in one sequence, guidance by a guider."""
    transformer = build(
        "HunyuanVideo15Transformer3DModel", num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2,
        in_channels=2 * CHANNELS + 1, out_channels=CHANNELS, num_refiner_layers=1, mlp_ratio=2.0,
        text_embed_dim=TEXT_DIM, text_embed_2_dim=12, image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16,
        task_type="t2v",
    )  # fmt: skip
    vae = build(
        "AutoencoderKLHunyuanVideo15", latent_channels=CHANNELS, block_out_channels=(16, 16, 16), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=4, downsample_match_channel=False,
        upsample_match_channel=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=6.0)
    parts = {**TWO_ENCODERS, "transformer": transformer, "vae": vae, "scheduler": scheduler, "guider": guider}
    pipe = assemble("HunyuanVideo15Pipeline", parts)
    pipe.vision_num_semantic_tokens = 3
    text_masks = {key.replace("attention_mask", "embeds_mask"): value for key, value in masks(texts).items()}
    letters = {}  # none are to be drawn
    for sign in ("", "negative_"):
        letters[f"{sign}prompt_embeds_2"] = torch.zeros(texts, 2, 12)
        letters[f"{sign}prompt_embeds_mask_2"] = torch.zeros(texts, 2, dtype=torch.long)
    return pipe, {"height": 32, "width": 32, "num_frames": 9, **embeddings(texts), **text_masks, **letters}


# LTX-Video


def ltx_parts() -> dict:
    """The components of an LTX pipeline."""
    transformer = build(
        "LTXVideoTransformer3DModel", num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=8,
        out_channels=8, cross_attention_dim=WIDTH, num_layers=2, caption_channels=TEXT_DIM,
    )  # fmt: skip
    vae = build(
        "AutoencoderKLLTXVideo", latent_channels=8, block_out_channels=(8, 8, 8, 8), patch_size=1,
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, True, False), decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return {**WITHOUT_TEXT, "transformer": transformer, "vae": vae, "scheduler": scheduler}


def ltx_inputs(texts: int) -> dict:
    """Embeddings and masks; 4 x 4 x 4 latents, one token each."""
    return {"height": 32, "width": 32, "num_frames": 25, **embeddings(texts), **masks(texts)}


def ltx(texts: int = 1) -> Tiny:
    """LTX-Video text to video: latents packed into tokens, guidance in one batch."""
    return assemble("LTXPipeline", ltx_parts()), ltx_inputs(texts)


def ltx_image(texts: int = 1) -> Tiny:
    """LTX-Video image to video: a timestep for each token."""
    return assemble("LTXImageToVideoPipeline", ltx_parts()), {**ltx_inputs(texts), "image": picture(texts, 3, 32, 32)}


def ltx_condition(texts: int = 1) -> Tiny:
    """LTX-Video 0.9.5 and later with an image in mid-video: tokens of the condition before those of the video."""
    pipe = assemble("LTXConditionPipeline", ltx_parts())
    return pipe, {**ltx_inputs(texts), "image": picture(texts, 3, 32, 32), "frame_index": 8}


# Mochi


def mochi(texts: int = 1) -> Tiny:
    """Mochi 1: a joint sequence in which padding of the text is left out, guidance in one batch."""
    transformer = build(
        "MochiTransformer3DModel", num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, num_layers=2,
        pooled_projection_dim=8, in_channels=12, text_embed_dim=TEXT_DIM, time_embed_dim=8, max_sequence_length=TOKENS,
    )  # fmt: skip
    vae = build(
        "AutoencoderKLMochi", encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = assemble("MochiPipeline", {**WITHOUT_TEXT, "transformer": transformer, "vae": vae, "scheduler": scheduler})
    boolean = {name: mask.bool() for name, mask in masks(texts).items()}
    return pipe, {**SIZE, **embeddings(texts), **boolean, "num_frames": 13}


# Kandinsky 5


def kandinsky5(texts: int = 1) -> Tiny:
    """Kandinsky 5 text to video: latents with the channels last, guidance in two calls without a cache context."""
    transformer = build(
        "Kandinsky5Transformer3DModel", in_visual_dim=CHANNELS, out_visual_dim=CHANNELS, in_text_dim=TEXT_DIM,
        in_text_dim2=8, time_dim=16, model_dim=WIDTH, ff_dim=48, num_text_blocks=1, num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    parts = {**TWO_ENCODERS, "transformer": transformer, "vae": hunyuan_vae(), "scheduler": scheduler}
    pooled = {"prompt": noise(texts, 8, seed=30), "negative_prompt": noise(1, 8, seed=60).repeat(texts, 1)}
    inputs = {f"{key}_qwen": value for key, value in embeddings(texts).items()}
    for text, value in pooled.items():
        inputs |= {f"{text}_embeds_clip": value, f"{text}_cu_seqlens": TOKENS * torch.arange(texts + 1)}
    return assemble("Kandinsky5T2VPipeline", parts), {**SIZE, **inputs}


TINY: dict[str, Callable[..., Tiny]] = {
    builder.__name__: builder
    for builder in (
        wan, wan_22, wan_22_5b, wan_image, wan_22_5b_image, wan_video, wan_vace,
        skyreels_v2, cogvideox, cogvideox_2b, cogvideox_15, cogvideox_image, cogvideox_video,
        hunyuan_video, hunyuan_video_true_cfg, hunyuan_video_image, hunyuan_skyreels, hunyuan_video_15,
        ltx, ltx_image, ltx_condition, mochi, kandinsky5,
    )
}  # fmt: skip
EACH_FAMILY = ["wan", "cogvideox", "hunyuan_video", "hunyuan_video_15", "ltx", "mochi", "skyreels_v2", "kandinsky5"]


ENCODED = {
    "wan": ("prompt_embeds", "negative_prompt_embeds"),
    "cogvideox": ("prompt_embeds", "negative_prompt_embeds"),
    "skyreels_v2": ("prompt_embeds", "negative_prompt_embeds"),
    "hunyuan_video": ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
    "ltx": ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
    "mochi": ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"),
    "kandinsky5": ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"),
}  # what each pipeline's `encode_prompt` returns


def encoding(name: str):
    """A tiny pipeline whose text encoder gives the same embeddings for every prompt."""
    pipe, inputs = TINY[name]()
    given = tuple(inputs[part] for part in ENCODED[name])
    pipe.encode_prompt = lambda *_, **__: given
    return pipe
