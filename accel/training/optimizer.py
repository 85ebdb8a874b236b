"""The optimizer of all trainers: its settings, the learning-rate schedule, and Muon for batches of matrices."""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from .fast_blocks import has_fast_bfloat16


class OptimConfig(BaseModel, frozen=True, extra="forbid"):
    """Optimizer settings. `steps` fixes the learning-rate schedule; `--minutes` only cuts a run into chunks.

    With `minutes` here, a run ends by then with its whole schedule: where the device is slower, it skips steps.
    """

    steps: int = Field(ge=1)
    minutes: float | None = Field(None, gt=0)
    batch: int = Field(1, ge=1)  # times as many clips in a batch as the curriculum says
    lr: float = Field(gt=0)  # of AdamW
    matrix_lr: float = Field(6e-3, gt=0)  # of Muon, which trains the task's `matrices`; its updates are AdamW's in size
    warmup: int = 100  # steps
    decay_from: float = 0.4  # share of the steps after which the rate falls linearly to zero
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.998
    seed: int = 0


def learning_rate(step: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, constant, linear decay."""
    start = optim.decay_from * optim.steps
    decay = min(1.0, (optim.steps - step) / max(1.0, optim.steps - start))
    return min(1.0, (step + 1) / optim.warmup) * decay


class BatchedMuon(torch.optim.Muon):
    """Muon whose update has the size of AdamW's (Liu et al., arXiv 2502.16982); a kernel has one row per output.

    Matrices of one shape are updated together, up to `max_numel` numbers at a time: for the 80 matrices of tiny-wan
    that takes a seventh of the operators, and 0.6 of the time on two CPU cores.
    """

    max_numel = 2**26

    def __init__(self, weights: list[nn.Parameter], **options):
        self.weights = weights
        flat = [nn.Parameter(w.data.flatten(1)) for w in weights]  # views: updating them updates the weights
        super().__init__(flat, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # accelerate passes a closure of None
        (group,) = self.param_groups
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for weight, flat in zip(self.weights, group["params"], strict=True):
            if weight.grad is not None:
                grad, state = weight.grad.flatten(1), self.state[flat]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(grad)
                by_shape.setdefault(flat.shape, []).append((flat, grad, state["momentum_buffer"]))
        for shape, rows in by_shape.items():
            count = max(1, self.max_numel // shape.numel())
            for first in range(0, len(rows), count):
                self._update(group, *map(list, zip(*rows[first : first + count])))

    def _update(self, group: dict, flats: list[Tensor], grads: list[Tensor], means: list[Tensor]) -> None:
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        lookahead = torch.stack(grads).lerp_(torch.stack(means), group["momentum"])  # Nesterov momentum
        steps = newton_schulz(lookahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        torch._foreach_mul_(flats, 1 - group["lr"] * group["weight_decay"])
        size = 0.2 * group["lr"] * math.sqrt(max(flats[0].shape))
        torch._foreach_add_(flats, list(steps.to(flats[0].dtype).contiguous()), alpha=-size)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for weight in self.weights:
            weight.grad = None


def newton_schulz(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices (count, rows, columns) with their singular values brought near 1, by Newton-Schulz iterations.

    Computed in bfloat16 where the device multiplies it fast, else in float32.
    """
    a, b, c = coefficients
    y = x.bfloat16() if has_fast_bfloat16(str(x.device)) else x.float()
    if tall := y.shape[1] > y.shape[2]:
        y = y.mT
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y
