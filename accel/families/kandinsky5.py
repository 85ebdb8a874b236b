"""Kandinsky 5: self-attention over the video alone, latents with the channels last; guidance in two calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import AccelError
from .base import Family, Grid


class Kandinsky5(Family):
    """The family of `Kandinsky5Transformer3DModel`; its latents are (b, f, h, w, c)."""

    pipelines = ("Kandinsky5",)
    fps = 24
    blocks = ("visual_transformer_blocks",)
    attention = "self_attention"
    latent_format = "BFHWC"
    remarks = {"fittedsolver": "no; its model takes more than the sample"}

    def denoisers(self, pipe) -> list[nn.Module]:
        """The pipeline's transformer. Raises AccelError if it has none, or one with sparse attention."""
        found = super().denoisers(pipe)
        if found[0].config.get("attention_type") == "nabla":
            raise AccelError(
                "Kandinsky 5 with sparse attention (attention_type nabla, the checkpoints of 10 seconds) is not "
                "supported: take one with regular attention"
            )
        return found

    def to_video(self, y: Tensor, grid: Grid) -> Tensor:
        """A velocity as a view (b, c, f, h, w)."""
        return y.permute(0, 4, 1, 2, 3)

    def from_video(self, y: Tensor) -> Tensor:
        """The velocity as (b, f, h, w, c)."""
        return y.permute(0, 2, 3, 4, 1)

    def in_channels(self, model: nn.Module) -> int:
        """Latent channels of the video; the model adds those of a given image itself."""
        return model.config.in_visual_dim

    def out_channels(self, model: nn.Module) -> int:
        """Latent channels of the video, before those of a given image."""
        return model.config.out_visual_dim

    def hidden_size(self, model: nn.Module) -> int:
        """Width d of a token inside the blocks."""
        return model.config.model_dim

    def num_heads(self, model: nn.Module) -> int:
        """Heads k of a self-attention."""
        return model.visual_transformer_blocks[0].self_attention.num_heads

    def is_guided(self, pipe, call: Mapping[str, Any]) -> bool:
        """Whether an unconditional branch runs."""
        return pipe.guidance_scale > 1 and call.get("negative_prompt_embeds_qwen") is not None
