"""Diffusers' context parallelism, two processes on the CPU: methods act on each one's tokens, or are refused.

Wan alone, by Ulysses: on the CPU, diffusers' ring attention has no backend and its LTX fails on the mask of its text;
the other families have no plan for it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_fastercache_acts_alike_on_all_ranks_and_what_needs_all_tokens_is_refused():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "tests/context_parallel.py"], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for rank in json.loads(run.stdout):
        assert max(rank["error"].values()) < 1e-5 < 1e-3 < rank["effect"]
        assert rank["same_events"]
        alone, shared = rank["bytes"]
        assert shared < alone  # of the attentions, only its own part
        tokens, blocks = rank["refused"]
        assert tokens.startswith("tokens cannot be reduced under context parallelism")
        assert blocks.startswith("steps cannot be predicted under context parallelism")
