"""Puts a student's weights in place of the denoiser's, and refuses what cannot go together with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import Tensor, nn

from ..core.calls import running_call
from ..core.hooks import patched_method, refused_method
from ..core.host import Host
from ..errors import AccelError
from .euler_scheduler import is_student_run
from .weights import (
    ADAPTER,
    check_adapter,
    load_int8_delta,
    matches_fingerprint,
    separate_projections,
    swapped_parameters,
    with_lora,
)


def check_base(folder: Path, fingerprint: list[float], pipe) -> None:
    """Raise AccelError unless the student in a folder was made from the pipeline's only transformer."""
    if is_student_run(pipe):
        raise AccelError(f"student {folder.name!r} and another one do not go together: each replaces the whole model")
    if getattr(pipe, "transformer_2", None) is not None:
        raise AccelError(f"student {folder.name!r} replaces one transformer, this pipeline has two")
    if not matches_fingerprint(pipe.transformer, fingerprint):
        raise AccelError(f"student {folder.name!r} was made from another base model: train it from this one")


@contextmanager
def load_student(folder: Path, module: nn.Module) -> Iterator[None]:
    """Inside the context, a module has the weights of the student in a folder, which cannot be fused or offloaded.

    Raises AccelError if the folder has full weights and the module has LoRA adapters.
    """
    with separate_projections(module), _forbid_changes(module):
        if (folder / ADAPTER).is_file():
            student = with_lora(module, folder)
        elif getattr(module, "peft_config", None):
            raise AccelError(f"student {folder.name!r} replaces all weights, which a LoRA is on: unload the LoRA first")
        else:
            student = swapped_parameters(module, load_int8_delta(module, folder / "model.safetensors"))
        with student:
            yield


@contextmanager
def _forbid_changes(module: nn.Module) -> Iterator[None]:
    """Inside the context, refuse what would outlive it in the base.

    A LoRA that is unfused later would leave the base, where it never was; group offloading keeps copies of the weights
    that it finds, and would bring the student back.
    """

    fusing = "a LoRA cannot be fused into a student's weights: fuse it outside accel.apply"
    offloading = "a student's weights cannot be offloaded in groups: enable that before accel.apply"
    with refused_method(module, "fuse_lora", fusing), refused_method(module, "enable_group_offload", offloading):
        yield


def weight_bytes(folder: Path, module: nn.Module) -> int:
    """Bytes that the student in a folder takes besides its base: a second set of weights, or a LoRA."""
    if (folder / ADAPTER).is_file():
        return (folder / ADAPTER).stat().st_size
    return sum(p.numel() * p.element_size() for p in module.parameters())


@contextmanager
def student_run(host: Host, folder: Path, method: str) -> Iterator[None]:
    """Inside the context, runs report the memory of the student in a folder, and what it cannot do is refused.

    That is guidance, a negative prompt, another scheduler or transformer, and a LoRA of it that acts in part.
    """
    model, is_lora = host.denoisers[0], (folder / ADAPTER).is_file()
    reserve_memory = host.per_run(lambda: host.trace.reserve_memory(method, weight_bytes(folder, model)))

    def call(inner: Callable, x: Tensor, **inputs) -> Tensor:
        reserve_memory()
        host.check_denoiser(model, f"student {folder.name!r}")
        if host.is_guided:
            raise AccelError("a student has guidance distilled in: set guidance to 1")
        running, _ = running_call(host.pipe)  # it may be another one, with this transformer
        if not is_student_run(running):
            scheduler = type(running.scheduler).__name__
            raise AccelError(f"a student predicts mean velocities, which {scheduler} cannot use: keep its scheduler")
        if is_lora:
            check_adapter(model, (inputs.get("attention_kwargs") or {}).get("scale", 1))
        return inner(x, **inputs)

    offloading = "a student's weights cannot be offloaded one by one: use enable_model_cpu_offload()"
    with host.wrap_denoiser(call), _forbid_negative_prompt(host.pipe):
        with nullcontext() if is_lora else refused_method(host.pipe, "enable_sequential_cpu_offload", offloading):
            yield


@contextmanager
def _forbid_negative_prompt(pipe) -> Iterator[None]:
    """Inside the context, refuse a negative prompt: the stock pipeline would ignore it when it runs one branch."""
    encode = pipe.encode_prompt
    signature = inspect.signature(encode)

    def refuse(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        texts = arguments.get("negative_prompt") or ""
        has_text = any([texts] if isinstance(texts, str) else texts)
        has_negative = has_text or arguments.get("negative_prompt_embeds") is not None
        if has_negative and not arguments.get("do_classifier_free_guidance", True):  # a guided run is refused anyway
            raise AccelError("a student has no unconditional branch for a negative prompt to act in: leave it out")
        return encode(*args, **kwargs)

    with patched_method(pipe, "encode_prompt", refuse):
        yield
