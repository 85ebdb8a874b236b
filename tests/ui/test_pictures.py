"""The timeline and the token maps."""

import re

from accel.core.trace import Step, Trace
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


def test_a_trace_without_steps_has_no_timeline():
    assert timeline({}) == timeline(Trace().to_json()) == ""


def test_token_maps_show_the_rate_of_each_step_and_the_tokens_that_stay():
    data = {"core_share": 0.4, "forecast": 1.3, "overhead_ms": 5.0, "full_attention_ms": 2.0}
    data["rates"] = {"a": [[0, 0], [0.5, 0.2]]}
    data["kept_tokens"] = {"a": {"query": ["01", "10"]}}
    html = token_maps({"steps": [{"ms": 40}, {"ms": 60}], "method_data": {"asymrnr": data}})
    assert "step 2, a: 50% queries removed" in html and "step 2, a: 20% keys and values removed" in html
    assert "took 5 ms, 5.0% of the denoising" in html and "took 2 ms, 2.0% of the denoising" in html and "1.30×" in html
    assert re.findall(r"<title>(stays|removed)</title>", html) == ["removed", "stays", "stays", "removed"]
    assert token_maps({"steps": [], "method_data": {}}) == ""


def test_layer_names_are_escaped():
    trace = Trace()
    step = Step(0, 1, 1.0, 0.0, "cond")
    trace.sigmas[0] = 1.0
    trace.record(step, "<script>", "reuse")
    assert "&lt;script&gt;" in timeline(trace.to_json()) and "<script>" not in timeline(trace.to_json())
