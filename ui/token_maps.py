"""Token maps: the reduction rate of each layer and step, and which tokens of a frame stay, as SVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from ui.templating import render
from ui.timeline import ACTION_STYLE, CELL, GAP, LEFT

FEATURES = {"query": "queries", "kv": "keys and values"}  # in the order of a rate pair
REMOVED_OPACITY = 0.12


class Cell(NamedTuple):
    """One square: a rate or a token."""

    x: int
    y: int
    opacity: float
    hint: str


@dataclass(frozen=True)
class Map:
    """One SVG with its title; `name` is its accessible label."""

    title: str
    name: str
    colour: str
    width: int
    height: int
    labels: list[tuple[int, int, str]]
    cells: list[Cell]


def token_maps(trace: dict) -> Markup:
    """HTML for each method of a trace (`Trace.to_json()`) that reports reduction rates; empty if none does."""
    reports = [data for data in trace.get("method_data", {}).values() if data.get("kept_tokens")]
    return Markup().join(
        render(
            "token_maps", summary=_summary(data, trace["steps"]), size=CELL - GAP,
            maps=[*(_rate_map(data["rates"], i) for i in range(len(FEATURES))), _kept_tokens_map(data)],
        )
        for data in reports
    )  # fmt: skip


def _summary(data: dict, steps: list[dict]) -> str:
    sentences = [
        f"The attention cores are {data['core_share']:.0%} of this model's work.",
        f"At these rates denoising would be {data['forecast']:.2f}× as fast if everything that is saved became time.",
    ]
    denoising = sum(step["ms"] for step in steps) or 1
    duration = lambda ms: f"{ms:.0f} ms, {ms / denoising:.1%} of the denoising"
    if data["overhead_ms"] is not None:
        sentences.append(f"Matching, gathering and restoring took {duration(data['overhead_ms'])}.")
        if data.get("full_attention_ms"):  # recorded runs may lack it
            took = duration(data["full_attention_ms"])
            sentences.append(f"Full attention next to reduced attention, to measure what is lost, took {took}.")
    return " ".join(sentences)


def _rate_map(rates: dict[str, list], index: int) -> Map:
    """A column per step, a row per layer; the opacity is the rate of one feature."""
    name = f"{list(FEATURES.values())[index]} removed"
    cells = [
        Cell(LEFT + column * CELL, row * CELL, 0.08 + 0.92 * pair[index],
             f"step {column + 1}, {layer}: {pair[index]:.0%} {name}")
        for row, (layer, pairs) in enumerate(rates.items())
        for column, pair in enumerate(pairs)
    ]  # fmt: skip
    width = LEFT + len(next(iter(rates.values()))) * CELL
    colour = ACTION_STYLE["reduce"].colour
    return Map(f"{name}, by step and block", name, colour, width, len(rates) * CELL, [(0, 9, "blocks")], cells)


def _kept_tokens_map(data: dict) -> Map:
    """The tokens of the middle frame in the layer with the highest rates; tokens that stay are opaque."""
    layer = max(data["kept_tokens"], key=lambda name: max(sum(pair) for pair in data["rates"][name]))
    features, left, top = data["kept_tokens"][layer], 0, 14
    labels, cells = [], []
    for feature, rows in features.items():
        labels.append((left, 9, FEATURES[feature]))
        for y, row in enumerate(rows):
            for x, stays in enumerate(row):
                opacity, hint = (1, "stays") if stays == "1" else (REMOVED_OPACITY, "removed")
                cells.append(Cell(left + x * CELL, top + y * CELL, opacity, hint))
        left += max(len(rows[0]) * CELL, 130) + 24
    height = top + max(len(rows) for rows in features.values()) * CELL
    title = f"tokens of the middle frame that stay in {layer}, when first reduced"
    return Map(title, "tokens that stay", ACTION_STYLE["compute"].colour, left, height, labels, cells)
