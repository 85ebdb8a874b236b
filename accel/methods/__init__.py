"""The only list of methods."""

from .asymrnr.asymrnr import AsymRnR
from .base import Method
from .disca.disca import DisCa
from .fastercache import FasterCache
from .gpd import GPD
from .meanflow import MeanFlow
from .stepcache import StepCache

METHODS: dict[str, type[Method]] = {
    "fastercache": FasterCache,
    "asymrnr": AsymRnR,
    "gpd": GPD,
    "meanflow": MeanFlow,
    "disca": DisCa,
    "stepcache": StepCache,
}
