"""DBCache: the cache of the package cache-dit, as a method beside ours.

cache-dit is a package of its own, which need not be installed. Its cache is enabled by its public interface on each
transformer alone, because on a pipeline it would change the pipeline's class. Its parameters have cache-dit's names.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ..core.trace import Trace
from ..errors import AccelError
from .base import Peer, RunSpec

if TYPE_CHECKING:
    from torch import nn

    from ..core.foreign import CacheDit
    from ..core.host import Host
    from ..families import Family

INSTALL = "pip install cache-dit==1.5.3"  # the version that the tests know
MAX_TEXT = 512  # tokens of a text at most, in models whose blocks attend to it and do not change it


class DBCache(Peer):
    """cache-dit's cache of the residual of the middle blocks, where that of the first ones has changed little."""

    title: ClassVar[str] = "DBCache (cache-dit)"
    paper: ClassVar[str] = ""
    skips_blocks: ClassVar[bool] = True
    neutral: ClassVar[dict] = {"residual_diff_threshold": 0.0}
    basic: ClassVar[tuple[str, ...]] = ("residual_diff_threshold", "taylorseer_order", "max_continuous_cached_steps")

    residual_diff_threshold: float = Field(
        0.08, ge=0, le=1, multiple_of=0.01, description="Change of the first blocks' residual; more loses shape."
    )
    taylorseer_order: int = Field(
        0, ge=0, le=2, description="Order of the series that continues the residual; 0 reuses the last one."
    )
    max_continuous_cached_steps: int = Field(-1, ge=-1, le=50, description="Skipped steps in a row; -1 for no limit.")
    max_warmup_steps: int = Field(8, ge=0, le=50, description="First steps that are always full.")
    Fn_compute_blocks: int = Field(1, ge=1, le=60, description="First blocks, which every step computes.")
    Bn_compute_blocks: int = Field(0, ge=0, le=60, description="Last blocks, which every step computes.")

    @classmethod
    def is_installed(cls) -> bool:
        """Whether cache-dit is there."""
        return find_spec("cache_dit") is not None

    def config(self, host: Host) -> dict[str, Any]:
        """cache-dit's configuration for the run that begins; it must know whether a step has two calls."""
        from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

        two_calls = host.is_guided and not host.family.batches_guidance
        cache = DBCacheConfig(**self.model_dump(exclude={"taylorseer_order"}), enable_separate_cfg=two_calls)
        order = self.taylorseer_order
        taylor = {"calibrator_config": TaylorSeerCalibratorConfig(taylorseer_order=order)} if order else {}
        return {"cache_config": cache, **taylor}

    def new_cache(self, host: Host, model: nn.Module) -> CacheDit:
        """cache-dit's cache for one denoiser."""
        from ..core.foreign import CacheDit

        return CacheDit(model, host.family, lambda: self.config(host))

    def num_full_steps(self, count: int) -> int:
        """The first ones, the very first among them."""
        return max(1, self.max_warmup_steps)

    def cached_states(self, spec: RunSpec) -> float:
        """For each list of blocks the residual of the first ones, and that of the others or two series of it.

        Where blocks return no text, cache-dit caches a residual of it all the same.
        """
        order, lists = self.taylorseer_order, len(spec.family.block_lists(spec.model))
        middle = 2 * (1 + order) if order else 1
        text = 0 if spec.family.is_joint else MAX_TEXT * len(spec.latents) / spec.tokens
        return lists * (1 + middle * (1 + text))

    def check_model(self, family: Family, model: nn.Module) -> None:
        """Raise AccelError also without cache-dit, for a model that it does not know, and for too few blocks."""
        if not self.is_installed():
            raise AccelError(f"{self.title} needs the package cache-dit, which is not installed: {INSTALL}")
        from cache_dit import BlockAdapterRegister

        super().check_model(family, model)
        if not BlockAdapterRegister.is_supported(model):
            self.refuse("cache-dit does not know this model", model)
        fewest = min(len(blocks) for blocks in family.block_lists(model).values())
        if (computed := self.Fn_compute_blocks + self.Bn_compute_blocks) > fewest:
            self.refuse(f"Fn_compute_blocks and Bn_compute_blocks make {computed} blocks, and it has {fewest}", model)

    def _record(self, host: Host, trace: Trace, cache: CacheDit, batch: int) -> bool:
        """Record what a call skipped. Raises AccelError if cache-dit took it for one of the other branch."""
        if cache.is_second_call != (host.step.branch != "cond"):
            self.refuse(
                "cache-dit tells the branches of guidance apart by counting calls, and this run does not call them "
                "in turn"
            )
        return super()._record(host, trace, cache, batch)
