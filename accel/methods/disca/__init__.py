"""DisCa: the step cache and the small network that predicts the output of the block stack."""

from .disca import DisCa

__all__ = ["DisCa"]
