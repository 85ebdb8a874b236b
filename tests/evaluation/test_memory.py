"""The forecast of what methods hold on real models, by hand."""

import pytest

from accel.evaluation.layouts import LAYOUTS
from accel.evaluation.memory import SETTINGS, forecast


def test_the_forecast_is_by_tokens_width_and_layers():
    size, tokens, gib = forecast(LAYOUTS["LTX-Video"])
    assert (size, tokens) == ("704x512, 161 frames", 21 * 16 * 22)
    outputs = 28 * 2 * 2 * tokens * 2048 * 2  # layers, outputs, branches, tokens, width, bytes of a bfloat16
    delta = 128 * tokens * (2 * 4 + 2)
    assert dict(zip(SETTINGS, gib))["`fastercache`"] == pytest.approx((outputs + delta) / 2**30)


def test_guidance_that_is_an_input_has_no_second_branch_and_text_counts_in_joint_attention():
    _, tokens, gib = forecast(LAYOUTS["HunyuanVideo"])
    assert dict(zip(SETTINGS, gib))["`fastercache`"] == pytest.approx(60 * 2 * (tokens + 256) * 3072 * 2 / 2**30)
