"""Token maps: the reduction rate of each layer and step, and which tokens of a frame stay, as SVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from accel.evaluation.patterns import BLUE, GREEN
from accel.evaluation.step_map import CELL, LEFT, WIDTH, Label
from ui.templating import render

FEATURES = {"query": "queries", "kv": "keys and values"}  # in the order of a rate pair
ROW, TOP = 16, 20  # pixels from one row of rates to the next, and above the first
TOKEN = 14  # pixels from one token to the next


class Cell(NamedTuple):
    """One square, of which the lower part `share` is filled, and what it says."""

    x: float
    y: float
    width: float
    height: float
    share: float
    hint: str


@dataclass(frozen=True)
class Map:
    """One SVG with its title; `name` is its accessible label."""

    title: str
    name: str
    colour: str
    width: float
    height: float
    labels: list[Label]
    cells: list[Cell]


def token_maps(trace: dict) -> Markup:
    """HTML for each method of a trace (`Trace.to_json()`) that reports reduction rates; empty if none does.

    A `gr.HTML` that shows it needs `js_on_load=ui.timeline.READ_OUT` for the line under the maps.
    """
    reports = [data for data in trace.get("method_data", {}).values() if data.get("kept_tokens")]
    return Markup().join(
        render(
            "token_maps", summary=_summary(data, trace["steps"]),
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
    """A column per step, a row per layer; the filled height of a cell is the rate of one feature."""
    name = f"{list(FEATURES.values())[index]} removed"
    count = len(next(iter(rates.values())))
    column = min(max((WIDTH - LEFT) / count, CELL[0]), CELL[1])
    cells = [
        Cell(round(LEFT + x * column, 2), TOP + y * ROW, round(column - 1, 2), ROW - 2, pair[index],
             f"step {x + 1}, {layer}: {pair[index]:.0%} {name}")
        for y, (layer, pairs) in enumerate(rates.items())
        for x, pair in enumerate(pairs)
    ]  # fmt: skip
    labels = [Label(LEFT + i * column, 12, f"{i + 1}") for i in range(0, count, 5)]
    labels += [Label(LEFT - 6, TOP + y * ROW + 12, _block(layer), "end") for y, layer in enumerate(rates)]
    title = f"{name}, by step (across) and block (down): a cell is filled as high as the share that is removed"
    return Map(title, name, GREEN, LEFT + count * column, TOP + len(rates) * ROW, labels, cells)


def _block(layer: str) -> str:
    """The name of a layer as far as a row has place: "block 3" of "blocks.3.attn1"."""
    number = next((part for part in layer.split(".") if part.isdigit()), "")
    return f"block {number}" if number else layer[:10]


def _kept_tokens_map(data: dict) -> Map:
    """The tokens of the middle frame in the layer with the highest rates; tokens that stay are filled."""
    layer = max(data["kept_tokens"], key=lambda name: max(sum(pair) for pair in data["rates"][name]))
    features, left = data["kept_tokens"][layer], 1
    labels, cells = [], []
    for feature, rows in features.items():
        labels.append(Label(left, 12, FEATURES[feature]))
        for y, row in enumerate(rows):
            for x, token in enumerate(row):
                stays = token == "1"
                hint = f"{FEATURES[feature]}, row {y + 1}, column {x + 1}: {'stays' if stays else 'removed'}"
                cells.append(Cell(left + x * TOKEN, TOP + y * TOKEN, TOKEN - 2, TOKEN - 2, float(stays), hint))
        left += max(len(rows[0]) * TOKEN, 130) + 24
    height = TOP + max(len(rows) for rows in features.values()) * TOKEN
    title = f"tokens of the middle frame that stay in {layer}, when first reduced: filled ones stay"
    return Map(title, "tokens that stay", BLUE, left, height, labels, cells)
