"""Puts a student's weights in the denoiser's place and forbids classifier-free guidance while they are there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import Tensor, nn

from ..core.hooks import patched_method
from ..core.host import Host
from .scheduler import is_student_run
from .weights import ADAPTER, check_adapter, load_int8_delta, swapped_parameters, with_lora


def load_student(folder: Path, module: nn.Module) -> AbstractContextManager:
    """A context in which the weights of a student's folder are the module's.

    Raises ValueError for full weights where the module has adapters.
    """
    if (folder / ADAPTER).is_file():
        return with_lora(module, folder)
    if getattr(module, "peft_config", None):
        raise ValueError(f"student {folder.name!r} replaces all weights, which a LoRA is on: unload the LoRA first")
    return swapped_parameters(module, load_int8_delta(module, folder / "model.safetensors"))


def weight_bytes(folder: Path, module: nn.Module) -> int:
    """The weights that wait while a student's are in their place; for an adapter, the adapter."""
    if (folder / ADAPTER).is_file():
        return (folder / ADAPTER).stat().st_size
    return sum(p.numel() * p.element_size() for p in module.parameters())


@contextmanager
def forbid_cfg(host: Host) -> Iterator[None]:
    """Inside, guidance and negative prompts are refused: what they ask for is built into a student, or not in it."""

    def call(inner: Callable, x: Tensor, **inputs) -> Tensor:
        if host.family.is_guided(host.pipe):
            raise ValueError("a student has guidance built in, more of it burns the colours: set guidance to 1")
        if not is_student_run(host.pipe):
            solver = type(host.pipe.scheduler).__name__
            raise ValueError(
                f"a student gives mean velocities, {solver} takes them for slopes: leave the scheduler alone"
            )
        check_adapter(host.denoisers[host.active_index], (inputs.get("attention_kwargs") or {}).get("scale", 1))
        return inner(x, **inputs)

    with host.wrap_denoiser(call), _no_negative(host.pipe):
        yield


@contextmanager
def _no_negative(pipe) -> Iterator[None]:
    """Inside, a negative prompt is refused: the stock pipeline would drop it without a word, as it runs one branch."""
    encode = pipe.encode_prompt
    signature = inspect.signature(encode)

    def refuse(*args, **given):
        asked = signature.bind(*args, **given).arguments
        texts = asked.get("negative_prompt") or ""
        given_one = any([texts] if isinstance(texts, str) else texts) or asked.get("negative_prompt_embeds") is not None
        if given_one and not asked.get("do_classifier_free_guidance", True):  # with guidance the run is refused anyway
            raise ValueError("a student has no unconditional branch for a negative prompt to act in: leave it out")
        return encode(*args, **given)

    with patched_method(pipe, "encode_prompt", refuse):
        yield
