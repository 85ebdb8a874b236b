"""The only list of methods."""

from .base import Method
from .fastercache import FasterCache

METHODS: dict[str, type[Method]] = {"fastercache": FasterCache}
