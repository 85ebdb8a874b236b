"""The presets as cards: name, one line, and what was measured with it on the shipped model."""

from __future__ import annotations

from functools import cache

from accel.runtime.models import TINY
from accel.runtime.presets import load_preset, preset_names

PLAIN = "plain"  # the card without methods
FEATURED = (  # before the research variants
    "stepcache", "balanced", "quick", "turbo", "fastercache", "asymrnr", "combined", "meanflow", "disca", "gpd",
)  # fmt: skip


def card_choices(model: str) -> list[tuple[str, str]]:
    """(text of the card, preset) of each card; the text has two lines: name and figures, about."""
    names = [*FEATURED, *(name for name in preset_names() if name not in FEATURED)]
    presets = {name: load_preset(name) for name in names}
    cards = [(f"{p.title or name} {_figures(name, model)}\n{p.about}", name) for name, p in presets.items()]
    cards.insert(len(FEATURED), (f"{PLAIN}\nThe stock pipeline, at the steps you choose.", PLAIN))
    return cards


def _figures(preset: str, model: str) -> str:
    """Measured speed-up and SSIM of a preset on the shipped model; empty where it was not measured."""
    figures = measured_figures().get(preset) if model == TINY else None
    return f"· {figures[0]:.1f}× · SSIM {figures[1]:.3f}".replace("SSIM 0", "SSIM ") if figures else ""


@cache
def measured_figures() -> dict[str, tuple[float, float]]:
    """{preset: (speed-up, SSIM)} from the committed results; empty where they are not installed."""
    from accel.evaluation.suites import FRONT, preset_rows, results

    return {preset: (row["speedup"], row["ssim"][0]) for preset, row in preset_rows(results(FRONT)).items()}
