"""The page: generate the same video twice from the same noise, baseline and accelerated, and compare them.

python app.py [--host H] [--port P] [--share] [--model DIR_OR_ID]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_SSR_MODE", "false")

import ui.quick_gradio  # noqa: F401, I001  before Gradio
import gradio as gr

from accel.runtime.models import TINY
from accel.runtime.paths import ROOT
from accel.runtime.presets import load_preset, preset_names
from ui.controls import MethodControls
from ui.panels import READ_ALOUD, note
from ui.results import Results
from ui.video_cache import VideoCache
from ui.worker import Workers

CSS = (Path(__file__).parent / "ui" / "page.css").read_text()
FIRST_PRESET = "fastercache"
PROMPTS = (ROOT / "examples" / "prompts.txt").read_text().splitlines()
ABOUT = """---
Both videos start from the same noise. The baseline is the stock pipeline; the accelerated run skips work and shows
where. The code above generates the accelerated video with the library behind this page.
"""


class Page:
    """Layout and event handlers; knows no method by name."""

    def __init__(self, model: str):
        self.model, self.worker, self.videos = model, Workers(model), VideoCache()

    def build(self) -> gr.Blocks:
        """The page as Gradio Blocks; nothing is computed until a visitor presses Run."""
        with gr.Blocks(title="accel: video diffusion, side by side", delete_cache=(3600, 7200)) as demo:
            gr.HTML('<h1 class="title">Same noise, twice: baseline and accelerated</h1>')
            with gr.Row(equal_height=True):
                self.prompt = gr.Textbox(
                    PROMPTS[0], label="Prompt", lines=1, max_lines=3, scale=6, elem_id="prompt", max_length=5000
                )
                self.seed = gr.Number(1, label="Seed", precision=None, scale=1, min_width=90, elem_id="seed")
                self.run = gr.Button("▶ Run A/B", variant="primary", scale=1, min_width=110, elem_id="run")
                self.stop = gr.Button("■ Stop", variant="stop", scale=1, min_width=90, elem_id="stop")
            with gr.Row():
                self.examples = [gr.Button(p, size="sm", elem_classes="example") for p in PROMPTS[1:4]]
            self.results = Results()
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    self._add_run_settings()
                with gr.Column(scale=3):
                    self.controls = MethodControls(self.model, load_preset(FIRST_PRESET))
            gr.Markdown(ABOUT)
            self._add_events()
        return demo

    def _add_run_settings(self) -> None:
        gr.Markdown("### Run")
        self.steps = gr.Slider(
            1, 100, 50, step=1, label="steps", elem_id="steps",
            info="Denoising steps; more is slower. A student has its own step count.",
        )  # fmt: skip
        self.guidance = gr.Slider(
            0, 12, 4, step=0.5, label="guidance",
            info="Strength of the prompt. At 1 or less only one branch runs. A student has its own guidance built in.",
        )  # fmt: skip
        self.preset = gr.Dropdown(
            [(load_preset(name).title or name, name) for name in preset_names()], value=FIRST_PRESET, label="preset",
            info="Sets the methods and their parameters.", elem_id="preset",
        )  # fmt: skip
        self.preset_warning = gr.HTML("", elem_id="preset-warning", html_template=READ_ALOUD)
        self.same_steps_baseline = gr.Checkbox(
            False, label="also show the baseline at this step count", elem_id="same-steps-baseline",
            info="A third video: the baseline in as few steps as the accelerated run takes.",
        )  # fmt: skip

    def _add_events(self) -> None:
        settings = [self.prompt, self.seed, self.steps, self.guidance, self.same_steps_baseline]
        gr.on(
            [self.run.click, self.prompt.submit], self.run_pair, [*settings, *self.controls.components],
            self.results.components, concurrency_limit=None, show_progress="hidden", api_name="run_pair",
        )  # fmt: skip
        self.stop.click(self.stop_job, None, self.results.message, queue=False, show_progress="hidden", api_name="stop")
        loaded = [self.preset_warning, self.steps, self.guidance, *self.controls.components]
        self.preset.change(self.load_preset, self.preset, loaded, queue=False, api_visibility="private")
        for button in self.examples:
            button.click(lambda text: text, button, self.prompt, queue=False, api_visibility="private")

    def load_preset(self, name: str) -> dict:
        """Set all widgets to a preset, and say what of it this model lacks."""
        preset = load_preset(name)
        values, missing = self.controls.preset_values(preset)
        text = f"{name} needs weights that this model does not have (see the README): {'; '.join(missing)}."
        run_settings = {self.steps: preset.steps, self.guidance: preset.guidance}
        return {
            self.preset_warning: note(text, bad=True) if missing else "",
            **{widget: value for widget, value in run_settings.items() if value is not None},
            **values,
        }

    def stop_job(self, request: gr.Request):
        """Stop the visitor's runs after their current step. The runs themselves report that they have stopped."""
        return gr.skip() if self.worker.stop(request.session_hash or "") else note("Nothing is running.")

    def run_pair(
        self, request: gr.Request, prompt, seed, steps, guidance, same_steps_baseline, *method_values
    ) -> Iterator[dict]:
        """Generate a baseline and an accelerated video from the same noise, and report the progress."""
        from ui.compare_job import CompareJob

        methods = self.controls.settings(method_values)
        settings = {"prompt": prompt, "seed": seed, "steps": steps, "guidance": guidance, "methods": methods}
        job = self.worker.submit(
            CompareJob(self.model, settings, self.videos, same_steps_baseline), request.session_hash or ""
        )
        for kind, data in self.worker.stream(job):
            if update := self.results.update(kind, data):
                yield update


def launch(
    model: str = TINY, host: str = "127.0.0.1", port: int | None = None, share: bool = False, **options
) -> gr.Blocks:
    """Start the server and return its Blocks; the model loads in the background. `options` go to Gradio's `launch`."""
    page = Page(model)
    demo = page.build()
    demo.queue(max_size=20).launch(
        server_name=host, server_port=port, share=share, css=CSS, theme=gr.themes.Soft(), prevent_thread_lock=True,
        footer_links=["api", "settings"], ssr_mode=False, **options,
    )  # fmt: skip
    page.worker.start()  # not earlier: importing torch would delay the first answer
    return demo


def main() -> None:
    """Serve the page until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--share", action="store_true", help="open a public link")
    parser.add_argument("--model", default=TINY, help="folder or Hugging Face id of a diffusers pipeline")
    args = parser.parse_args()
    launch(args.model, args.host, args.port, args.share).block_thread()


if __name__ == "__main__":
    main()
