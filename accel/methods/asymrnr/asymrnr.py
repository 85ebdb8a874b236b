"""AsymRnR (Sun et al., arXiv 2412.11706): fewer tokens inside self-attention, restored after it.

Queries, and keys with values, are reduced separately: each by its own similarity and at its own rate. This happens
after normalisation and rotary embedding, so each remaining token keeps its position. Afterwards every removed query
gets the output of the token that it was merged into. Text tokens are never reduced.

Ours, not the paper's: removed tokens are not even projected while a matching is reused. The authors ship schedules of
rates for three models; here one budget is distributed over blocks and steps, by what removing tokens costs there: as
measured (`python -m accel profile` saves it in the model's folder), or by similarity in an early step. And the error of
the reduction is measured at times and corrected between (see `correction`), which makes high rates possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ...core.trace import Trace
from ..base import Method, RunSpec
from .budget import read_profile
from .correction import DEPTH, Correction

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.attention import QKV
    from ...core.host import Host

Rate = Annotated[float, Field(ge=0, le=0.95)]
Matching = Literal["cell", "global", "grid"]


class AsymRnR(Method):
    """Reduces queries and keys/values of the video self-attentions, each at its own rate per block."""

    title: ClassVar[str] = "AsymRnR"
    paper: ClassVar[str] = "arXiv 2412.11706"
    neutral: ClassVar[dict] = {"budget": 1.0}
    basic: ClassVar[tuple[str, ...]] = ("budget", "query_rate", "kv_rate")

    schedule: Literal["profiled", "similarity", "fixed"] = Field(
        "profiled", description="Distribute the budget by measured cost or by similarity per block; or use fixed rates."
    )
    budget: float = Field(
        0.75, ge=0.2, le=1, multiple_of=0.01, description="Share of the attention work to compute; lower blurs first."
    )
    query_rate: float = Field(
        0.85, ge=0, le=0.95, multiple_of=0.05, description="Most queries removed in a block; higher loses fine motion."
    )
    kv_rate: float = Field(
        0.85, ge=0, le=0.95, multiple_of=0.05, description="Most keys and values removed in a block; higher blurs."
    )
    threshold: float = Field(
        0.0, ge=0, le=1, multiple_of=0.01, description="Fixed rates act in blocks at least this similar; 0: in all."
    )
    start: float = Field(
        0.1, ge=0, le=1, multiple_of=0.01, description="Share of the steps before the first reduced one, at least one."
    )
    cell: Literal["1x2x2", "2x2x2", "3x2x2", "6x2x2"] = Field(
        "2x2x2", description="Frames x rows x columns of a cell, in which one token always stays; larger blurs more."
    )
    matching: Matching = Field(
        "cell",
        description="Tokens merge into their cell's token, the most similar of all (slow), or their cell's unsorted.",
    )
    metric: Literal["euclidean", "cosine", "dot"] = Field("euclidean", description="How similarity is measured.")
    heads: Literal["shared", "separate"] = Field(
        "shared", description="One matching for all heads, or one for each (slower, more memory)."
    )
    pairing: Literal["asymmetric", "one"] = Field(
        "asymmetric", description="Match queries and keys separately, or use the queries' matching for both."
    )
    merge: Literal["mean", "values", "replace"] = Field(
        "values", description="Average removed tokens into the one that stays, average only their values, or drop them."
    )
    bias: bool = Field(True, description="Weight a merged key by its number of tokens; without, merged regions fade.")
    correction: Correction = Field(
        "linear", description="Add back the error of the reduction: the last one, or extrapolated (twice the memory)."
    )
    interval: int = Field(
        0,
        ge=0,
        le=10,
        description="Steps between matchings, or between corrections; 0 chooses from the step count.",
    )
    profile: str = Field(
        "",
        description="File of measured costs; empty: the one in the model's folder.",
        json_schema_extra={"page": False},
    )
    rates: dict[str, Annotated[list[tuple[Rate, Rate]], Field(min_length=1)]] = Field(
        {},
        description="Fixed (query, key/value) rates by block, one pair for each phase of the steps.",
        json_schema_extra={"page": False},
    )

    @field_validator("profile")
    @classmethod
    def _is_profile(cls, profile: str) -> str:
        if profile:
            read_profile(Path(profile))
        return profile

    @model_validator(mode="after")
    def _rates_are_possible(self) -> AsymRnR:
        if self.rates and self.schedule != "fixed":
            raise ValueError(f"rates per block need schedule fixed, not {self.schedule}")
        most = 1 - 1 / math.prod(self.cell_shape)
        highest = max(map(max, self.rate_pairs))
        if self.schedule == "fixed" and highest > most + 1e-9:
            raise ValueError(f"rate {highest} is not possible: cells of {self.cell} allow 0 to {most:.3f}")
        return self

    @property
    def is_neutral(self) -> bool:
        """Whether the budget is all of the work; fixed rates have none."""
        return super().is_neutral and self.schedule != "fixed"

    @property
    def cell_shape(self) -> tuple[int, ...]:
        """Tokens (f, h, w) of a cell."""
        return tuple(int(n) for n in self.cell.split("x"))

    @property
    def rate_pairs(self) -> list[tuple[float, float]]:
        """The fixed (query, key/value) rates, or the highest that a budget may choose."""
        return [pair for phases in self.rates.values() for pair in phases] or [(self.query_rate, self.kv_rate)]

    def first_step(self, count: int) -> int:
        """The first of `count` steps in which tokens may be removed."""
        return max(1, round(self.start * count))

    def steps_between(self, count: int, student: bool = False) -> int:
        """Steps from one matching, or with correction from one full attention, to the next: more if steps are small."""
        if self.correction == "none":
            return self.interval or (1 if count <= 8 or student else 3 if count <= 30 else 5)
        return self.interval or (2 if count <= 8 else 3 if count <= 30 else 4)

    def corrects(self, count: int) -> bool:
        """Whether a run of `count` steps measures errors, and corrects them in the steps between."""
        return self.correction != "none" and self.steps_between(count) > 1

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes of matchings and reductions of queries and keys in every attention, and of the residuals."""
        tokens = spec.tokens
        attentions = spec.num_layers * (1 + spec.guided)
        # At most, in int32: order and destinations of a matching, and the four tensors of a reduction.
        indices = 6 * tokens * (1 if self.heads == "shared" else spec.family.num_heads(spec.model))
        matchings = 4 * indices * 2 * attentions
        depth = DEPTH[self.correction] if self.corrects(spec.count) else 0
        return matchings + depth * attentions * tokens * spec.token_bytes

    def inactive_reason(self, spec: RunSpec) -> str:
        """No step may be reduced, or no rate is above zero."""
        reduces = max(map(max, self.rate_pairs)) and (self.schedule == "fixed" or self.budget < 1)
        first = self.first_step(spec.count) + self.corrects(spec.count)  # before, an error is measured
        if reduces and first < spec.count:
            return ""
        return "AsymRnR does nothing: at these settings no token is removed"

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the attention cores inside the context."""
        from .reducer import Reducer

        reducer = host.per_run(lambda: Reducer(self, host))

        def core(inner: Callable[[QKV], Tensor], qkv: QKV, layer: str) -> Tensor:
            return reducer().attend(inner, qkv, layer)

        with host.wrap_qkv(core):
            yield
