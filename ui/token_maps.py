"""What token reduction did, as pictures: the rate in each block and step, and which tokens of a frame stay."""

from __future__ import annotations

CELL, GAP, LEFT = 12, 2, 78
NAMES = {"query": "queries", "kv": "keys and values"}


def token_maps(trace: dict) -> str:
    """HTML for each method of a trace (`Trace.to_json()`) that tells of rates; empty where none does."""
    return "".join(_told(told, trace) for told in trace.get("method_data", {}).values() if told.get("kept_tokens"))


def _told(told: dict, trace: dict) -> str:
    spent = sum(step["ms"] for step in trace["steps"]) or 1
    words = (
        f"The attention cores are {told['core_share']:.0%} of this model's work. Forecast at these rates: "
        f"{told['forecast']:.2f}× if all that is saved arrives."
    )
    if told["overhead_ms"] is not None:
        took = lambda key: f"{told[key]:.0f} ms, {told[key] / spent:.1%} of the denoising"
        words += f" Matching, gathering and restoring took {took('overhead_ms')}."
        if told.get("full_attention_ms"):  # a recorded run may be older
            words += f" Reduced attentions beside whole ones, to see what they miss, took {took('full_attention_ms')}."
    rates = "".join(_rates(told["rates"], i) for i in range(len(NAMES)))
    return f'<div class="maps"><div class="words">{words}</div>{rates}{_kept(told)}</div>'


def _rates(rates: dict[str, list], which: int) -> str:
    """SVG: a column per step, a row per block, the shade is the rate of one feature."""
    cells, name = [], f"{list(NAMES.values())[which]} removed"
    for row, (layer, steps) in enumerate(rates.items()):
        for column, pair in enumerate(steps):
            hint = f"step {column + 1}, {layer}: {pair[which]:.0%} {name}"
            cells.append(
                f'<rect x="{LEFT + column * CELL}" y="{row * CELL}" width="{CELL - GAP}" height="{CELL - GAP}" rx="2" '
                f'fill="#10b981" fill-opacity="{0.08 + 0.92 * pair[which]:.2f}"><title>{hint}</title></rect>'
            )
    size = LEFT + len(next(iter(rates.values()))) * CELL, len(rates) * CELL
    body = f'<text x="0" y="9" class="name">blocks</text>{"".join(cells)}'
    return _figure(f"{name}, by step and block", "#10b981", name, size, body)


def _kept(told: dict) -> str:
    """SVG: the tokens of the middle frame, those that stay filled, in the block with the highest rates."""
    layer = max(told["kept_tokens"], key=lambda s: max(sum(pair) for pair in told["rates"][s]))
    pictures, x = [], 0
    for feature, rows in told["kept_tokens"][layer].items():
        pictures.append(f'<text x="{x}" y="9" class="name">{NAMES[feature]}</text>')
        for i, row in enumerate(rows):
            pictures += [
                f'<rect x="{x + j * CELL}" y="{14 + i * CELL}" width="{CELL - GAP}" height="{CELL - GAP}" rx="2" '
                f'fill="#3b82f6" fill-opacity="{1 if stays == "1" else 0.12}"/>'
                for j, stays in enumerate(row)
            ]
        x += max(len(rows[0]) * CELL, 130) + 24
    size = x, 14 + max(len(rows) for rows in told["kept_tokens"][layer].values()) * CELL
    title = f"tokens of the middle frame that stay in {layer}, when first reduced"
    return _figure(title, "#3b82f6", "tokens that stay", size, "".join(pictures))


def _figure(title: str, colour: str, label: str, size: tuple[int, int], body: str) -> str:
    """An SVG of a size (w, h) under its title, in a box that scrolls where the page is narrow."""
    w, h = size
    return (
        f'<div><div class="legend"><span><i style="background:{colour}"></i>{title}</span></div><div class="scroll">'
        f'<svg viewBox="0 0 {w} {h}" width="{w}" height="{h}" role="img" aria-label="{label}">{body}</svg></div></div>'
    )
