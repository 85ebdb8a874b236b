"""Measures the speed of the methods on a model as large as a real one: `python -m accel gpu`, on a GPU.

The weights are random, as the time of a forward pass does not depend on them. The videos show nothing, so quality is
not measured. AsymRnR without a profile chooses blocks by similarity, which may differ in a trained model.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import torch

from ..errors import AccelError
from ..files import atomic_write
from ..runtime.generate import environment, generate
from ..runtime.models import TINY, ModelDefaults, load_pipeline
from ..runtime.paths import ROOT
from ..runtime.presets import load_preset
from .measure import Case, by_case, measure_in_turn, runs_of, settings_key
from .result_log import ResultLog
from .suites import Setting

LAYOUTS = {"wan-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}}
PRESETS = ("fastercache", "asymrnr", "balanced")
SETTINGS = {"baseline": Setting()} | {name: Setting(overrides=load_preset(name).methods) for name in PRESETS}
PROMPT = "a large red star spins slowly over a striped navy background"


def run_gpu(layout: str, steps: int | None, frames: int | None, repeats: int, out: Path) -> dict:
    """Speed and memory of each setting, after writing results.json. A second call resumes the first.

    Raises AccelError for an unknown layout, or without a GPU.
    """
    if layout not in LAYOUTS:
        raise AccelError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if not torch.cuda.is_available():
        raise AccelError("this needs a GPU: on a CPU one run takes hours")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), LAYOUTS[layout], "cuda")
        pipe = load_pipeline(folder)
    out.mkdir(parents=True, exist_ok=True)
    common = {"model": layout, "steps": steps, "frames": frames}
    rows = measure_layout(SETTINGS, repeats, common, pipe, ModelDefaults(), out / "results.jsonl")
    run = runs_of(SETTINGS, (PROMPT, 0), ModelDefaults(), **common)["baseline"]
    size = run.model_dump(include={"height", "width", "frames", "steps", "guidance"})
    document = {"layout": layout, "n": repeats, **size, **environment(pipe), "rows": rows}
    with atomic_write(out / "results.json") as part:
        part.write_text(json.dumps(document, indent=1))
    return {**document, "out": str(out)}


def build(folder: Path, layout: dict, device: str) -> None:
    """Save a pipeline of random weights in bfloat16; its text encoder and VAE are small, as no method affects them."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / TINY / "tokenizer")
    scheduler = UniPCMultistepScheduler.from_pretrained(ROOT / TINY / "scheduler")
    with torch.device(device):
        transformer = WanTransformer3DModel(**layout)
        width = transformer.config.text_dim
        text = UMT5Config(vocab_size=len(tokenizer), d_model=width, d_ff=64, d_kv=64, num_heads=2, num_layers=1)
        channels = transformer.config.in_channels
        vae = AutoencoderKLWan(base_dim=8, z_dim=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
        parts = {"transformer": transformer, "text_encoder": UMT5EncoderModel(text), "vae": vae}
    pipe = WanPipeline(tokenizer=tokenizer, scheduler=scheduler, **{k: p.bfloat16() for k, p in parts.items()})
    pipe.save_pretrained(folder)


def measure_layout(
    settings: dict[str, Setting], repeats: int, common: dict, pipe, defaults: ModelDefaults, file: Path
) -> dict[str, dict]:
    """{setting: medians of time, work and memory, and the speed-up over the first setting}; `file` holds the log."""
    cases: list[Case] = [(PROMPT, seed) for seed in range(repeats)]
    log = ResultLog(file, settings_key(settings, pipe=pipe, defaults=defaults, **common))
    if len(log.lines) < repeats * len(settings):
        for run in runs_of(settings, cases[0], defaults, **common).values():  # warm up the kernels of each method:
            generate(run.model_copy(update={"steps": min(run.steps, 10)}), pipe, defaults)  # in 10 steps all act
    lines = measure_in_turn(settings, cases, common, log, pipe, defaults, lambda *_: {}, "gpu")
    by_seed = [case["rows"] for case in by_case(lines)]
    baseline = next(iter(settings))
    return {name: _summary([(rows[name], rows[baseline]) for rows in by_seed]) for name in settings}


def _summary(measured: list[tuple[dict, dict]]) -> dict:
    """The figures of one setting from its lines, each with the baseline's line of the same seed."""
    speedups = [base["denoise"] / line["denoise"] for line, base in measured]
    speedup, work = statistics.median(speedups), measured[0][0]["flops"] / measured[0][1]["flops"]
    return {
        "seconds": statistics.median(line["denoise"] for line, _ in measured),
        "speedup": speedup,
        "speedup_range": [min(speedups), max(speedups)],
        "work": work,
        "efficiency": speedup * work,
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line, _ in measured),
    }
