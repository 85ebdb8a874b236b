"""Peers: the caches that diffusers ships, as methods beside ours.

A peer enables diffusers' own cache by its public interface, with diffusers' own defaults, and changes nothing in it.
What it skipped is what its hooks did not call. Its parameters have diffusers' names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationError

from ..core.trace import Action
from ..errors import AccelError
from .base import Peer, RunSpec, model_path

if TYPE_CHECKING:
    from torch import nn

    from ..core.foreign import DiffusersCache
    from ..core.host import Host
    from ..families import Family

RATIOS = "magcache.json"  # file of calibrated ratios in a model's folder


class DiffusersPeer(Peer):
    """One of diffusers' caches on every denoiser."""

    needs_batched_guidance: ClassVar[bool] = False  # it would mix up branches that are computed one after the other

    def config(self, host: Host, model: nn.Module) -> Any:
        """Diffusers' configuration of the cache for one denoiser."""
        raise NotImplementedError

    def new_cache(self, host: Host, model: nn.Module) -> DiffusersCache:
        """Diffusers' cache for one denoiser."""
        from ..core.foreign import DiffusersCache

        return DiffusersCache(model, self.config(host, model))

    def check(self, spec: RunSpec) -> None:
        """Raise AccelError also where the cache would mix up the branches."""
        super().check(spec)
        self._check_branches(spec.family, spec.guided, "this pipeline")

    def _check_branches(self, family: Family, is_guided: bool, pipeline: str) -> None:
        if self.needs_batched_guidance and is_guided and not family.batches_guidance:
            self.refuse(
                f"it would mix up the branches of guidance, which {pipeline} computes one after the other: choose "
                "a guidance of 1, or a model that computes both at once, such as CogVideoX"
            )

    def check_model(self, family: Family, model: nn.Module) -> None:
        """Raise AccelError also for a class of blocks that diffusers must know, and does not."""
        from diffusers.hooks._helpers import TransformerBlockRegistry

        super().check_model(family, model)
        blocks = [block for blocks in family.block_lists(model).values() for block in blocks]
        for block in blocks if self.skips_blocks else ():
            try:
                TransformerBlockRegistry.get(type(block))
            except ValueError:
                self.refuse(f"diffusers has not registered {type(block).__name__} for it", model)

    def check_run(self, host: Host) -> None:
        """Raise AccelError where the cache cannot run in a pipeline, or would mix up its branches."""
        name = type(host.pipe).__name__
        if not self.needs_batched_guidance and host.cache_context is None:
            self.refuse(f"{name} does not name its calls by a cache_context")
        self._check_branches(host.family, host.is_guided, name)
        if self.needs_batched_guidance and not hasattr(host.pipe, "current_timestep"):
            self.refuse(f"{name} does not tell its current_timestep")


class SeaCache(DiffusersPeer):
    """Diffusers' cache of the residual of all blocks, where the filtered latents have changed little."""

    title: ClassVar[str] = "SeaCache (diffusers)"
    paper: ClassVar[str] = "arXiv 2602.18993"
    skips_blocks: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"threshold": 0.0}
    basic: ClassVar[tuple[str, ...]] = ("threshold", "max_consecutive_cached")

    threshold: float = Field(
        0.25, ge=0, le=2, multiple_of=0.01, description="Change from one full step to the next; more loses shape."
    )
    residual_order: int = Field(1, ge=0, le=1, description="0 reuses the last residual, 1 continues the last two.")
    retention_steps: int = Field(1, ge=0, le=50, description="First steps that are always full.")
    cache_end_steps: int = Field(1, ge=0, le=50, description="Last steps that are always full.")
    max_consecutive_cached: int = Field(2, ge=0, le=50, description="Skipped steps in a row; 0 for no limit.")

    def config(self, host: Host, model: nn.Module) -> Any:
        """Diffusers' `SeaCacheConfig`."""
        from diffusers.hooks import SeaCacheConfig

        return SeaCacheConfig(**self.model_dump())

    def num_full_steps(self, count: int) -> int:
        """The first ones, the very first among them, and the last ones."""
        return max(1, self.retention_steps) + self.cache_end_steps

    def cached_states(self, spec: RunSpec) -> float:
        """One residual for each order, and the filtered latents, which are compared in 32 bits at most."""
        return 1 + self.residual_order + 4 * spec.latents.numel() / (spec.tokens * spec.token_bytes)

    def check_run(self, host: Host) -> None:
        """Raise AccelError also where the pipeline does not tell the noise level."""
        super().check_run(host)
        if host.cache_context.sigma is None:
            self.refuse(
                f"{type(host.pipe).__name__} does not tell its cache_context the noise level, as WanPipeline does"
            )


