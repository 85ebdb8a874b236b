"""What all tabs of the page share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ui.reference_cache import ReferenceCache

if TYPE_CHECKING:
    from ui.store import Store
    from ui.worker import Workers


@dataclass
class Context:
    """The server's model, its workers, the store of finished pairs, and the references that need not be made again."""

    model: str
    workers: Workers
    store: Store
    references: ReferenceCache = field(default_factory=ReferenceCache)
