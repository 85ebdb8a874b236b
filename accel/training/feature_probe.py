"""A frozen student whose block outputs can be read, and whose blocks a predictor can replace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .networks import velocity


class RecordingBlocks(nn.Module):
    """All blocks of a transformer as one: records their outputs, or calls a replacement instead of them."""

    def __init__(self, blocks: nn.ModuleList, checkpointing: bool):
        """`checkpointing`: recompute blocks in the backward pass instead of storing their activations."""
        super().__init__()
        self.blocks, self.checkpointing, self.replacement, self.outputs = blocks, checkpointing, None, []

    def forward(self, hidden: Tensor, *inputs) -> Tensor:
        if self.replacement is not None:
            return self.replacement(hidden, *inputs)
        self.outputs = []
        for block in self.blocks:
            if self.checkpointing and hidden.requires_grad:
                hidden = checkpoint(block, hidden, *inputs, use_reentrant=False)
            else:
                hidden = block(hidden, *inputs)
            self.outputs.append(hidden)
        return hidden


class FeatureProbe:
    """Runs a frozen student in full or with a predictor, and returns its features."""

    branches = 1  # features that a sample has, one after the other along the tokens

    def __init__(self, transformer: nn.Module, checkpointing: bool = False):
        """`checkpointing` saves memory for a large student, at the cost of time."""
        self.stack = RecordingBlocks(transformer.blocks, checkpointing)
        self.transformer = transformer.eval().requires_grad_(False)
        transformer.blocks = nn.ModuleList([self.stack])
        count = len(self.stack.blocks)
        self.layers = sorted({max(0, count * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})

    def full_forward(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity (b, c, f, h, w) and last feature (b, n, d) of a full forward pass."""
        v = velocity(self.transformer, x, t, text)
        return v, self.stack.outputs[-1].float()

    def features(self, x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """Outputs (b, n, d) of the blocks at a quarter, a half, three quarters and the end of the stack."""
        velocity(self.transformer, x, t, text)
        return [self.stack.outputs[i] for i in self.layers]

    def predicted_forward(
        self, predictor: nn.Module, cached: Tensor, gap: Tensor, x: Tensor, t: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity (b, c, f, h, w) and last feature (b, n, d) with a predictor in place of the blocks.

        `cached` (b, n, d) is the feature of the last full pass, `gap` (b,) how much sigma has fallen since.
        """
        feature: list[Tensor] = []

        def predict(hidden: Tensor, *inputs) -> Tensor:
            feature.append(predictor(hidden, cached, gap, *inputs))
            return feature[0]

        with self._replaced_blocks(predict):
            v = velocity(self.transformer, x, t, text)
        return v, feature[0].float()

    @contextmanager
    def _replaced_blocks(self, replacement: Callable):
        self.stack.replacement = replacement
        try:
            yield
        finally:
            self.stack.replacement = None


class GuidedProbe:
    """The same for a frozen base model under guidance: its two branches run as one batch of twice the size.

    Velocities are the guided ones. The features (b, 2n, d) of a sample are those of the conditional branch and, behind
    them, of the unconditional one.
    """

    branches = 2

    def __init__(self, probe: FeatureProbe, empty: Tensor, guidance: float):
        """`empty`: embedding (1, n, d) of the empty prompt."""
        self.probe, self.empty, self.guidance, self.layers = probe, empty, guidance, probe.layers

    def full_forward(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Guided velocity (b, c, f, h, w) and last features (b, 2n, d) of a full forward pass."""
        return self._guided(*self.probe.full_forward(*self._both(x, t, text)))

    def features(self, x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """The probe's, of the conditional branch."""
        return self.probe.features(x, t, text)

    def predicted_forward(
        self, predictor: nn.Module, cached: Tensor, gap: Tensor, x: Tensor, t: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Guided velocity (b, c, f, h, w) and last features (b, 2n, d) with a predictor in place of the blocks."""
        cached, gap = torch.cat(cached.chunk(2, dim=1)), gap.repeat(2)
        return self._guided(*self.probe.predicted_forward(predictor, cached, gap, *self._both(x, t, text)))

    def _both(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.repeat(2, 1, 1, 1, 1), t.repeat(2), torch.cat([text, self.empty.expand_as(text)])

    def _guided(self, v: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        cond, uncond = v.chunk(2)
        return uncond + self.guidance * (cond - uncond), torch.cat(feature.chunk(2), dim=1)
