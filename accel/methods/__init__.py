"""The only list of methods."""

from .asymrnr import AsymRnR
from .base import Method
from .fastercache import FasterCache
from .gpd import GPD

METHODS: dict[str, type[Method]] = {"fastercache": FasterCache, "asymrnr": AsymRnR, "gpd": GPD}
