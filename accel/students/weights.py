"""Weights that take a module's place for a while, kept as differences, and telling whether they belong to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ADAPTER = "pytorch_lora_weights.safetensors"
NAME = "accel-student"  # of the adapter while it is on
SCALE = ".scale"  # ends the name of what a parameter's whole numbers are multiplied by, row by row


def fingerprint(module: nn.Module) -> list[float]:
    """One weight of each parameter, in their order: tells models of one architecture apart, in any dtype.

    Adapters on the module do not count.
    """
    own = [p.detach().flatten() for name, p in module.named_parameters() if ".lora_" not in name]
    return [float(f"{p[len(p) // 2].item():.4g}") for p in own]


def matches_fingerprint(module: nn.Module, known: list[float]) -> bool:
    """Whether a module has these `marks`, up to the rounding of half precision."""
    own = fingerprint(module)
    return len(own) == len(known) and torch.allclose(torch.tensor(own), torch.tensor(known), rtol=0.01, atol=1e-4)


def save_int8_delta(module: nn.Module, base: nn.Module, file: Path) -> None:
    """What a module's parameters add to its base's, a byte each: whole numbers up to 127 and a scale for each row."""
    kept: dict[str, Tensor] = {}
    for (name, own), other in zip(module.named_parameters(), base.parameters(), strict=True):
        added = (own.detach() - other.detach()).float().flatten(min(1, own.ndim - 1)).cpu()
        scale = (added.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        kept[name], kept[name + SCALE] = (added / scale).round().to(torch.int8), scale.squeeze(-1)
    save_file(kept, file)


def load_int8_delta(base: nn.Module, file: Path) -> dict[str, Tensor]:
    """The parameters of a module whose differences from its base a file holds, on the base's device, in its dtype.

    Raises ValueError if the file has other names or shapes.
    """
    kept, own = load_file(file), dict(base.named_parameters())
    shapes = {name: (p.numel(), p.shape[0] if p.ndim > 1 else 1) for name, p in own.items()}
    if {name: (w.numel(), kept[name + SCALE].numel()) for name, w in kept.items() if name + SCALE in kept} != shapes:
        raise ValueError(f"{file.name} in {file.parent.name} holds weights of another architecture")

    made = allocate_contiguous(own)
    for name, p in own.items():
        added = kept[name].float() * kept[name + SCALE].unsqueeze(-1)
        made[name].copy_(p.detach().float() + added.view(p.shape).to(p.device))
    return made


def allocate_contiguous(like: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Empty tensors like these, in one piece of memory for each dtype and device.

    In as many pieces as there are parameters they leave a heap of which the C library gives memory back, and takes it
    again, in every call: on a CPU a student of the shipped model took 8 % longer by it.
    """
    made: dict[str, Tensor] = {}
    for kind in {(p.dtype, p.device) for p in like.values()}:
        same = {name: p for name, p in like.items() if (p.dtype, p.device) == kind}
        sizes = [p.numel() for p in same.values()]
        whole = torch.empty(sum(sizes), dtype=kind[0], device=kind[1])
        made |= {name: part.view(p.shape) for (name, p), part in zip(same.items(), whole.split(sizes), strict=True)}
    return made


@contextmanager
def swapped_parameters(module: nn.Module, others: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold other tensors; afterwards, bitwise, what they held before."""
    before = [(p, p.data) for p in module.parameters()]
    for name, p in module.named_parameters():
        p.data = others[name]
    try:
        yield
    finally:
        for p, own in before:
            p.data = own


@contextmanager
def with_lora(module: nn.Module, folder: Path) -> Iterator[None]:
    """Inside, a diffusers model runs with the LoRA of a folder, beside those that it has; afterwards as before."""
    had = bool(getattr(module, "peft_config", None))
    learnt = [(p, p.requires_grad) for p in module.parameters()]
    others = module.active_adapters() if had else []
    off = {name for name, layer in module.named_modules() if getattr(layer, "disable_adapters", False) is True}
    module.load_lora_adapter(folder, prefix=None, weight_name=ADAPTER, adapter_name=NAME)
    module.set_adapter([NAME] if off else [*others, NAME])
    module.enable_adapters()
    try:
        yield
    finally:
        if had:
            module.delete_adapters(NAME)
            _unwrap_empty(module)
            module.set_adapter(others)
            if off:
                module.disable_adapters()
        else:
            module.unload_lora()
            del module._hf_peft_config_loaded
        for weight, on in learnt:  # peft freezes what is below an adapter, and frees what is set active
            weight.requires_grad_(on)


def check_adapter(module: nn.Module, scale: float) -> None:
    """Raise ValueError if an adapter that `adapted` put on a model does not act there, or not in full."""
    if NAME not in (getattr(module, "peft_config", None) or {}):
        return
    layers = [layer for layer in module.modules() if NAME in getattr(layer, "lora_A", ())]
    if scale != 1 or any(layer.disable_adapters or NAME not in layer.active_adapters for layer in layers):
        raise ValueError("the student is a LoRA, and acts in full or not at all: leave adapters and their scale alone")


def _unwrap_empty(module: nn.Module) -> None:
    """Put back the plain layers where no adapter is left."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "base_layer") and not layer.lora_A:
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer.base_layer)
