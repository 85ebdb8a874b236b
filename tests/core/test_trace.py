"""The trace: counted FLOPs by hand."""

from accel.core.trace import Step, Trace


def test_flops_computed_and_full_by_hand():
    """Two calls of 100 FLOPs; the second skips one attention of 30: 170 of 200."""
    trace = Trace(flops={"denoiser": 100, "blocks.0.attn1": 30})
    for index in range(2):
        trace.record(Step(index, 2, 1.0, 0.5, "cond"), "denoiser", "compute")
    trace.record(Step(1, 2, 1.0, 0.5, "cond"), "blocks.0.attn1", "reuse")
    assert trace.flops_computed_and_full() == (170, 200)
