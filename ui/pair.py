"""The work behind Run: a plain and an accelerated run of the same noise, told step by step."""

from __future__ import annotations

import base64
import io
import tempfile
import time
from collections import OrderedDict
from html import escape
from pathlib import Path

import torch
from PIL import Image

from accel.run import Run, build_run, generate, report, warm_up
from accel.video import write_mp4

from .worker import Job

KEPT = 16  # baselines


class PairJob:
    """Generates the pair that was asked for; a baseline that was made before is taken from `baselines`."""

    def __init__(self, model: str, asked: dict, baselines: OrderedDict):
        self.model, self.asked, self.baselines = model, asked, baselines

    def __call__(self, job: Job, pipe, home) -> None:
        asked = {
            **self.asked,
            "seed": _whole(self.asked["seed"], "seed"),
            "steps": _whole(self.asked["steps"], "steps"),
        }
        b = build_run(home, model=self.model, **asked)
        a = b.model_copy(update={"methods": {}})
        key = a.model_dump_json()
        kept = key in self.baselines
        unknown = _unknown_words(pipe, b.prompt)
        words = f"The model does not know: {escape(', '.join(unknown))}. It goes on without. " if unknown else ""
        job.tell("started", note=f'<div class="note">{words}{"Baseline kept from before." if kept else ""}</div>')
        warm_up(b, pipe, home)
        if not kept:
            self.baselines[key] = (self._generate(job, a, "a", pipe, home), time.strftime("%H:%M:%S"))
        (video_a, path_a), when = self.baselines[key]
        self.baselines.move_to_end(key)
        while len(self.baselines) > KEPT:
            self.baselines.popitem(last=False)
        video_b, path_b = self._generate(job, b, "b", pipe, home)
        facts = report(a, b, video_a, video_b, {"a": [video_a.seconds], "b": [video_b.seconds]}, pipe, home)
        facts["baseline_from"] = when if kept else None
        label = f"baseline, {a.steps} steps" + (f" (kept, measured {when})" if kept else "")
        player = {
            "a": path_a, "b": path_b, "fps": home.fps, "frames": len(video_b.frames), "label_a": label,
            "label_b": f"{', '.join(b.methods) or 'no method'}, {b.steps} steps",
        }  # fmt: skip
        note = f'<div class="note">{words}{" ".join(escape(n) + "." for n in video_b.trace.notes)}</div>'
        job.tell("pair", report=facts, player=player, note=note)

    def _generate(self, job: Job, run: Run, which: str, pipe, home) -> tuple:
        began = time.perf_counter()

        def on_step(done: int, trace, latents) -> None:
            spent = time.perf_counter() - began
            look = done % 5 == 0 or done == run.steps
            job.tell(
                "step", which=which, trace=trace.to_json() if which == "b" and look else None,
                pane={
                    "title": "baseline" if which == "a" else "accelerated", "done": done, "steps": run.steps,
                    "spent": spent, "work": trace.summary()["work"],
                    "image": _preview(pipe, latents) if look else None,
                },
            )  # fmt: skip

        video = generate(run, pipe, home, on_step)
        folder = Path(tempfile.mkdtemp(prefix="accel-"))
        path = folder / f"{'baseline' if which == 'a' else 'accelerated'}-{run.seed}.mp4"
        video.seconds["encode"] = write_mp4(path, video.frames, home.fps, run.model_dump())
        return video, str(path)


@torch.no_grad()
def _preview(pipe, latents: torch.Tensor) -> str:
    """The first frame as it stands, as a data URI; one latent frame decodes on its own, so this is cheap."""
    config = pipe.vae.config
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std))
    frame = pipe.vae.decode((latents[:, :, :1] * std + mean).to(pipe.vae.dtype)).sample[0, :, 0]
    pixels = ((frame.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _whole(value, name: str) -> int:
    """A whole number, or ValueError in one sentence."""
    if value is None or float(value) != int(value):
        raise ValueError(f"{name} = {value} is not a whole number")
    return int(value)


def _unknown_words(pipe, prompt: str) -> list[str]:
    """Words of the prompt that a closed vocabulary lacks; none for an open one."""
    from accel.world.scene import words_of

    vocabulary = pipe.tokenizer.get_vocab()
    return [w for w in dict.fromkeys(words_of(prompt)) if w not in vocabulary] if len(vocabulary) < 1000 else []
