"""The only list of methods: ours, then the peers."""

from .asymrnr.asymrnr import AsymRnR
from .base import Method
from .cachedit import DBCache
from .disca.disca import DisCa
from .fastercache import FasterCache
from .fittedsolver import FittedSolver
from .gpd import GPD
from .meanflow import MeanFlow
from .peers import (
    DiffusersFasterCache,
    FirstBlockCache,
    MagCache,
    PyramidAttentionBroadcast,
    SeaCache,
    TaylorSeer,
)
from .stepcache import StepCache

METHODS: dict[str, type[Method]] = {
    "fastercache": FasterCache,
    "asymrnr": AsymRnR,
    "gpd": GPD,
    "meanflow": MeanFlow,
    "disca": DisCa,
    "stepcache": StepCache,
    "fittedsolver": FittedSolver,
    "seacache": SeaCache,
    "taylorseer": TaylorSeer,
    "magcache": MagCache,
    "firstblockcache": FirstBlockCache,
    "pab": PyramidAttentionBroadcast,
    "diffusers_fastercache": DiffusersFasterCache,
    "dbcache": DBCache,
}
