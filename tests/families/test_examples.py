"""The example script of each family runs, with a tiny pipeline in place of the model that it names."""

import pytest
import torch
from diffusers import DiffusionPipeline
from families.tiny import TINY

from accel.runtime.paths import ROOT

SCRIPTS = ["wan", "cogvideox", "hunyuan_video", "hunyuan_video_15", "ltx", "mochi", "skyreels_v2"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_runs_and_prints_what_was_reused(script, monkeypatch, capsys):
    pipe, inputs = TINY[script]()
    kind, stock_call = type(pipe), type(pipe).__call__

    def call(self, prompt: str, num_inference_steps: int):
        generator = torch.Generator().manual_seed(0)
        return stock_call(self, **inputs, num_inference_steps=12, generator=generator, output_type="latent")

    monkeypatch.setattr(kind, "__call__", call)
    monkeypatch.setattr(kind, "from_pretrained", lambda name, dtype: pipe)
    monkeypatch.setattr(DiffusionPipeline, "to", lambda self, device: self)
    code = (ROOT / "examples" / "python" / f"{script}.py").read_text()
    exec(compile(code, script, "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out  # random weights change much from step to step
    assert "'predict': " in out or "StepCache did nothing: its threshold" in out
