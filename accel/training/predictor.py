"""Training DisCa's predictor (arXiv 2602.05449) on the ways of the student that it will serve, at its own steps.

Each slot goes the student's way step by step. At its anchors the output of the student's blocks is cached; at the steps
behind, the predictor has that and the current tokens, and learns the velocity that the whole pass gives. First by
squared error, then with a discriminator on the frozen student's features one step on (hinge, on both sides).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import BaseModel, Field
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..conditioning import packed
from ..flow import euler, wide
from ..predictor import Predictor
from .discriminator import Discriminator, hinge, right
from .fit import Recipe
from .slots import Slots, TimedGround
from .students import velocity


class Lessons(BaseModel, frozen=True, extra="forbid"):
    """What both stages do, apart from their optimizers."""

    steps: int = Field(20, ge=2)  # of the student, when it is served
    farthest: int = Field(5, ge=1)  # most steps from an anchor to the next
    guidance: tuple[float, float]
    own_way: float = Field(0.5, ge=0, le=1)  # share of the steps that go on from what was predicted
    feature: float = Field(0.1, ge=0)  # weight of the feature's error, in parts of its variance
    sharpen: float = Field(0.1, ge=0)  # weight of the discriminator in the second stage
    slots: int = Field(16, ge=1)


class Stack(nn.Module):
    """A transformer's blocks as one: it keeps what they give, or gives what a function does instead of them."""

    def __init__(self, blocks: nn.ModuleList, spare: bool):
        """`spare`: compute blocks again on the way back instead of keeping what they had."""
        super().__init__()
        self.blocks, self.spare, self.instead, self.outputs = blocks, spare, None, []

    def forward(self, hidden: Tensor, *inputs) -> Tensor:
        if self.instead is not None:
            return self.instead(hidden, *inputs)
        self.outputs = []
        for block in self.blocks:
            if self.spare and hidden.requires_grad:
                hidden = checkpoint(block, hidden, *inputs, use_reentrant=False)
            else:
                hidden = block(hidden, *inputs)
            self.outputs.append(hidden)
        return hidden


