"""The step timeline: what each step computed, reused or rebuilt, per branch and block, as one SVG."""

from __future__ import annotations

from accel.core.trace import DENOISER

ACTION_STYLE = {  # action -> colour, what it means
    "compute": ("#3b82f6", "computed"),
    "reuse": ("#f59e0b", "attention reused"),
    "rebuild": ("#a3a3a3", "branch rebuilt"),
    "reduce": ("#10b981", "tokens reduced"),
    "predict": ("#a855f7", "predicted"),
    "skip": ("#e5e5e5", "skipped"),
}
CELL, GAP, LEFT = 12, 2, 78


def timeline(trace: dict) -> str:
    """SVG of a trace (`Trace.to_json()`): a column per step, a row per branch and block; hover for the details."""
    steps, layers = trace.get("steps", []), trace.get("layers", [])
    if not steps:
        return ""
    events = {(step, branch, layer): action for step, branch, layer, action, _ in trace["events"]}
    branches = [b for b in ("cond", "uncond") if any(e[1] == b for e in trace["events"])]
    cells, top, used = [], 16, set()
    for branch in branches:
        cells.append(f'<text x="0" y="{top + 9}" class="name">{branch}</text>')
        for row, layer in enumerate(layers):
            y = top + row * CELL
            for column, step in enumerate(steps):
                whole = events.get((step["index"], branch, DENOISER), "compute")
                action = whole if whole != "compute" else events.get((step["index"], branch, layer), "compute")
                used.add(action)
                hint = f"step {step['index'] + 1}, σ {step['sigma']:.3f}, {branch}, {layer}: {ACTION_STYLE[action][1]}"
                cells.append(
                    f'<rect x="{LEFT + column * CELL}" y="{y}" width="{CELL - GAP}" height="{CELL - GAP}" rx="2" '
                    f'fill="{ACTION_STYLE[action][0]}"><title>{hint}</title></rect>'
                )
        top += len(layers) * CELL + 8
    slowest = max(s["ms"] for s in steps) or 1
    for column, step in enumerate(steps):
        tall = 28 * step["ms"] / slowest
        cells.append(
            f'<rect x="{LEFT + column * CELL}" y="{top + 28 - tall:.1f}" width="{CELL - GAP}" height="{tall:.1f}" '
            f'fill="#64748b"><title>step {step["index"] + 1}: {step["ms"]:.0f} ms</title></rect>'
        )
    cells.append(f'<text x="0" y="{top + 20}" class="name">ms a step</text>')
    numbers = "".join(
        f'<text x="{LEFT + (i - 1) * CELL}" y="9" class="name">{i}</text>' for i in range(1, len(steps) + 1, 5)
    )
    legend = "".join(
        f'<span><i style="background:{ACTION_STYLE[a][0]}"></i>{ACTION_STYLE[a][1]}</span>'
        for a in ACTION_STYLE
        if a in used
    )
    width, height = LEFT + len(steps) * CELL, top + 34
    return (
        f'<div class="timeline" role="img" aria-label="what each step computed"><div class="legend">{legend}</div>'
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"{numbers}{''.join(cells)}</svg></div></div>"
    )
