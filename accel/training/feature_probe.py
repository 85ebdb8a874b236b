"""A frozen student whose block outputs can be read, and whose blocks a predictor can replace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

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
        self, predictor: nn.Module, cached: Tensor, x: Tensor, t: Tensor, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Velocity (b, c, f, h, w) and last feature (b, n, d) with a predictor in place of the blocks."""
        feature: list[Tensor] = []

        def predict(hidden: Tensor, *inputs) -> Tensor:
            feature.append(predictor(hidden, cached, *inputs))
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