class TaylorSeer(DiffusersPeer):
    """Diffusers' Taylor series of the outputs of modules, between full steps at a fixed interval."""

    title: ClassVar[str] = "TaylorSeer (diffusers)"
    paper: ClassVar[str] = "arXiv 2503.06923"
    neutral: ClassVar[dict] = {"cache_interval": 1}
    basic: ClassVar[tuple[str, ...]] = ("cache_interval", "modules")

    cache_interval: int = Field(5, ge=1, le=20, description="Steps from one full step to the next; more loses shape.")
    disable_cache_before_step: int = Field(3, ge=1, le=50, description="First steps that are always full.")
    max_order: int = Field(1, ge=0, le=4, description="Order of the series: 0 reuses the last output.")
    modules: Literal["attention", "all", "lite"] = Field(
        "attention",
        description="Predicted: attentions (diffusers' default), also feed-forwards (the paper), or the output alone.",
    )

    def config(self, host: Host, model: nn.Module) -> Any:
        """Diffusers' `TaylorSeerCacheConfig`. Its default patterns match no attention of Wan, so names are given."""
        from diffusers.hooks import TaylorSeerCacheConfig

        names = None if self.modules == "lite" else [re.escape(name) for name in self._names(host.family, model)]
        return TaylorSeerCacheConfig(
            **self.model_dump(exclude={"modules"}), cache_identifiers=names, use_lite_mode=self.modules == "lite"
        )

    def num_full_steps(self, count: int) -> int:
        """The first ones."""
        return self.disable_cache_before_step

    def cached_states(self, spec: RunSpec) -> float:
        """The factors of each module, in 16 bits; of the output alone they are smaller."""
        modules = 1 if self.modules == "lite" else len(self._names(spec.family, spec.model))
        return modules * (1 + self.max_order) * 2 / spec.latents.element_size()

    def _names(self, family: Family, model: nn.Module) -> list[str]:
        """The attentions, and perhaps the feed-forwards, of all blocks."""
        from diffusers.hooks._common import _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES

        kinds = _ATTENTION_CLASSES + (_FEEDFORWARD_CLASSES if self.modules == "all" else ())
        blocks = {name: model.get_submodule(name) for name in family.block_names(model)}
        return [f"{name}.{part}" for name, block in blocks.items() for part, module in block.named_children()
                if isinstance(module, kinds)]  # fmt: skip


class FirstBlockCache(DiffusersPeer):
    """Diffusers' cache of the residual of all blocks but the first, where that of the first has changed little."""

    title: ClassVar[str] = "FirstBlockCache (diffusers)"
    paper: ClassVar[str] = ""
    skips_blocks: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"threshold": 0.0}
    basic: ClassVar[tuple[str, ...]] = ("threshold",)

    threshold: float = Field(
        0.05, ge=0, le=1, multiple_of=0.01, description="Change of the first block's residual; more loses shape."
    )

    def config(self, host: Host, model: nn.Module) -> Any:
        """Diffusers' `FirstBlockCacheConfig`."""
        from diffusers.hooks import FirstBlockCacheConfig

        return FirstBlockCacheConfig(threshold=self.threshold)

    def cached_states(self, spec: RunSpec) -> float:
        """The first block's output and residual, and the residual of the others."""
        return 3


