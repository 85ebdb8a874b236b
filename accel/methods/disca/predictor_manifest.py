"""What `predictor.json` says of a trained predictor."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

# Of a MeanFlow student: ours, or the paper's. Of the base model under guidance: one that also knows the gap.
PredictorForm = Literal["residual", "paper", "guided-base"]
DEPTH = {"residual": 1, "paper": 1, "guided-base": 2}  # blocks; one is an eighth of tiny-wan, the paper's two under 4 %


def predictor_flops(form: PredictorForm, depth: int, tokens: int, width: int, block: int) -> int:
    """FLOPs of one call on `tokens` tokens (b n) of `width`: its blocks, each of `block` FLOPs, and its linear layers.

    Two join the tokens and the cached feature; all forms but the paper's have another one at the end.
    """
    squares = 3 if form == "paper" else 4
    return depth * block + 2 * tokens * squares * width**2


class PredictorRuns(BaseModel, frozen=True):
    """The runs that a predictor was trained for."""

    supported_runs: dict[int, int]  # number of steps -> most steps from one full step to the next


class PredictorManifest(BaseModel, frozen=True):
    """The fields of `predictor.json` that a run needs."""

    form: PredictorForm
    depth: int = Field(ge=1)  # number of blocks
    student_fingerprint: list[float]  # of the transformer whose features it was trained on
    config: PredictorRuns
