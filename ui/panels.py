"""Small pieces of the page as HTML: the live panes, the figures, the note at the end."""

from __future__ import annotations

from html import escape
from statistics import median

from ui.timeline import timeline

EMPTY_PANE = ""


def pane_waiting(title: str, why: str) -> str:
    """A pane that has not begun, or need not."""
    return f'<div class="live"><b>{title}</b><progress max="1" value="0"></progress><span>{why}</span></div>'


def pane(title: str, done: int, steps: int, ms: float, work: float, image: str, trace: dict) -> str:
    """A pane that is being generated: steps, time left, speed, computed share of the work, preview, timeline."""
    left = ms / 1000 * (steps - done)
    return (
        f'<div class="live"><b>{title}</b><progress max="{steps}" value="{done}"></progress>'
        f"<span>step {done} / {steps} · {ms:.0f} ms a step · {left:.1f} s left · "
        f"{work:.0%} of these steps' work</span>"
        f'<img src="{image}" alt="preview of the first frame">{timeline(trace)}</div>'
    )


def metric_cards(report: dict) -> str:
    """The figures of a pair as cards."""
    r = report
    when = r.get("baseline_from")
    against = f", baseline measured earlier ({when})" if when else ""
    cards = [
        (f"{r['speedup_denoise']:.2f}×", "speed of denoising" + against),
        (f"{r['speedup_total']:.2f}×", "speed end to end" + against),
        (f"{r['work_ratio']:.0%}", "of the work computed (FLOPs)"),
        ("bit-equal" if r["bit_equal"] else f"{r['psnr']:.1f} dB", "PSNR to the baseline"),
        (f"{r['ssim']:.4f}", f"SSIM, worst frame {r['ssim_worst']:.4f}"),
    ]
    if r.get("adherence_b") is not None:
        wrong = [a for a, mark in r["attributes"]["b"].items() if not mark]
        cards.append((f"{r['adherence_b']:.0%}", f"of the prompt read back, baseline {r['adherence_a']:.0%}"
                      + (f"; not seen: {escape(', '.join(wrong))}" if wrong else "")))  # fmt: skip
    shown = "".join(f'<div class="card"><b>{value}</b><span>{text}</span></div>' for value, text in cards)
    n = len(r["b"]["denoise"])
    label = (
        "toy model: shows the mechanism, not what you get on Wan 1.3B"
        if r["model"].endswith("tiny-wan")
        else r["model"]
    )
    recorded = f"recorded, measured {escape(r['measured'])}: " if r.get("measured") else ""
    base = f"{recorded}{escape(r['device'])}, {r['threads']} threads, {r['dtype']}, n={n}; {escape(label)}"
    stages = "".join(_bar(p, r[p]) for p in "ab")
    return f'<div class="cards">{shown}</div><div class="stages">{stages}</div><div class="base">{base}</div>'


def _bar(which: str, seconds: dict) -> str:
    """Seconds per stage of one side in words."""
    parts = " · ".join(f"{stage} {median(times):.2f} s" for stage, times in seconds.items())
    return f"<div><b>{'baseline' if which == 'a' else 'accelerated'}</b> {parts}</div>"


def about() -> str:
    """What one is looking at, in a few sentences."""
    return (
        "---\nBoth panes start from the same noise. The baseline is the stock pipeline; the other one leaves out work "
        "and shows where. The code above makes the same video with the library behind this page.\n"
    )