class MagCache(DiffusersPeer):
    """Diffusers' cache of the residual of all blocks, where calibrated ratios of its magnitude stay near 1."""

    title: ClassVar[str] = "MagCache (diffusers)"
    paper: ClassVar[str] = "arXiv 2506.09045"
    skips_blocks: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"max_skip_steps": 0}
    basic: ClassVar[tuple[str, ...]] = ("threshold", "max_skip_steps", "retention_ratio")

    threshold: float = Field(
        0.06, ge=0, le=1, multiple_of=0.01, description="Accumulated error of skipped steps; more loses shape."
    )
    max_skip_steps: int = Field(3, ge=0, le=20, description="Skipped steps in a row.")
    retention_ratio: float = Field(
        0.2, ge=0, le=1, multiple_of=0.01, description="Share of the first steps that are always full."
    )

    ratios: str = Field(
        "",
        description="File of calibrated ratios; empty: the one in the model's folder.",
        json_schema_extra={"page": False},
    )

    def config(self, host: Host, model: nn.Module) -> Any:
        """Diffusers' `MagCacheConfig`. Raises AccelError without calibrated ratios."""
        return self._config(host, 1)

    def _config(self, host: Host, count: int) -> Any:
        """That for a run of `count` steps, which diffusers stretches the ratios to."""
        from diffusers.hooks import MagCacheConfig

        ratios = read_ratios(self._file(model_path(host))).ratios
        return MagCacheConfig(**self.model_dump(exclude={"ratios"}), mag_ratios=ratios, num_inference_steps=count)

    def _file(self, model: str | Path) -> Path:
        return Path(self.ratios) if self.ratios else Path(model) / RATIOS

    def files(self, model: str | Path) -> list[Path]:
        """The calibrated ratios."""
        return [file for file in [self._file(model)] if file.is_file()]

    def num_full_steps(self, count: int) -> int:
        """The first ones, the very first among them."""
        return max(1, int(self.retention_ratio * count + 0.5))

    def cached_states(self, spec: RunSpec) -> float:
        """The last residual, and the input of the blocks."""
        return 2

    def check_run(self, host: Host) -> None:
        """Raise AccelError also for two transformers; the cache learns how many steps the run has."""
        super().check_run(host)
        if len(host.denoisers) > 1:
            self.refuse("its ratios belong to the steps of one transformer, and this pipeline has two")
        vars(host.caches[0].config).update(vars(self._config(host, host.step.count)))


class PyramidAttentionBroadcast(DiffusersPeer):
    """Diffusers' reuse of attention outputs at a fixed interval, in the middle of the run."""

    title: ClassVar[str] = "PyramidAttentionBroadcast (diffusers)"
    paper: ClassVar[str] = "arXiv 2408.12588"
    action: ClassVar[Action] = "reuse"
    needs_batched_guidance: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"spatial_attention_block_skip_range": 1, "cross_attention_block_skip_range": 1}
    basic: ClassVar[tuple[str, ...]] = ("spatial_attention_block_skip_range", "cross_attention_block_skip_range")

    spatial_attention_block_skip_range: int = Field(2, ge=1, le=20, description="Steps that share a self-attention.")
    cross_attention_block_skip_range: int = Field(
        1, ge=1, le=20, description="Steps that share a cross-attention, with the same limits; 1 for none."
    )
    first_timestep: int = Field(800, ge=0, le=1000, description="Timestep below which outputs are reused.")
    last_timestep: int = Field(100, ge=0, le=1000, description="Timestep above which outputs are reused.")

    def config(self, host: Host, model: nn.Module) -> Any:
        """Diffusers' `PyramidAttentionBroadcastConfig`."""
        from diffusers.hooks import PyramidAttentionBroadcastConfig

        span, cross = (self.last_timestep, self.first_timestep), self.cross_attention_block_skip_range
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=self.spatial_attention_block_skip_range,
            cross_attention_block_skip_range=cross if cross > 1 else None,
            spatial_attention_timestep_skip_range=span, cross_attention_timestep_skip_range=span,
            current_timestep_callback=lambda: _timestep(host),
        )  # fmt: skip

    def cached_states(self, spec: RunSpec) -> float:
        """The output of each attention; HunyuanVideo has two more for its text, which count as one."""
        return (spec.num_layers + spec.family.is_joint) * (1 if self.cross_attention_block_skip_range == 1 else 2)


