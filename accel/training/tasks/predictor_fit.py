"""Training DisCa's predictor (arXiv 2602.05449) on the ways of the student that it will serve, at its own steps.

Each slot goes its way in a run as it is served: with so many whole passes, the anchors, spread as ever. There the
output of the student's blocks is cached; at the steps between, the predictor has that and the current tokens, and the
slot goes on as it says. It learns to come where whole passes since the anchor would have come: also back from where
its own errors have led. First by squared error, then with a discriminator on the frozen student's features one step on
(hinge, on both sides). The paper, as far as it says, holds predictions against the student where the student has come.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import reduce
from pydantic import BaseModel, Field, computed_field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from ...methods.disca.disca import max_gap, select_full_steps
from ...methods.disca.predictor import Predictor
from ...ops.flow import euler, expand_like
from ...students.interval_embedding import pack_timestep
from ..discriminator import Discriminator, accuracy, hinge
from ..feature_probe import FeatureProbe
from ..optim import OptimConfig
from ..rollouts import MeanFlowContext, TrajectoryPool


class PredictorConfig(BaseModel, frozen=True, extra="forbid"):
    """What both stages do, apart from their optimizers."""

    steps: int = Field(20, ge=2)  # of the student, when it is served
    strides: tuple[int, ...] = (1, 2)  # or when it goes two of these steps in one: a run of half as many
    full: tuple[int, int] = (7, 12)  # fewest and most whole passes in a run of all steps; fewer in one of fewer
    guidance: tuple[float, float]
    feature: float = Field(0.1, ge=0)  # weight of the error to the feature of the whole pass beside, by its variance
    sharpen: float = Field(0.1, ge=0)  # weight of the discriminator in the second stage
    trajectories: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _predicts(self) -> PredictorConfig:
        for stride in self.strides:
            if self.steps % stride or self._counts(stride)[1] >= self.steps // stride:
                raise ValueError(f"runs of {self.steps} steps, {stride} in one, leave nothing to predict")
        return self

    def _counts(self, stride: int) -> tuple[int, int]:
        """Fewest and most whole passes of a run."""
        fewest = max(2, math.ceil(self.full[0] / stride))
        return fewest, max(fewest, self.full[1] // stride)

    @computed_field
    @property
    def supported_runs(self) -> dict[int, int]:
        """The runs that come up: by their steps, how many of these lie from an anchor to the next at most."""
        counts = {self.steps // stride: self._counts(stride)[0] for stride in self.strides}
        return {count: max_gap(select_full_steps(full, count)) for count, full in counts.items()}

    def run(self, rng: random.Random) -> tuple[int, list[int]]:
        """How many levels each step of a run goes on, and the run's anchors, as places on the grid of all steps."""
        stride = rng.choice(self.strides)
        return stride, [
            stride * step for step in select_full_steps(rng.randint(*self._counts(stride)), self.steps // stride)
        ]


class PredictorWithDiscriminator(nn.Module):
    """All that learns. Its forward is a whole lesson, so that with several processes gradients meet."""

    def __init__(self, predictor: Predictor, judge: Discriminator):
        super().__init__()
        self.predictor, self.judge = predictor, judge

    def forward(self, lesson: Callable[[PredictorWithDiscriminator], Tensor]) -> Tensor:
        return lesson(self)


class PredictorTask:
    """Both stages; a process carries its share of the slots."""

    diverged = False
    stages = {"regression": 1, "adversarial": 1}

    def __init__(
        self, optim: OptimConfig, config: PredictorConfig, student: FeatureProbe, predictor: Predictor, context: MeanFlowContext,
        tokens: tuple[int, int, int], share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        """`tokens`: the student's grid of them; `share`: which process this is, of how many."""
        self.optim, self.config, self.student, self.context = optim, config, student, context
        self.tokens, self.nets = tokens, self
        width = predictor.fuse[-1].out_features
        self.trajectories = TrajectoryPool(context, config.trajectories, share, optim.seed)
        device = self.trajectories.x.device
        count = len(self.trajectories)
        self.cached = torch.zeros(count, tokens[0] * tokens[1] * tokens[2], width, device=device)
        self.way = self.trajectories.x.clone()  # where whole passes since the last anchor have led each slot
        judge = Discriminator(width, len(student.layers))
        self.module = PredictorWithDiscriminator(predictor, judge).to(device)
        self.stage = 0

    @property
    def stage(self) -> int:
        """Which stage is on; the discriminator learns in the second one alone."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self._stage = stage
        self.module.judge.requires_grad_(stage == 1)

    @property
    def best(self) -> bool:
        """Whether the best one seen is to be kept: what is looked at is squared error, the first stage's aim."""
        return self.stage == 0

    def matrices(self) -> list[nn.Parameter]:
        return [p for p in self.module.predictor.parameters() if p.ndim == 2]

    def loss(self, model: nn.Module, step: int, seed: int) -> tuple[Tensor, dict[str, float]]:
        """The predictor's error at the slots between anchors; then all move on.

        Where a process has none, whole passes carry its slots to the next ones.
        """
        logs: dict[str, float] = {}
        while self.runs()[1].all():
            v, feature = self._whole()
            self._move(v, v, feature)
        return model(lambda own: self._lesson(own, logs)), logs

    def _lesson(self, own: PredictorWithDiscriminator, logs: dict[str, float]) -> Tensor:
        trajectories, (_, anchor) = self.trajectories, self.runs()
        x, words, (now, then, time, after) = trajectories.x, trajectories.words, self._time()
        v, feature = self._whole()
        u, guess = self.student.predicted(own.predictor, self.cached, x, time, words)
        supported_runs = (~anchor).to(u)  # at anchors nothing is predicted
        shares = supported_runs / reduce(
            supported_runs.sum(), "mean"
        )  # over processes, as gradients are: each slot counts as much
        each = lambda y: y.flatten(1).square().mean(1)
        aim = v + (self.way - x) / expand_like(then - now, x)  # from where the slot is to where the whole pass leads
        error = (shares * each(u - aim) / each(v)).sum()
        similarity = (shares * each(guess - feature) / feature.flatten(1).var(1)).sum()
        logs |= {"velocity": error.item(), "feature": similarity.item()}
        loss = error + self.config.feature * similarity
        if self.stage == 1:
            ends = [euler(x, way, now, then) for way in (aim, u)]
            loss = loss + self._judged(own.judge, ends, after, words, shares, logs)
        self._move(u.detach(), v, feature)
        return loss

    @torch.no_grad()
    def _whole(self) -> tuple[Tensor, Tensor]:
        """The student's velocities and last features on the ways of whole passes; at anchors the slots are there."""
        return self.student.whole(self.way, self._time()[2], self.trajectories.words)

    def runs(self) -> tuple[Tensor, Tensor]:
        """Of each slot's run: how many levels its step goes on (s,), and whether that is an anchor's (s,)."""
        runs = [self.config.run(rng) for rng in self.trajectories.rngs("run")]
        anchor = [place in anchors for place, (_, anchors) in zip(self.trajectories.index.tolist(), runs, strict=True)]
        return torch.tensor([stride for stride, _ in runs]), torch.tensor(anchor)

    def _time(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Levels of the slots' steps, now and then, and what the student is told of these, and of the place behind."""
        place = self.trajectories.index
        now, then = (self.context.levels[i].float() for i in (place, place + self.runs()[0]))
        w = self.trajectories.uniform(*self.config.guidance, "guidance")
        return now, then, *(pack_timestep(start, then, w).to(self.trajectories.x.device) for start in (now, then))

    def _judged(self, judge: Discriminator, ends: list[Tensor], after, words, shares: Tensor, logs: dict) -> Tensor:
        """The discriminator's loss, and the predictor's for being told apart, from features at the true and its end.

        Each slot counts by its share (s,): none at anchors, where nothing is predicted.
        """
        with torch.no_grad():
            real = self.student.features(ends[0], after, words)
        told = self.student.features(ends[1], after, words)
        judge.requires_grad_(False)
        generator_loss = hinge(judge(told, self.tokens), True, shares)
        judge.requires_grad_(True)
        kinds = ((real, True), ([f.detach() for f in told], False))
        logits = [(judge(features, self.tokens), kind) for features, kind in kinds]
        logs["fooled"], logs["judge right"] = generator_loss.item(), sum(accuracy(*pair, shares) for pair in logits) / 2
        return self.config.sharpen * generator_loss + sum(hinge(*pair, shares) for pair in logits)

    def _move(self, u: Tensor, v: Tensor, feature: Tensor) -> None:
        """Slots at an anchor refresh their caches and go on by the whole pass, the others as predicted."""
        trajectories, (stride, anchor) = self.trajectories, self.runs()
        self._refresh(anchor, feature)
        goal = euler(
            self.way, v, *(self.context.levels[place] for place in (trajectories.index, trajectories.index + stride))
        )
        trajectories.move(torch.where(_over(anchor, u), v, u), trajectories.index + stride)
        self.way = torch.where(_over(self.runs()[1], u), trajectories.x, goal)  # a beginning is an anchor too

    def _refresh(self, which: Tensor, feature: Tensor) -> None:
        self.cached = torch.where(_over(which, feature), feature, self.cached)

    @torch.no_grad()
    def spread_timesteps(self) -> None:
        """Let the student carry each slot to a step of its own, with the anchor before in its cache."""
        trajectories, (stride, _) = self.trajectories, self.runs()
        goal = torch.tensor([rng.randrange(self.config.steps) for rng in trajectories.rngs("goal")]) // stride * stride
        while (on := trajectories.index < goal).any():
            v, feature = self._whole()
            self._refresh(on & self.runs()[1], feature)
            trajectories.move(v, trajectories.index + on * stride)
            self.way = trajectories.x.clone()

    def next_stage(self) -> None:
        """Nothing: the predictor goes on from where it is."""

    def save(self, folder: Path) -> None:
        """The predictor's weights, in half precision."""
        weights = self.module.predictor.state_dict()
        save_file({name: w.half().cpu().contiguous() for name, w in weights.items()}, folder / "model.safetensors")

    def sample_grid(self, path: Path) -> None:
        """Nothing to see: a predictor makes no videos alone."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the weights: the slots and their caches."""
        return {**self.trajectories.state_dict(), "cached": self.cached, "way": self.way}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, from the slots of all processes."""
        own = slice(self.trajectories.first, self.trajectories.first + len(self.trajectories))
        self.cached, self.way = (state[name][own].to(self.cached.device) for name in ("cached", "way"))
        self.trajectories.load_state_dict(state)


def _over(which: Tensor, x: Tensor) -> Tensor:
    """Truths (b,) in the shape of x (b, ...)."""
    return expand_like(which, x).bool()
