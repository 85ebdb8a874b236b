"""What `predictor.json` says of a trained predictor."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

# Of a MeanFlow student: ours, or the paper's. Of the base model under guidance: one that also knows the gap.
PredictorForm = Literal["residual", "paper", "guided-base"]
DEPTH = {
    "residual": 1,
    "paper": 1,
    "guided-base": 2,
}  # blocks; one is an eighth of tiny-wan, the paper's two are under 4 %


class PredictorRuns(BaseModel, frozen=True):
    """The runs that a predictor was trained for."""

    supported_runs: dict[int, int]  # number of steps -> most steps from one full step to the next


class PredictorManifest(BaseModel, frozen=True):
    """The fields of `predictor.json` that a run needs."""

    form: PredictorForm
    depth: int = Field(ge=1)  # number of blocks
    student_fingerprint: list[float]  # of the transformer whose features it was trained on
    config: PredictorRuns
