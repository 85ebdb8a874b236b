"""Which of diffusers' attention backends can weight merged keys by their number of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn

from ...errors import AccelError

if TYPE_CHECKING:
    from .asymrnr import AsymRnR

# Elsewhere than on CUDA, the weights are a mask that is added to the logits. The other backends refuse masks, or take
# only those that hide keys.
ADDS_MASK = {"native", "_native_cudnn", "_native_efficient", "_native_math", "flex", "xformers"}
# On CUDA, they are in eight more channels of queries and keys. These backends have kernels for some widths only.
FIXED_WIDTHS = {name.value for name in AttentionBackendName if "sage" in name.value} | {"flash_4_hub"}


def check_backends(config: AsymRnR, attentions: Iterable[nn.Module], on_cuda: bool) -> None:
    """Raise AccelError if merged keys are to be weighted and the backend of an attention cannot do that."""
    if not config.bias or (config.pairing != "one" and not any(kv for _, kv in config.rate_pairs)):
        return
    active, _ = _AttentionBackendRegistry.get_active_backend()
    processors = [getattr(attention.processor, "original", attention.processor) for attention in attentions]
    for processor in processors:
        if not hasattr(processor, "_attention_backend"):  # it calls torch itself
            continue
        name = AttentionBackendName(processor._attention_backend or active).value
        if name in FIXED_WIDTHS if on_cuda else name not in ADDS_MASK:
            raise AccelError(
                f"attention backend {name} cannot weight merged keys: set asymrnr.bias to false, or choose another "
                "backend, such as native"
            )