class Watched:
    """A frozen student whose features can be read, and its passes predicted."""

    def __init__(self, transformer: nn.Module, spare: bool = False):
        """`spare` memory for a large one, at the cost of time."""
        self.stack = Stack(transformer.blocks, spare)
        self.transformer = transformer.eval().requires_grad_(False)
        transformer.blocks = nn.ModuleList([self.stack])
        count = len(self.stack.blocks)
        self.layers = sorted({max(0, count * part // 4 - 1) for part in (1, 2, 3, 4)})

    def whole(self, x: Tensor, time: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (b, c, f, h, w) and last feature (b, n, d) of a whole pass."""
        v = velocity(self.transformer, x, time, words)
        return v, self.stack.outputs[-1].float()

    def features(self, x: Tensor, time: Tensor, words: Tensor) -> list[Tensor]:
        """Outputs (b, n, d) of the blocks a quarter, a half, three quarters and all the way through."""
        velocity(self.transformer, x, time, words)
        return [self.stack.outputs[i] for i in self.layers]

    def predicted(
        self, predictor: nn.Module, cached: Tensor, x: Tensor, time: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity and feature of a predicted pass."""
        feature: list[Tensor] = []

        def instead(hidden: Tensor, *inputs) -> Tensor:
            feature.append(predictor(hidden, cached, *inputs))
            return feature[0]

        with self._by(instead):
            v = velocity(self.transformer, x, time, words)
        return v, feature[0].float()

    @contextmanager
    def _by(self, instead: Callable):
        self.stack.instead = instead
        try:
            yield
        finally:
            self.stack.instead = None


class Trainee(nn.Module):
    """All that learns. Its forward is a whole lesson, so that with several processes gradients meet."""

    def __init__(self, predictor: Predictor, judge: Discriminator):
        super().__init__()
        self.predictor, self.judge = predictor, judge

    def forward(self, lesson: Callable[[Trainee], Tensor]) -> Tensor:
        return lesson(self)


class PredictorTask:
    """Both stages; a process carries its share of the slots."""

    diverged = False
    stages = {"match": 1, "sharpen": 1}

    def __init__(
        self, recipe: Recipe, lessons: Lessons, student: Watched, predictor: Predictor, ground: TimedGround,
        tokens: tuple[int, int, int], share: tuple[int, int] = (0, 1),
    ):  # fmt: skip
        """`tokens`: the student's grid of them; `share`: which process this is, of how many."""
        self.recipe, self.lessons, self.student, self.ground = recipe, lessons, student, ground
        self.tokens, self.nets = tokens, self
        width = predictor.fuse[-1].out_features
        self.slots = Slots(ground, lessons.slots, share, recipe.seed)
        device = self.slots.x.device
        count = len(self.slots)
        self.cached = torch.zeros(count, tokens[0] * tokens[1] * tokens[2], width, device=device)
        self.due = torch.zeros(count, dtype=torch.long)  # steps until the next anchor
        judge = Discriminator(width, len(student.layers))
        self.module = Trainee(predictor, judge).to(device)
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
        """The predictor's error at the slots that have a cache, which then all move on."""
        logs: dict[str, float] = {}
        return model(lambda own: self._lesson(own, step, logs)), logs

    def _lesson(self, own: Trainee, step: int, logs: dict[str, float]) -> Tensor:
        slots = self.slots
        x, words, (now, then, time, after) = slots.x, slots.words, self._time()
        with torch.no_grad():
            v, feature = self.student.whole(x, time, words)
        u, guess = self.student.predicted(own.predictor, self.cached, x, time, words)
        known = wide(slots.index > 0, u)  # the others have no cache
        share = known.mean().clamp(min=1 / len(slots))
        error = ((u - v).square() * known).mean() / share
        likeness = ((guess - feature).square() * known.flatten(1, 3)).mean() / share / feature.var()
        logs |= {"velocity": error.item(), "feature": likeness.item()}
        loss = error / v.square().mean() + self.lessons.feature * likeness
        if self.stage == 1:
            ends = [euler(x, way, now, then) for way in (v, u)]
            loss = loss + self._judged(own.judge, ends, after, words, known.flatten(), logs)
        self._move(u.detach(), v, feature, step)
        return loss

    def _time(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Levels of the slots' steps, now and then, and what the student is told of these, and of the place behind."""
        now, then = (self.ground.levels[i].float() for i in (self.slots.index, self.slots.index + 1))
        w = self.slots.uniform(*self.lessons.guidance, "guidance")
        return now, then, *(packed(start, then, w).to(self.slots.x.device) for start in (now, then))

    def _judged(self, judge: Discriminator, ends: list[Tensor], after, words, known: Tensor, logs: dict) -> Tensor:
        """The discriminator's loss, and the predictor's for being told apart, from features at the true and its end.

        Of the slots that are `known` (s,), 1 or 0: the others had nothing to predict from.
        """
        with torch.no_grad():
            real = self.student.features(ends[0], after, words)
        told = self.student.features(ends[1], after, words)
        judge.requires_grad_(False)
        fooled = hinge(judge(told, self.tokens), True, known)
        judge.requires_grad_(True)
        kinds = ((real, True), ([f.detach() for f in told], False))
        logits = [(judge(features, self.tokens), kind) for features, kind in kinds]
        logs["fooled"], logs["judge right"] = fooled.item(), sum(right(*pair) for pair in logits) / 2
        return self.lessons.sharpen * fooled + sum(hinge(*pair, known) for pair in logits)

    def _move(self, u: Tensor, v: Tensor, feature: Tensor, step: int) -> None:
        """Refresh the caches of slots at an anchor; all go on, by the whole pass there, else often as predicted."""
        slots, lessons = self.slots, self.lessons
        anchor = (self.due <= 0) | (slots.index == 0)
        gaps = torch.tensor([rng.randint(1, lessons.farthest) for rng in slots.chance("gap", step)])
        ways = torch.tensor([rng.random() < lessons.own_way for rng in slots.chance("way", step)])
        where = anchor.to(feature.device)
        self.cached = torch.where(where.view(-1, 1, 1), feature, self.cached)
        self.due = torch.where(anchor, gaps, self.due) - 1
        by_guess = (~anchor & ways).to(u.device).view(-1, 1, 1, 1, 1)
        slots.move(torch.where(by_guess, u, v), slots.index + 1)

    @torch.no_grad()
    def stagger(self) -> None:
        """Let the student carry each slot to a step of its own, with the step before in its cache."""
        slots, n = self.slots, self.lessons.steps
        goal = torch.tensor([rng.randrange(n) for rng in slots.chance("goal")])
        while (on := slots.index < goal).any():
            v, feature = self.student.whole(slots.x, self._time()[2], slots.words)
            self.cached = torch.where(on.to(v.device).view(-1, 1, 1), feature, self.cached)
            slots.move(v, slots.index + on)
        self.due = torch.tensor([rng.randrange(self.lessons.farthest) for rng in slots.chance("due")])

    def next_stage(self) -> None:
        """Nothing: the predictor goes on from where it is."""

    def save(self, folder: Path) -> None:
        """The predictor's weights, in half precision."""
        weights = self.module.predictor.state_dict()
        save_file({name: w.half().cpu().contiguous() for name, w in weights.items()}, folder / "model.safetensors")

    def sheet(self, path: Path) -> None:
        """Nothing to see: a predictor makes no videos alone."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs beside the weights: the slots and their caches."""
        return {**self.slots.state_dict(), "cached": self.cached, "due": self.due}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse, from the slots of all processes."""
        own = slice(self.slots.first, self.slots.first + len(self.slots))
        self.cached, self.due = state["cached"][own].to(self.cached.device), state["due"][own].cpu()
        self.slots.load_state_dict(state)


class HeldOutWays:
    """The student's ways from prompts and noises unknown to training; of some steps state, velocity and feature."""

    def __init__(self, task: PredictorTask, prompts: list[str], anchors: list[int], seed: int = 1):
        self.task, self.anchors, self.steps = task, anchors, len(task.ground.times)
        self.words = task.ground.encode(prompts)
        noise = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(len(prompts), *task.ground.shape, generator=noise).to(self.words.device)
        looked = range(1, self.steps - 1, 3)
        self.places = [(i, i + k) for i in looked for k in (1, 2, 3) if i + k < self.steps]
        self.features: dict[int, Tensor] = {}
        self.passes: list[tuple[Tensor, Tensor]] = []
        self.last = self.noise
        for i in range(self.steps):
            v, feature = self._whole(self.last, i)
            self.passes.append((self.last, v))
            if i in looked:
                self.features[i] = feature.cpu()
            self.last = task.ground.jump(self.last, v, i, i + 1)

    def jump(self, model: nn.Module, _: int) -> float:
        """Squared error of predicted velocities, 1 to 3 steps behind every third step, in parts of their square."""
        errors = []
        for i, j in self.places:
            x, v = self.passes[j]
            u = self._predicted(model, self.features[i].to(x.device), x, j)
            errors.append(((u - v).square().mean() / v.square().mean()).item())
        return sum(errors) / len(errors)

    def end(self, model: nn.Module, _: int) -> float:
        """Squared error of the final latents with whole passes at the anchors alone, in parts of their mean square."""
        x, cached = self.noise, None
        for i in range(self.steps):
            if i in self.anchors:
                v, cached = self._whole(x, i)
            else:
                v = self._predicted(model, cached, x, i)
            x = self.task.ground.jump(x, v, i, i + 1)
        return ((x - self.last).square().mean() / self.last.square().mean()).item()

    @torch.no_grad()
    def _whole(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return self.task.student.whole(x, self.task.ground.told(x, i, i + 1), self.words)

    @torch.no_grad()
    def _predicted(self, model: nn.Module, cached: Tensor, x: Tensor, i: int) -> Tensor:
        time = self.task.ground.told(x, i, i + 1)
        return self.task.student.predicted(model.predictor, cached, x, time, self.words)[0]
