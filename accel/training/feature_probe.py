"""A frozen student whose features can be read, and whose blocks can be stood in for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .networks import velocity


class RecordingBlocks(nn.Module):
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


class FeatureProbe:
    """A frozen student whose features can be read, and its passes predicted."""

    def __init__(self, transformer: nn.Module, spare: bool = False):
        """`spare` memory for a large one, at the cost of time."""
        self.stack = RecordingBlocks(transformer.blocks, spare)
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
