"""AsymRnR: the method, which rates it uses where (`schedule`, `budget`), how tokens are matched, and the correction."""

from .asymrnr import AsymRnR

__all__ = ["AsymRnR"]
