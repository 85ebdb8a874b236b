"""Student weights, stored as int8 differences or a LoRA and swapped into a module; and fingerprints of models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.hooks import remove_hook_from_module
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import AccelError

ADAPTER = "pytorch_lora_weights.safetensors"
NAME = "accel-student"  # the LoRA's adapter name on the module
ADDED = (".lora_", ".to_qkv.", ".to_kv.")  # in names of parameters that adapters and fused projections add
SCALE = ".scale"  # suffix of the per-row scales of an int8 parameter


def fingerprint(module: nn.Module) -> list[float]:
    """One weight of each parameter, in order: tells models of one architecture apart, in any dtype.

    Adapters and fused projections do not count. Raises AccelError if the weights are not in memory.
    """
    return [float(f"{_middle(p):.4g}") for p in _base_parameters(module)]


def matches_fingerprint(module: nn.Module, expected: list[float]) -> bool:
    """Whether a module has this fingerprint, up to the rounding of bfloat16, or of its own dtype if that is coarser.

    Raises AccelError if its weights are not in memory.
    """
    weights = _base_parameters(module)
    return len(weights) == len(expected) and all(map(_is_near, weights, expected))


def _base_parameters(module: nn.Module) -> list[nn.Parameter]:
    _check_in_memory(module)
    return [p for name, p in module.named_parameters() if not any(part in name for part in ADDED)]


def _check_in_memory(module: nn.Module) -> None:
    """Raise AccelError if offloading keeps the weights elsewhere, from where it would bring them back over others."""
    hooks = (m._diffusers_hook.get_hook("group_offloading") for m in module.modules() if hasattr(m, "_diffusers_hook"))
    elsewhere = any(hook and (hook.group.stream or hook.group.offload_to_disk_path) for hook in hooks)
    if elsewhere or any(p.is_meta for p in module.parameters()):
        raise AccelError(
            "trained weights of a method need the model's in memory, not offloaded one by one, by streams or to disk: "
            "use enable_model_cpu_offload()"
        )


def _middle(p: nn.Parameter) -> float:
    return p.detach().flatten()[p.numel() // 2].item()


def _is_near(p: nn.Parameter, expected: float) -> bool:
    """Whether a parameter's middle weight is this one, rounded.

    A student's weight is the rounded sum of rounded ones, which may be larger: about as large as others around it.
    """
    if not p.is_floating_point():  # quantized
        return False
    around = p.detach().flatten()[:: 1 + p.numel() // 256].float().square().mean().sqrt().item()
    eps = max(torch.finfo(torch.bfloat16).eps, torch.finfo(p.dtype).eps)
    return abs(_middle(p) - expected) <= eps * (abs(expected) + around)


def save_int8_delta(module: nn.Module, base: nn.Module, file: Path) -> None:
    """Save what a module's parameters add to its base's, a byte each: integers up to 127 and a scale for each row."""
    tensors: dict[str, Tensor] = {}
    for (name, p), base_p in zip(module.named_parameters(), base.parameters(), strict=True):
        delta = (p.detach() - base_p.detach()).float().flatten(min(1, p.ndim - 1)).cpu()
        scale = (delta.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        tensors[name], tensors[name + SCALE] = (delta / scale).round().to(torch.int8), scale.squeeze(-1)
    save_file(tensors, file)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises AccelError if it is missing or damaged."""
    check_weights(file)
    return load_file(file)


def check_weights(file: Path) -> None:
    """Raise AccelError if a .safetensors file is missing, or shorter or longer than its first bytes say."""
    name = f"{file.parent.name}/{file.name}"
    if not file.is_file():
        raise AccelError(f"{name} is missing: restore it, or train the weights again")
    try:
        with safe_open(file, "pt") as weights:
            weights.keys()
    except (SafetensorError, OSError):
        raise AccelError(f"{name} is damaged: restore it, or train the weights again") from None


