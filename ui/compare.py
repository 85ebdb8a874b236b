"""The work behind Run: a plain and an accelerated run of the same noise, told step by step."""

from __future__ import annotations

import base64
import io
import re
import tempfile
import time
import uuid
from collections import OrderedDict, deque
from html import escape
from pathlib import Path

import torch
from PIL import Image

from accel.evaluation.compare import report
from accel.runtime.generate import Run, Video, build_run, generate, preflight, warm_up
from accel.runtime.latents import denormalize
from accel.runtime.presets import required_settings
from accel.runtime.video import write_mp4
from accel.world.judge import score
from ui.worker import Job

KEPT = 16  # of each kind
PREVIEW_SECONDS, PREVIEW_COST_FACTOR = 0.3, 10  # seconds between looks at a running side, or times what a look takes


class VideoCache:
    """Videos on disk: the baselines that are kept, by their run, and the last accelerated ones; the rest is deleted."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="accel-")  # goes with the shelf, or the server
        self.folder = Path(self._folder.name)
        self.baselines: OrderedDict[str, tuple[Video, str, str]] = OrderedDict()  # video, path, when
        self.recent: deque[Path] = deque()

    def write(self, video: Video, run: Run, fps: int) -> str:
        """Put a video on disk under a name of its own; its path."""
        path = self.folder / f"{'-'.join(run.methods) or 'baseline'}-{run.seed}-{uuid.uuid4().hex[:8]}.mp4"
        video.seconds["encode"] = write_mp4(path, video.frames, fps, run.model_dump())
        return str(path)

    def keep_a_while(self, path: str) -> None:
        """Keep an accelerated side's video until others have come."""
        self.recent.append(Path(path))
        while len(self.recent) > KEPT:
            self.recent.popleft().unlink(missing_ok=True)

    def keep(self, key: str, video: Video, path: str) -> None:
        """Keep a baseline; the one that was not asked for longest goes."""
        self.baselines[key] = (video, path, time.strftime("%H:%M:%S"))
        while len(self.baselines) > KEPT:
            Path(self.baselines.popitem(last=False)[1][1]).unlink(missing_ok=True)


