"""A distillation's three networks in one: a frozen transformer, plain, with last stage's LoRA, and with this one's.

For models of which three copies would not fit. Which adapter is on is set before every call, as the three take turns.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..students.interval_embedding import IntervalEmbedder, save_interval_embedder, unwrapped
from ..students.weights import ADAPTER
from .networks import guided, velocity

# Wan's attentions and feed-forwards, and the time embedding: how far a step goes is told by the time alone
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
TARGETS += ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"]
PREVIOUS, CURRENT = "previous", "current"


class LoRANetworks:
    """The networks of a large model; only the current adapter learns, in float32 whatever the model's dtype."""

    def __init__(self, transformer: nn.Module, rank: int):
        self.module = transformer.requires_grad_(False).train()
        for name in (PREVIOUS, CURRENT):
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
            transformer.add_adapter(config, adapter_name=name)
        for name, weight in transformer.named_parameters():
            if ".lora_" in name:
                weight.data = weight.data.float()
        transformer.enable_gradient_checkpointing()
        if isinstance(transformer.condition_embedder, IntervalEmbedder):
            transformer.condition_embedder.scalars.requires_grad_(True)
        self._told = deepcopy(getattr(transformer.condition_embedder, "scalars", None))  # the previous student's
        self._turn_on(CURRENT)

    def matrices(self) -> list[nn.Parameter]:
        """None: factors of matrices are not what Muon is for."""
        return []

    @torch.no_grad()
    def previous(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """Velocity with the last stage's adapter."""
        self._turn_on(PREVIOUS)
        self._swap_told()
        v = velocity(self.module, x, t, words)
        self._swap_told()
        self._turn_on(CURRENT)
        return v

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor, words: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor:
        """Guided velocity without any adapter."""
        self.module.disable_adapters()
        v = guided(self.module, x, t, words, empty, guidance)
        self.module.enable_adapters()
        return v

    @torch.no_grad()
    def next_stage(self) -> None:
        """The current adapter's weights become the last stage's."""
        for layer in self.module.modules():
            if isinstance(layer, LoraLayer):
                for factors in (layer.lora_A, layer.lora_B):
                    factors[PREVIOUS].weight.copy_(factors[CURRENT].weight)

        if self._told is not None:
            self._told.load_state_dict(self.module.condition_embedder.scalars.state_dict())

    def save(self, folder: Path) -> None:
        """The current adapter as a LoRA file that diffusers loads too."""
        with unwrapped(self.module):
            self.module.save_lora_adapter(folder, adapter_name=CURRENT, weight_name=ADAPTER)
        save_interval_embedder(self.module, folder)

    def _swap_told(self) -> None:
        """The other of the two sets of additions to the time embedding, if the model has any."""
        embedder = self.module.condition_embedder
        if self._told is not None:
            embedder.scalars, self._told = self._told, embedder.scalars

    def _turn_on(self, name: str) -> None:
        """Run with one adapter; the current one alone ever learns, and the host of a distributed run may watch it."""
        self.module.set_adapter(name)
        for key, weight in self.module.named_parameters():
            if ".lora_" in key:
                weight.requires_grad_(f".{CURRENT}." in key)
