"""How fast the methods are on a model as large as a real one: `python -m accel.evaluation.gpu`, on a GPU.

Its weights are random, as the time of a pass does not depend on what a model has learnt. What its videos show means
nothing, so nothing is said of quality; AsymRnR judges blocks by their likeness, which may not be that of trained ones.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tqdm import tqdm
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from ..files import atomic_write
from ..runtime.generate import Run, build_run, environment, generate
from ..runtime.models import TINY, ModelDefaults, load_pipeline
from ..runtime.paths import ROOT
from ..runtime.presets import load_preset

LAYOUTS = {"wan-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}}
ROWS = ("baseline", "fastercache", "asymrnr", "balanced")
PROMPT = "a large red star spins slowly over a striped navy background"


@dataclass(frozen=True)
class Measurement:
    """One run: seconds of denoising, FLOPs, and the most bytes of the GPU that were taken meanwhile (0 on a CPU)."""

    seconds: float
    flops: int
    taken: int


def build(folder: Path, layout: dict, device: str) -> None:
    """A pipeline of random weights in bfloat16; text encoder and autoencoder, which no method touches, are small."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / TINY / "tokenizer")
    scheduler = UniPCMultistepScheduler.from_pretrained(ROOT / TINY / "scheduler")
    with torch.device(device):
        transformer = WanTransformer3DModel(**layout)
        text = transformer.config.text_dim
        encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=text, d_ff=64, d_kv=64, num_heads=2, num_layers=1)
        )
        channels = transformer.config.in_channels
        vae = AutoencoderKLWan(base_dim=8, z_dim=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    parts = {"transformer": transformer, "text_encoder": encoder, "vae": vae}
    pipe = WanPipeline(tokenizer=tokenizer, scheduler=scheduler, **{k: p.bfloat16() for k, p in parts.items()})
    pipe.save_pretrained(folder)


def measure(run: Run, pipe, defaults: ModelDefaults) -> Measurement:
    """The figures of one run."""
    on_gpu, taken = torch.cuda.is_available(), 0

    def note(done: int, *_) -> None:
        nonlocal taken
        if on_gpu and done == run.steps:
            taken = torch.cuda.max_memory_allocated()

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    video = generate(run, pipe, defaults, note)
    return Measurement(video.seconds["denoise"], video.trace.flops_computed_and_full()[0], taken)


def figures(runs: dict[str, Run], pipe, defaults: ModelDefaults, repeats: int) -> dict[str, dict]:
    """Of each run, in turn, after two steps of each that nobody times: medians, and the speed-up over the first one."""
    for run in runs.values():
        generate(run.model_copy(update={"steps": 2}), pipe, defaults)
    made: dict[str, list[Measurement]] = {name: [] for name in runs}
    for name in tqdm(list(runs) * repeats, desc="runs"):
        made[name].append(measure(runs[name], pipe, defaults))
    plain = next(iter(made.values()))
    rows = {}
    for name, own in made.items():
        speeds = [a.seconds / b.seconds for a, b in zip(plain, own, strict=True)]
        speed, work = statistics.median(speeds), own[0].flops / plain[0].flops
        rows[name] = {
            "seconds": statistics.median(f.seconds for f in own),
            "speedup": speed,
            "speedup_range": [min(speeds), max(speeds)],
            "work": work,
            "efficiency": speed * work,
            "peak_memory_bytes": max(f.taken for f in own),
        }
    return rows


def main(
    out: Annotated[Path, typer.Option(help="Folder for results.json; made if missing.")],
    layout: Annotated[str, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")] = "wan-1.3b",
    steps: Annotated[int, typer.Option(min=10, help="Denoising steps; the model's own if not given.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of 480x832; the model's own if not given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that all rows are generated in turn.")] = 1,
) -> None:
    """Time plain runs and presets on a model of random weights in a real layout."""
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("this needs a GPU: on a CPU one run takes hours")
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), LAYOUTS[layout], "cuda")
        pipe = load_pipeline(folder)
    defaults = ModelDefaults()
    given = {"model": layout, "prompt": PROMPT, "steps": steps, "frames": frames}
    methods = {name: {} if name == ROWS[0] else load_preset(name).methods for name in ROWS}
    runs = {name: build_run(defaults, **given, methods=own) for name, own in methods.items()}
    rows = figures(runs, pipe, defaults, repeats)
    asked = {key: getattr(runs[ROWS[0]], key) for key in ("height", "width", "frames", "steps", "guidance")}
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "results.json") as part:
        part.write_text(
            json.dumps({"layout": layout, "n": repeats, **asked, **environment(pipe), "rows": rows}, indent=1)
        )
    print(json.dumps(rows, indent=1), file=sys.stderr)


if __name__ == "__main__":
    typer.run(main)