class DiffusersFasterCache(DiffusersPeer):
    """Diffusers' FasterCache: attention outputs are extrapolated, and the unconditional half of a batch rebuilt."""

    title: ClassVar[str] = "FasterCache (diffusers)"
    paper: ClassVar[str] = "arXiv 2410.19355"
    action: ClassVar[Action] = "reuse"
    needs_batched_guidance: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"spatial_attention_block_skip_range": 1, "unconditional_batch_skip_range": 1}
    basic: ClassVar[tuple[str, ...]] = ("spatial_attention_block_skip_range", "unconditional_batch_skip_range")

    spatial_attention_block_skip_range: int = Field(2, ge=1, le=20, description="Steps that share a self-attention.")
    unconditional_batch_skip_range: int = Field(5, ge=1, le=20, description="Steps that share an unconditional half.")
    attention_timestep: int = Field(681, ge=0, le=1001, description="Timestep below which attention is extrapolated.")
    unconditional_timestep: int = Field(641, ge=0, le=1001, description="Timestep below which the half is rebuilt.")

    def config(self, host: Host, model: nn.Module) -> Any:
        """Diffusers' `FasterCacheConfig`; where guidance is no batch, it extrapolates attention alone."""
        from diffusers.hooks import FasterCacheConfig

        return FasterCacheConfig(
            spatial_attention_block_skip_range=self.spatial_attention_block_skip_range,
            unconditional_batch_skip_range=self.unconditional_batch_skip_range,
            spatial_attention_timestep_skip_range=(-1, self.attention_timestep),
            unconditional_batch_timestep_skip_range=(-1, self.unconditional_timestep),
            attention_weight_callback=lambda module: 0.5, tensor_format=host.family.latent_format,
            is_guidance_distilled=not host.family.batches_guidance,
            current_timestep_callback=lambda: _timestep(host),
        )  # fmt: skip

    def cached_states(self, spec: RunSpec) -> float:
        """The last two outputs of each self-attention, of one branch."""
        return 2 * spec.num_layers

    def check_model(self, family: Family, model: nn.Module) -> None:
        """Raise AccelError also for latents in a format that diffusers does not know."""
        super().check_model(family, model)
        if family.latent_format not in ("BCFHW", "BFCHW"):
            self.refuse("diffusers does not know the format of its latents", model)

    def check_run(self, host: Host) -> None:
        """Raise AccelError also for half a batch."""
        super().check_run(host)
        if host.family.batches_guidance and not host.is_guided:
            self.refuse("it halves the batch of guidance, and this run has none: choose a guidance above 1")


def _timestep(host: Host) -> int:
    """That of the pipeline that runs, which may be another one with this transformer."""
    from ..core.calls import running_call

    return running_call(host.pipe)[0].current_timestep


class Ratios(BaseModel):
    """MagCache's calibration of a model: for each step, the magnitude of the residual over that of the step before."""

    steps: int
    ratios: list[float] = Field(min_length=1)


def read_ratios(path: Path) -> Ratios:
    """The ratios in a file. Raises AccelError if there is no such file or it holds no ratios."""
    try:
        return Ratios.model_validate_json(path.read_bytes())
    except OSError:
        raise AccelError(
            f"MagCache (diffusers) finds no ratios in {path}: measure them by `python -m accel calibrate`"
        ) from None
    except ValidationError:
        raise AccelError(f"{path.name} holds no ratios: measure them by `python -m accel calibrate`") from None
