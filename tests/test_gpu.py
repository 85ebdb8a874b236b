"""On a GPU: students are trained, and methods are timed at a real model's size."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="there is no NVIDIA GPU here"),
]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """A command that may use the GPU, which the other tests hide."""
    seen = {name: value for name, value in os.environ.items() if (name, value) != ("CUDA_VISIBLE_DEVICES", "")}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, env=seen, capture_output=True, text=True)


@pytest.mark.parametrize("what", ["gpd", "meanflow", "predictor"])
def test_training_begins_on_a_gpu_and_leaves_what_a_resumed_run_needs(what, tmp_path):
    done = run("accel", "train", what, "--minutes", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])[what]
    assert record["setting"] == "large" and record["device"].startswith("NVIDIA") and not record["finished"]
    assert list(tmp_path.glob(f"*/{what}/*/state.pt"))


def test_methods_are_timed_at_a_real_models_size(tmp_path):
    done = run("accel", "gpu", "--out", str(tmp_path), "--layout", "ltx")
    assert done.returncode == 0, done.stderr
    for name in ("ltx", "ltx-compiled"):
        rows = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        assert rows["fastercache"]["work"] < 1 and rows["baseline"]["roofline"] > 0
        assert rows["fastercache"]["peak_memory_bytes"] > rows["baseline"]["peak_memory_bytes"] > 3e9
