"""HunyuanVideo and HunyuanVideo 1.5: joint attention with the video first; guidance is embedded, or in two calls."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from .base import Family


class HunyuanVideo(Family):
    """The family of `HunyuanVideoTransformer3DModel`: blocks of two kinds, one after the other."""

    pipelines = ("HunyuanVideo", "HunyuanSkyreels")
    fps = 15
    blocks = ("transformer_blocks", "single_transformer_blocks")
    attention = "attn"
    is_joint = True
    embeds_guidance = True
    remarks = {"fastercache": "yes; a branch to rebuild only with true guidance"}

    def is_guided(self, pipe, call: Mapping[str, Any]) -> bool:
        """Whether a true unconditional branch runs beside the embedded guidance."""
        return bool(call.get("do_true_cfg") or getattr(pipe, "do_classifier_free_guidance", False))


class HunyuanVideo15(Family):
    """The family of `HunyuanVideo15Transformer3DModel`, whose guidance is a guider's."""

    pipelines = ("HunyuanVideo15",)
    fps = 24
    blocks = ("transformer_blocks",)
    attention = "attn"
    is_joint = True
    remarks = {"fittedsolver": "no; guidance is not a number of the run"}

    def is_guided(self, pipe, call: Mapping[str, Any]) -> bool:
        """Whether the guider asks for an unconditional branch."""
        return pipe.guider.num_conditions > 1

    def is_run_guided(self, pipe, call: Mapping[str, Any]) -> bool:
        """Whether the guider asks for one in any step: some begin later or end earlier."""
        guider, times = copy(pipe.guider), pipe.scheduler.timesteps

        def is_on(step: int) -> bool:
            guider.set_state(step, len(times), times[step])
            return guider.num_conditions > 1

        return any(map(is_on, range(len(times))))

    def text_tokens(self, inputs: Mapping[str, Any]) -> int:
        """Tokens of both texts and of the image."""
        names = "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"
        return sum(inputs[name].shape[1] for name in names)
