"""The three networks of a distillation in one: a frozen transformer without LoRA, with the previous or current LoRA.

For models that do not fit in memory three times. Each call switches to its adapter, since the three alternate.
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

# Attention, feed-forward and time embedding of Wan: the student knows the length of its step from the time alone.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
TARGETS += ["time_embedder.linear_1", "time_embedder.linear_2", "time_proj"]
PREVIOUS, CURRENT = "previous", "current"


class LoRANetworks:
    """The networks of a large model; only the current adapter is trained, in float32 whatever the model's dtype."""

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
        self._previous_scalars = deepcopy(getattr(transformer.condition_embedder, "scalars", None))
        self._activate(CURRENT)

    def matrices(self) -> list[nn.Parameter]:
        """None: Muon is not meant for low-rank factors."""
        return []

    @torch.no_grad()
    def previous(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Velocity with the adapter of the previous stage."""
        self._activate(PREVIOUS)
        self._swap_scalars()
        v = velocity(self.module, x, t, text)
        self._swap_scalars()
        self._activate(CURRENT)
        return v

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor, text: Tensor, empty: Tensor, guidance: float | Tensor) -> Tensor:
        """Guided velocity without an adapter."""
        self.module.disable_adapters()
        v = guided(self.module, x, t, text, empty, guidance)
        self.module.enable_adapters()
        return v

    @torch.no_grad()
    def next_stage(self) -> None:
        """Copy the weights of the current adapter to the previous one."""
        for layer in self.module.modules():
            if isinstance(layer, LoraLayer):
                for factors in (layer.lora_A, layer.lora_B):
                    factors[PREVIOUS].weight.copy_(factors[CURRENT].weight)
        if self._previous_scalars is not None:
            self._previous_scalars.load_state_dict(self.module.condition_embedder.scalars.state_dict())

    def save(self, folder: Path) -> None:
        """Save the current adapter as a LoRA file that diffusers can load."""
        with unwrapped(self.module):
            self.module.save_lora_adapter(folder, adapter_name=CURRENT, weight_name=ADAPTER)
        save_interval_embedder(self.module, folder)

    def _swap_scalars(self) -> None:
        """Exchange the scalar embeddings of the current and the previous student, if the model has any."""
        embedder = self.module.condition_embedder
        if self._previous_scalars is not None:
            embedder.scalars, self._previous_scalars = self._previous_scalars, embedder.scalars

    def _activate(self, name: str) -> None:
        """Run with one adapter. Only the current one is trainable: DDP requires a fixed set of trainable parameters."""
        self.module.set_adapter(name)
        for key, weight in self.module.named_parameters():
            if ".lora_" in key:
                weight.requires_grad_(f".{CURRENT}." in key)
