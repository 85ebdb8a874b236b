"""Times methods that need no training on models of real size, also with compiled blocks: `python -m accel gpu`.

The weights are random, as the time of a forward pass does not depend on them. The videos show nothing, so quality is
not measured. AsymRnR without a profile chooses blocks by similarity, which may differ in a trained model.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from tqdm import tqdm

from ..core.calls import synchronized_time
from ..errors import AccelError, quote
from ..families import family_of
from ..files import write_json
from ..methods import METHODS
from ..runtime.apply import apply
from ..runtime.generate import environment
from ..runtime.models import model_defaults
from .layouts import LAYOUTS, build

SETTINGS: dict[str, Any] = {
    "baseline": None,
    "neutral": [METHODS[name](**METHODS[name].neutral) for name in ("fastercache", "asymrnr", "disca", "stepcache")],
    "fastercache": "fastercache",
    "asymrnr": "asymrnr",
    "combined": "combined",
    "stepcache, spread": METHODS["stepcache"](schedule="spread"),
    "disca, taylor-1": METHODS["disca"](predictor="taylor-1", num_full_steps=4),
}
SIZE = {"height": "height", "width": "width", "frames": "num_frames", "guidance": "guidance_scale"}  # ours: the call's
TEXT_WIDTH = 4096  # of T5 XXL, whose embeddings all of these models take


class Timed(NamedTuple):
    """A layout, the scheduler it is run with, and the configuration and pixels that make it small."""

    layout: str
    scheduler: Callable
    small: dict
    small_size: int


TINY = {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2}
SHORT = {"time_embed_dim": 16, "max_text_seq_length": 8}
TIMED = {
    "ltx": Timed("LTX-Video", FlowMatchEulerDiscreteScheduler, {**TINY, "cross_attention_dim": 48}, 128),
    "cogvideox-2b": Timed("CogVideoX 2B", CogVideoXDDIMScheduler, {**TINY, **SHORT}, 64),
    "wan-1.3b": Timed("Wan 2.1 1.3B", FlowMatchEulerDiscreteScheduler, {**TINY, "ffn_dim": 64}, 64),
}


class Measured(NamedTuple):
    """One run: seconds of denoising, computed FLOPs (0 where nothing counts them), and the most bytes allocated."""

    seconds: float
    flops: int
    peak_memory_bytes: int


def run_gpu(name: str | None, steps: int, repeats: int, small: bool, out: Path) -> dict:
    """Speed and memory of each setting in one layout or all: LAYOUT/results.json and LAYOUT-compiled/results.json.

    `small`: tiny models whose blocks no compiler optimizes, to try the command on a CPU. Raises AccelError for an
    unknown layout, or without a GPU.
    """
    if name is not None and name not in TIMED:
        raise AccelError(f"unknown layout {quote(name)}; there are {', '.join(TIMED)}")
    if not small and not torch.cuda.is_available():
        raise AccelError("this needs a GPU: on a CPU one run takes hours; --small shows what the command does")
    device, speedups = "cuda" if torch.cuda.is_available() else "cpu", {}
    roof = matmul_flops_per_second(device, 512 if small else 8192)
    for layout in [name] if name else TIMED:
        pipe, inputs = prepare(layout, device, small)
        size = {ours: inputs[theirs] for ours, theirs in SIZE.items()}
        about = {"n": repeats, **size, "steps": steps, **environment(pipe), "matmul_tflops": roof / 1e12}
        for title in (layout, f"{layout}-compiled"):
            if title != layout:
                torch._dynamo.reset()
                compile_blocks(pipe, "eager" if small else "inductor")
            rows = measure(pipe, {**inputs, "num_inference_steps": steps}, repeats, roof, title)
            (out / title).mkdir(parents=True, exist_ok=True)
            write_json(out / title / "results.json", {"layout": title, **about, "rows": rows})
            speedups[title] = {setting: row["speedup"] for setting, row in rows.items()}
        del pipe  # before the next one is built
    return {"out": str(out), "device": device, "n": repeats, "speedups": speedups}


def prepare(name: str, device: str, small: bool) -> tuple[Any, dict]:
    """The pipeline of a layout in bfloat16, with random weights, and the arguments of its call but for the steps."""
    timed = TIMED[name]
    torch.manual_seed(0)
    pipe = build(LAYOUTS[timed.layout], device, timed.scheduler(), **timed.small if small else {})
    usual = model_defaults(pipe, "-")
    height, width, frames, text_length = usual.height, usual.width, usual.frames, usual.text_length
    if small:
        height, width, frames, text_length = timed.small_size, timed.small_size, 17, 8
    text = torch.randn(2, text_length, TEXT_WIDTH, device=device, dtype=torch.bfloat16)
    inputs = {"height": height, "width": width, "num_frames": frames, "guidance_scale": usual.guidance}
    inputs |= {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:], "output_type": "latent"}
    if "prompt_attention_mask" in inspect.signature(pipe.__call__).parameters:
        mask = torch.ones(1, text_length, device=device, dtype=torch.int64)
        inputs |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return pipe, inputs


def compile_blocks(pipe, backend: str) -> None:
    """Compile each block on its own, also where diffusers' `compile_repeated_blocks` does not know the class."""
    for blocks in family_of(pipe).block_lists(pipe.transformer).values():
        for block in blocks:
            block.compile(backend=backend)


def measure(pipe, inputs: dict, repeats: int, roof: float, title: str) -> dict[str, dict]:
    """{setting: figures}: all settings run in turn, once untimed, as each has its own kernels, then `repeats` times."""
    rounds = []
    for i in range(1 + repeats):
        bar = tqdm(SETTINGS.items(), f"{title}, {f'{i} of {repeats}' if i else 'warm-up'}")
        rounds.append({name: run(pipe, inputs, methods) for name, methods in bar})
    flops = rounds[0]["neutral"].flops
    return {name: _row([(found[name], found["baseline"]) for found in rounds[1:]], flops, roof) for name in SETTINGS}


def run(pipe, inputs: dict, methods: Any) -> Measured:
    """Denoise one video; without methods, in the pipeline as it is."""
    device = pipe.transformer.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with nullcontext() if methods is None else apply(pipe, methods) as trace:
        began = synchronized_time(device)
        pipe(**inputs, generator=torch.Generator().manual_seed(0))
        seconds = synchronized_time(device) - began
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return Measured(seconds, trace.flops_computed_and_full()[0] if trace else 0, peak)


def _row(measured: list[tuple[Measured, Measured]], flops: int, roof: float) -> dict:
    """The figures of one setting from its runs, each with the baseline of the same round, which takes `flops`."""
    speedups = [baseline.seconds / found.seconds for found, baseline in measured]
    seconds, speedup = statistics.median(found.seconds for found, _ in measured), statistics.median(speedups)
    work = (measured[0][0].flops or flops) / flops
    return {
        "seconds": seconds,
        "speedup": speedup,
        "speedup_range": [min(speedups), max(speedups)],
        "work": work,
        "efficiency": speedup * work,
        "roofline": work * flops / seconds / roof,
        "peak_memory_bytes": max(found.peak_memory_bytes for found, _ in measured),
    }


def matmul_flops_per_second(device: str, n: int) -> float:
    """What a product of two n x n matrices in bfloat16 reaches: the roof of a model's speed, as far as it computes."""
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(10):
        began = synchronized_time(a.device)
        a @ a
        times.append(synchronized_time(a.device) - began)
    return 2 * n**3 / min(times)
