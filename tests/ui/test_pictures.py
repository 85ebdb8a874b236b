"""The timeline and the token maps."""

import re

import pytest

from accel.core.trace import Step, Trace
from accel.evaluation.stage_bars import stage_bars
from accel.evaluation.step_map import ACTIONS, step_map
from ui.timeline import timeline
from ui.token_maps import token_maps


def count(svg: str, action: str) -> int:
    """Cells of an action in a timeline."""
    return svg.count(f'data-action="{action}"')


def test_timeline_shows_every_step_of_every_layer():
    trace = Trace()
    for i in range(3):
        step = Step(i, 3, 1 - i / 3, 0.5, "cond")
        trace.sigmas[i] = step.sigma
        trace.record(step, "denoiser", "compute")
        trace.record(step, "blocks.0.attn1", "reuse" if i == 1 else "compute")
    svg = timeline(trace.to_json())
    assert count(svg, "reuse") == 1 and count(svg, "compute") == 2
    assert "step 2, σ 0.667, cond, blocks.0.attn1: attention reused" in svg
    assert "computed</span>" in svg and "attention reused</span>" in svg and "predicted</span>" not in svg


def test_timeline_shows_full_steps_and_predicted_steps():
    trace = Trace()
    for i in range(4):
        step = Step(i, 4, 1 - i / 4, 0.5, "cond")
        trace.sigmas[i] = step.sigma
        for layer in ("denoiser", "blocks.0.attn1"):
            trace.record(step, layer, "compute")
        if i in (1, 2):
            trace.record(step, "denoiser", "predict", 0.2)
            trace.discard(step, ["blocks.0.attn1"])
    svg = timeline(trace.to_json())
    assert count(svg, "predict") == 2 and count(svg, "compute") == 2
    assert "step 2, σ 0.750, cond, blocks.0.attn1: predicted" in svg


def test_every_action_has_its_own_mark_and_text_has_the_colour_of_its_surroundings():
    marks = [pattern.mark for pattern in ACTIONS.values()]
    assert len(set(marks)) == len(marks)
    trace = Trace()
    trace.record(Step(0, 1, 1.0, 0.0, "cond"), "blocks.0.attn1", "reuse")
    trace.sigmas[0] = 1.0
    html = timeline(trace.to_json())
    assert '<g fill="currentColor" font-size="12"' in html and html.count("<path") == 2  # in the map and the legend


@pytest.mark.parametrize("steps,layers,width", [(50, 8, 860), (100, 30, 860), (4, 8, 140)])
def test_the_map_fits_the_page_as_long_as_its_cells_can_be_seen(steps, layers, width):
    trace = Trace()
    for i in range(steps):
        trace.sigmas[i] = 1 - i / steps
        for branch in ("cond", "uncond"):
            for layer in range(layers):
                trace.record(Step(i, steps, 1 - i / steps, 0.5, branch), f"blocks.{layer}.attn1", "reuse")
    svg = re.search(r'viewBox="0 0 (\d+) (\d+)"', step_map(trace.to_json()))
    assert int(svg[1]) <= width and int(svg[2]) < 600


def test_the_timeline_is_a_table_too():
    trace = Trace()
    for i in range(2):
        step = Step(i, 2, 1 - i / 2, 0.5, "cond")
        trace.sigmas[i], trace.milliseconds[i] = step.sigma, 40.0
        trace.record(step, "denoiser", "compute")
        for layer in range(2):
            trace.record(step, f"blocks.{layer}.attn1", "reuse" if (i, layer) == (1, 0) else "compute")
    html = timeline(trace.to_json())
    assert "<td>computed</td>" in html and "<td>1 attention reused, 1 computed</td>" in html


def test_stage_bars_have_one_scale():
    html = stage_bars({"a": {"text": [1.0], "denoise": [3.0, 9.0, 8.0]}, "b": {"text": [1.0], "denoise": [3.5]}})
    widths = [float(w) for w in re.findall(r'data-stage="denoise" x="[\d.]+" y="0" width="([\d.]+)"', html)]
    assert widths == pytest.approx([889, 389], abs=1) and "denoise 3.50 s" in html and "9.00 s in total" in html


def test_a_trace_without_steps_has_no_timeline():
    assert timeline({}) == timeline(Trace().to_json()) == ""


def test_token_maps_show_the_rate_of_each_step_and_the_tokens_that_stay():
    data = {"core_share": 0.4, "forecast": 1.3, "overhead_ms": 5.0, "full_attention_ms": 2.0}
    data["rates"] = {"a": [[0, 0], [0.5, 0.2]]}
    data["kept_tokens"] = {"a": {"query": ["01", "10"]}}
    html = token_maps({"steps": [{"ms": 40}, {"ms": 60}], "method_data": {"asymrnr": data}})
    assert "step 2, a: 50% queries removed" in html and "step 2, a: 20% keys and values removed" in html
    assert "took 5 ms, 5.0% of the denoising" in html and "took 2 ms, 2.0% of the denoising" in html and "1.30×" in html
    assert re.findall(r": (stays|removed)</title>", html) == ["removed", "stays", "stays", "removed"]
    assert token_maps({"steps": [], "method_data": {}}) == ""


def test_layer_names_are_escaped():
    trace = Trace()
    step = Step(0, 1, 1.0, 0.0, "cond")
    trace.sigmas[0] = 1.0
    trace.record(step, "<script>", "reuse")
    assert "&lt;script&gt;" in timeline(trace.to_json()) and "<script>" not in timeline(trace.to_json())
