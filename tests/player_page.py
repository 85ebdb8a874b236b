"""A page with two players and synthetic videos, for the tests of the player."""

from __future__ import annotations

import io
import math
from pathlib import Path

import gradio as gr
import numpy as np
from PIL import Image

from accel.runtime.video import write_mp4
from ui.player import Player, pane_value

FRAMES, FPS, SIZE = 17, 8, 64
LEVELS = np.linspace(30, 220, FRAMES).astype(int)  # brightness by frame, so that a picture tells its frame
TOTALS = (3.0, 1.2, 2.0, 0.6)  # seconds of denoising by pane
STEPS = (30, 12, 20, 6)


def make_files(folder: Path) -> None:
    """Write 0.mp4 to 3.mp4, each a square that moves over a background of the frame's level, and 0.jpg to 3.jpg."""
    for pane in range(4):
        frames = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
        for i, level in enumerate(LEVELS):
            frames[i] = level
            frames[i, 20:44, i * 2 : i * 2 + 16] = (200, 40 + 20 * pane, 40)
        frames[:, :8, :, pane % 3] = 255  # a bar of its own colour
        write_mp4(folder / f"{pane}.mp4", frames, FPS)
        (folder / f"{pane}.jpg").write_bytes(sheet(frames[0], STEPS[pane]))


def sheet(frame: np.ndarray, steps: int) -> bytes:
    """Previews from noise to the frame, eight in a row."""
    rng, big = np.random.default_rng(0), np.zeros((-(-steps // 8) * SIZE, 8 * SIZE, 3), np.uint8)
    for i in range(steps):
        noise, share = rng.integers(0, 256, frame.shape), (i + 1) / steps
        top, left = i // 8 * SIZE, i % 8 * SIZE
        big[top : top + SIZE, left : left + SIZE] = frame * share + noise * (1 - share)
    data = io.BytesIO()
    Image.fromarray(big).save(data, "JPEG", quality=85)
    return data.getvalue()


def value(folder: Path, panes: int = 2, mode: str | None = None) -> dict:
    """A value of the player with the synthetic files of `folder`."""
    labels = ["baseline, 50 steps", "fastercache, 50 steps", "<b>asymrnr</b>, 50 steps", "gpd, 6 steps"]
    curves = [
        {
            "pane": i,
            "name": "SSIM",
            "values": [round(1 - 0.02 * i * abs(math.sin(f / 3 + i)), 4) for f in range(FRAMES)],
        }
        for i in range(1, panes)
    ]
    shown = [
        pane_value(labels[i], f"gradio_api/file={folder}/{i}.mp4", f"gradio_api/file={folder}/{i}.jpg", race(i))
        for i in range(panes)
    ]
    made = {"panes": shown, "fps": FPS, "frames": FRAMES, "height": SIZE, "width": SIZE, "curves": curves}
    return made if mode is None else {**made, "mode": mode}


def race(pane: int) -> dict:
    """The race of a pane, with a preview for each step at even distances."""
    total, steps = TOTALS[pane], STEPS[pane]
    times = [total * (i + 1) / steps for i in range(steps)]
    return {
        "times": times, "steps": list(range(1, steps + 1)), "total": total, "frames": steps,
        "columns": 8, "width": SIZE, "height": SIZE,
    }  # fmt: skip


def build(folder: Path) -> gr.Blocks:
    """Two players, a text box, and a button for each value that the first player can get."""
    values = {
        "pair": value(folder), "three": value(folder, 3), "four": value(folder, 4), "race": value(folder, 4, "race"),
        "nothing": None, "no-race": {**value(folder), "panes": [{**p, "race": None} for p in value(folder)["panes"]]},
    }  # fmt: skip
    with gr.Blocks() as demo:
        with gr.Column(elem_id="column"):
            player = Player(values["pair"], elem_id="player")
        text = gr.Textbox("", label="Text", elem_id="text")
        with gr.Row():
            for name, made in values.items():
                button = gr.Button(name, elem_id=f"set-{name}")
                button.click(
                    lambda made=made: made, None, player, queue=False, show_progress="hidden", api_visibility="private"
                )
        Player(values["pair"], elem_id="second")
        text.submit(lambda: values["pair"], None, player, queue=False, show_progress="hidden", api_visibility="private")
    return demo


def serve(folder: Path) -> gr.Blocks:
    """Start the page with files in `folder`; its address is `local_url`."""
    make_files(folder)
    gr.set_static_paths([folder])
    demo = build(folder)
    css = "#column { max-width: 860px; }"
    demo.launch(prevent_thread_lock=True, quiet=True, css=css, ssr_mode=False, theme=gr.themes.Soft())
    return demo
