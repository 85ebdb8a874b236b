"""Looks at a predictor in training: how far from the student's ways it leads between anchors, and in the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .tasks.predictor_fit import PredictorTask


class CachedRolloutValidator:
    """The student's ways from prompts and noises unknown to training, with whole passes at some steps, the anchors."""

    def __init__(self, task: PredictorTask, prompts: list[str], anchors: list[int], seed: int = 1):
        self.task, self.anchors, self.steps = task, anchors, len(task.context.times)
        self.words = task.context.encode(prompts)
        noise = torch.Generator().manual_seed(seed)
        x = torch.randn(len(prompts), *task.context.shape, generator=noise).to(self.words.device)
        self.ways = [x]
        for i in range(self.steps):
            x = task.context.jump(x, self._whole(x, i)[0], i, i + 1)
            self.ways.append(x)

    def named(self, _: int) -> str:
        """What `jump` is the error of."""
        return "the stretches between anchors"

    def jump(self, model: nn.Module, _: int) -> float:
        """Squared error of where the steps after each anchor lead, up to the next, in parts of the square of their way.

        Each of these stretches begins on the student's way.
        """
        errors = []
        for i, j in zip(self.anchors, [*self.anchors[1:], self.steps]):
            if j > i + 1:
                begin, goal = self.ways[i], self.ways[j]
                x = self._walk(model, begin, range(i, j))
                errors.append(((x - goal).square().mean() / (goal - begin).square().mean()).item())
        return sum(errors) / max(1, len(errors))

    def end(self, model: nn.Module, _: int) -> float:
        """Squared error of the final latents with whole passes at the anchors alone, in parts of their mean square."""
        x = self._walk(model, self.ways[0], range(self.steps))
        return ((x - self.ways[-1]).square().mean() / self.ways[-1].square().mean()).item()

    def _walk(self, model: nn.Module, x: Tensor, places: range) -> Tensor:
        """Latents carried through some steps, of which the first is an anchor."""
        cached = None
        for i in places:
            if i in self.anchors:
                v, cached = self._whole(x, i)
            else:
                v = self._predicted(model, cached, x, i)
            x = self.task.context.jump(x, v, i, i + 1)
        return x

    @torch.no_grad()
    def _whole(self, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        return self.task.student.whole(x, self.task.context.told(x, i, i + 1), self.words)

    @torch.no_grad()
    def _predicted(self, model: nn.Module, cached: Tensor, x: Tensor, i: int) -> Tensor:
        time = self.task.context.told(x, i, i + 1)
        return self.task.student.predicted(model.predictor, cached, x, time, self.words)[0]