class CompareJob:
    """Generates the pair that was asked for; a baseline that was made before is taken from the shelf."""

    def __init__(self, model: str, asked: dict, shelf: VideoCache, same_steps_baseline: bool = False):
        """`rival`: generate as well what the plain model makes of as few steps as the accelerated side takes."""
        self.model, self.asked, self.shelf, self.same_steps_baseline = model, asked, shelf, same_steps_baseline

    def __call__(self, job: Job, pipe, defaults) -> None:
        whole = {name: _whole(self.asked[name], name) for name in ("seed", "steps")}
        asked = {"model": self.model, **self.asked, **whole}
        a = build_run(defaults, **{**asked, "methods": {}})
        b = build_run(defaults, **{**asked, **required_settings(asked["methods"])})
        key = a.model_dump_json()
        kept = key in self.shelf.baselines
        words = _unknown(pipe, b.prompt)
        told = " ".join(escape(sentence) + "." for sentence in preflight(b, pipe))
        job.emit("started", note=f'<div class="note">{words}{told}</div>', kept=kept)
        warm_up(b, pipe, defaults, lambda *_: job.check())
        video_a, path_a, when = self._plain(job, a, pipe, defaults)
        video_b = self._generate(job, b, "b", pipe, defaults, "accelerated")
        path_b = self.shelf.write(video_b, b, defaults.fps)
        self.shelf.keep_a_while(path_b)
        facts = report(a, b, video_a, video_b, {"a": [video_a.seconds], "b": [video_b.seconds]}, pipe, defaults)
        facts["baseline_from"] = when if kept else None
        label = f"baseline, {a.steps} steps" + (f" (kept, measured {when})" if kept else "")
        player = {
            "a": path_a, "b": path_b, "fps": defaults.fps, "frames": len(video_b.frames), "label_a": label,
            "label_b": f"{', '.join(b.methods) or 'no method'}, {b.steps} steps",
        }  # fmt: skip
        fewer = a.model_copy(update={"steps": b.steps})
        notes = " ".join(escape(note) + "." for note in [*video_b.trace.messages, *self._remarks(a, b, fewer)])
        job.emit("pair", report=facts, player=player, note=f'<div class="note">{words}{notes}</div>')
        if self.same_steps_baseline and fewer != a:
            job.emit("rival", player=self._against(job, fewer, player, pipe, defaults))

    def _remarks(self, a: Run, b: Run, fewer: Run) -> list[str]:
        """Where the two sides, or the third pane, are not what the widgets say."""
        said = []
        if b.guidance != a.guidance:
            said.append(f"The student's guidance is built in: {a.guidance:g} is the baseline's alone")
        if self.same_steps_baseline and fewer == a:
            said.append("No third pane: the plain model in as many steps is the baseline")
        return said

    def _plain(self, job: Job, run: Run, pipe, defaults, title: str = "baseline") -> tuple[Video, str, str]:
        """A plain run's video, its path and when it was made, from the shelf if it is there."""
        key = run.model_dump_json()
        if key not in self.shelf.baselines:
            video = self._generate(job, run, "a", pipe, defaults, title)
            self.shelf.keep(key, video, self.shelf.write(video, run, defaults.fps))
        self.shelf.baselines.move_to_end(key)
        return self.shelf.baselines[key]

    def _against(self, job: Job, run: Run, player: dict, pipe, defaults) -> dict:
        """The player's value for a plain run, in the accelerated side's number of steps, beside that side."""
        video, path, when = self._plain(job, run, pipe, defaults, "fewer plain steps")
        read = score(video.frames, run.prompt).get("mean") if defaults.toy_world else None
        label = f"plain, {run.steps} steps, {video.seconds['denoise']:.2f} s at {when}"
        label += "" if read is None else f", {read:.0%} of the prompt read back"
        return {**player, "a": path, "label_a": label}

    def _generate(self, job: Job, run: Run, which: str, pipe, defaults, title: str) -> Video:
        due = 0.0  # when to look next

        def on_step(done: int, trace, latents) -> None:
            nonlocal due
            began = time.monotonic()
            if began < due and done < run.steps:
                return job.check()
            ms, work = sum(trace.milliseconds.values()) / done, trace.summary()["flops_ratio"]
            pane = {"title": title, "done": done, "steps": run.steps, "ms": ms, "work": work}
            pane |= {"image": _preview(pipe, latents), "trace": trace.to_json() if run.methods else {}}
            job.emit("step", which=which, pane=pane)
            ended = time.monotonic()
            due = ended + max(PREVIEW_SECONDS, PREVIEW_COST_FACTOR * (ended - began))

        return generate(run, pipe, defaults, on_step)


@torch.no_grad()
def _preview(pipe, latents: torch.Tensor) -> str:
    """The first frame as it stands, as a data URI; one latent frame decodes on its own, so this is cheap."""
    frame = pipe.vae.decode(denormalize(pipe.vae, latents[:, :, :1]).to(pipe.vae.dtype)).sample[0, :, 0]
    pixels = ((frame.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _whole(value, name: str) -> int:
    """A whole number, or ValueError in one sentence."""
    if value is None or float(value) != int(value):
        raise ValueError(f"{name} = {value} is not a whole number")
    return int(value)


def _unknown(pipe, prompt: str) -> str:
    """A sentence about the words of the prompt that a closed vocabulary lacks; empty for an open one."""
    vocabulary = pipe.tokenizer.get_vocab()
    words = dict.fromkeys(re.findall(r"\w+", prompt.lower()))
    unknown = [word for word in words if word not in vocabulary] if len(vocabulary) < 1000 else []
    return f"The model does not know: {escape(', '.join(unknown))}. It goes on without. " if unknown else ""
