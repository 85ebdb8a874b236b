"""Model families: where a pipeline's transformers, attentions and token grid are. The only list of them."""

from __future__ import annotations

from diffusers import DiffusionPipeline

from ..errors import AccelError
from .base import Family
from .cogvideox import CogVideoX
from .hunyuan_video import HunyuanVideo, HunyuanVideo15
from .kandinsky5 import Kandinsky5
from .ltx import LTX
from .mochi import Mochi
from .skyreels_v2 import SkyReelsV2
from .wan import Wan

FAMILIES: tuple[Family, ...] = (
    Wan(),
    CogVideoX(),
    HunyuanVideo15(),
    HunyuanVideo(),
    LTX(),
    Mochi(),
    SkyReelsV2(),
    Kandinsky5(),
)

REFUSED = ("HunyuanVideoFramepackPipeline",)  # the history's tokens come before those of the video


def family_of(pipe) -> Family:
    """The family of a diffusers pipeline, by its class or one that it inherits from.

    Raises AccelError if it is not supported.
    """
    name = type(pipe).__name__
    if not isinstance(pipe, DiffusionPipeline):
        raise AccelError(f"{name} is no DiffusionPipeline: give the pipeline itself, such as a WanPipeline")
    for parent in type(pipe).__mro__:
        if parent.__name__ in REFUSED:
            break
        for family in FAMILIES:
            if parent.__name__.startswith(family.pipelines):
                return family
    known = ", ".join(prefix for family in FAMILIES for prefix in family.pipelines)
    raise AccelError(f"{name} is not supported yet; pipelines whose names start with {known} are")
