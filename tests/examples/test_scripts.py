"""The example scripts of the shipped model run; in two steps where a script asks for 50, on small videos."""

import pytest
from diffusers import WanPipeline

from accel.runtime.paths import ROOT

SIZE, SMALLER = "height=96, width=96, num_frames=17", "height=32, width=32, num_frames=5"
STEPS, FEWER = "num_inference_steps=50", "num_inference_steps=2"
SCRIPTS = [
    file for file in sorted((ROOT / "examples" / "python").glob("*.py")) if "models/tiny-wan" in file.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.stem)
def test_script_runs_and_prints_a_summary(script, monkeypatch, capsys, tiny_wan):
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda folder: tiny_wan)
    code = script.read_text().replace(SIZE, SMALLER).replace(STEPS, FEWER)
    exec(compile(code, str(script), "exec"), {"__name__": "__main__"})
    assert "(5, 32, 32, 3)" in capsys.readouterr().out