def load_weights(module: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Put weights into a module. Raises AccelError if they are of another architecture; `name` says where they are."""
    try:
        module.load_state_dict(weights)
    except RuntimeError:
        raise AccelError(f"{name} holds weights of another architecture") from None


def load_int8_delta(base: nn.Module, file: Path) -> dict[str, Tensor]:
    """The parameters that `save_int8_delta` stored as differences from `base`, on its device and in its dtypes.

    Raises AccelError if the file has other names or shapes.
    """
    stored, parameters = read_weights(file), dict(base.named_parameters())
    shapes = {name: (p.numel(), p.shape[0] if p.ndim > 1 else 1) for name, p in parameters.items()}
    found = {k: (w.numel(), stored[k + SCALE].numel()) for k, w in stored.items() if k + SCALE in stored}
    if found != shapes:
        raise AccelError(f"{file.name} in {file.parent.name} holds weights of another architecture")

    loaded = allocate_contiguous(parameters)
    for name, p in parameters.items():
        delta = stored[name].float() * stored[name + SCALE].unsqueeze(-1)
        loaded[name].copy_(p.detach().float() + delta.view(p.shape).to(p.device))
    return loaded


def allocate_contiguous(like: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Empty tensors like these parameters, in one contiguous buffer for each dtype and device.

    One buffer for each parameter makes the C library trim and regrow the heap in every call: 8 % slower on a CPU.
    """
    allocated: dict[str, Tensor] = {}
    for kind in {(p.dtype, p.device) for p in like.values()}:
        same = {name: p for name, p in like.items() if (p.dtype, p.device) == kind}
        sizes = [p.numel() for p in same.values()]
        buffer = torch.empty(sum(sizes), dtype=kind[0], device=kind[1])
        parts = zip(same.items(), buffer.split(sizes), strict=True)
        allocated |= {name: part.view(p.shape) for (name, p), part in parts}
    return allocated


@contextmanager
def swapped_parameters(module: nn.Module, others: dict[str, Tensor]) -> Iterator[None]:
    """Inside the context, the parameters hold other tensors; on exit the tensors they held before, bitwise.

    A module that is moved or converted inside stays so; one whose weights accelerate offloads inside no longer is.
    """
    before = {name: (p, p.data) for name, p in module.named_parameters()}
    for name, (p, _) in before.items():
        p.data = others[name]
    try:
        yield
    finally:
        if any(p.is_meta for p in module.parameters()):  # the offloaded copies are of the other tensors
            remove_hook_from_module(module, recurse=True)
        now = dict(module.named_parameters())
        for name, (p, data) in before.items():
            p = now.get(name, p)  # offloading has made new ones
            p.data = data.to(p.device, p.dtype)


@contextmanager
def separate_projections(model: nn.Module) -> Iterator[None]:
    """Inside the context, attentions have separate projections, as a student's weights do; on exit as before.

    Projections that are fused inside are of the student, so they are dropped on exit.
    """
    fused = any(getattr(module, "fused_projections", False) for module in model.modules())
    model.unfuse_qkv_projections()
    try:
        yield
    finally:
        model.unfuse_qkv_projections()
        if fused:
            model.fuse_qkv_projections()


@contextmanager
def with_lora(module: nn.Module, folder: Path) -> Iterator[None]:
    """Inside the context, a diffusers model runs with the LoRA of a folder, besides its own; on exit as before."""
    check_weights(folder / ADAPTER)
    had_adapters = bool(getattr(module, "peft_config", None))
    requires_grad = [(p, p.requires_grad) for p in module.parameters()]
    others = module.active_adapters() if had_adapters else []
    disabled = any(getattr(layer, "disable_adapters", False) is True for layer in module.modules())
    with torch.random.fork_rng(devices=()):  # it draws initial weights from the global generator
        module.load_lora_adapter(folder, prefix=None, weight_name=ADAPTER, adapter_name=NAME)
    module.set_adapter([NAME] if disabled else [*others, NAME])
    module.enable_adapters()
    try:
        yield
    finally:
        if NAME in (getattr(module, "peft_config", None) or {}):  # or somebody has unloaded all adapters inside
            module.delete_adapters(NAME)
            _unwrap_empty(module)
        if left := set(getattr(module, "peft_config", None) or {}):
            module.set_adapter([name for name in others if name in left] or sorted(left))
            if disabled:
                module.disable_adapters()
        else:
            module.unload_lora()
            if not had_adapters and hasattr(module, "_hf_peft_config_loaded"):
                del module._hf_peft_config_loaded
        for p, before in requires_grad:  # peft freezes the layers below an adapter and unfreezes active adapters
            p.requires_grad_(before)


def check_adapter(module: nn.Module, scale: float) -> None:
    """Raise AccelError if the adapter that `with_lora` put on a module is gone, inactive or scaled."""
    is_gone = NAME not in (getattr(module, "peft_config", None) or {})
    layers = [layer for layer in module.modules() if NAME in getattr(layer, "lora_A", ())]
    if is_gone or scale != 1 or any(layer.disable_adapters or NAME not in layer.active_adapters for layer in layers):
        raise AccelError("the student is a LoRA and acts in full or not at all: leave adapters and their scale alone")


def _unwrap_empty(module: nn.Module) -> None:
    """Replace LoRA layers that have no adapter left by the layers below them."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "base_layer") and not layer.lora_A:
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, layer.base_layer)
