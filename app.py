"""The page: a prompt, a plain and an accelerated video of the same noise, and what it cost.

python app.py [--host H] [--port P] [--share] [--model DIR_OR_ID]
"""

from __future__ import annotations

import argparse
import os
from html import escape
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("GRADIO_SSR_MODE", "false")

import gradio as gr

from accel.methods import METHODS
from accel.runtime.models import TINY, resolve
from accel.runtime.paths import ROOT
from accel.runtime.presets import load_preset, preset_names
from ui import controls
from ui.compare import CompareJob, VideoCache
from ui.panels import EMPTY_PANE, about, metric_cards, pane, pane_waiting
from ui.player import ABPlayer
from ui.recorded import recorded_pairs
from ui.snippet import snippet
from ui.timeline import timeline
from ui.token_maps import token_maps
from ui.worker import Worker

CSS = (Path(__file__).parent / "ui" / "page.css").read_text()
FIRST = "fastercache"  # preset, at the beginning
PROMPTS = (ROOT / "examples" / "prompts.txt").read_text().splitlines()


class Page:
    """Wires one worker to the widgets; knows no method by name."""

    def __init__(self, model: str):
        self.worker, self.model = Worker(model), model
        self.shelf = VideoCache()
        self.available_values = {name: method.available_values(resolve(model)) for name, method in METHODS.items()}
        self.running: dict[str, object] = {}  # a visitor's job

    def build(self) -> gr.Blocks:
        """The Blocks; nothing is computed until somebody presses Run."""
        with gr.Blocks(title="accel: video diffusion, side by side", delete_cache=(3600, 7200)) as demo:
            gr.HTML('<h1 class="title">Same noise, twice: plain and accelerated</h1>')
            with gr.Row(equal_height=True):
                prompt = gr.Textbox(
                    PROMPTS[0], label="Prompt", lines=1, max_lines=3, scale=6, elem_id="prompt", max_length=5000
                )
                seed = gr.Number(1, label="Seed", precision=None, scale=1, min_width=90, elem_id="seed")
                run = gr.Button("▶ Run A/B", variant="primary", scale=1, min_width=110, elem_id="run")
                stop = gr.Button("■ Stop", variant="stop", scale=1, min_width=90, elem_id="stop")
            with gr.Row():
                pick = [gr.Button(p, size="sm", elem_classes="example") for p in PROMPTS[1:4]]
            outputs = self._results()
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    steps, guidance, preset, preset_warning, same_steps_baseline = self._run_settings()
                with gr.Column(scale=3):
                    widgets = self._method_settings()
            gr.Markdown(about())
            event = dict(
                fn=self.run_pair, inputs=[prompt, seed, steps, guidance, same_steps_baseline, *widgets], outputs=outputs
            )
            gr.on(
                [run.click, prompt.submit], **event, concurrency_limit=None, show_progress="hidden", api_name="run_pair"
            )
            stop.click(self.stop, None, outputs[0], queue=False, show_progress="hidden", api_name="stop")
            loaded = [preset_warning, steps, guidance, *widgets]
            preset.change(self.load, preset, loaded, queue=False, api_visibility="private")
            for button in pick:
                button.click(lambda text: text, button, prompt, queue=False, api_visibility="private")
        return demo

    def _results(self) -> list[gr.components.Component]:
        """Message, two live panes, player, the rival's player, figures, timeline, maps, code; first a recorded pair."""
        recorded = recorded_pairs()
        first = recorded[0] if recorded else None
        spoken = '<div role="status">${value || ""}</div>'  # read out when it changes
        message = gr.HTML(first.banner if first else "", elem_id="message", html_template=spoken)
        with gr.Row():
            live = [gr.HTML(EMPTY_PANE, elem_id=f"live-{p}") for p in "ab"]
        player = ABPlayer(first.value if first else None, elem_id="player")
        same_steps_baseline = ABPlayer(visible=False, elem_id="rival")
        figures = gr.HTML(metric_cards(first.report) if first else "", elem_id="numbers")
        steps_shown = gr.HTML(timeline(first.report["trace"]) if first else "", elem_id="timeline")
        rates_shown = gr.HTML(token_maps(first.report["trace"]) if first else "", elem_id="maps")
        shown_code = gr.Code(
            snippet(first.report) if first else "", language="python", label="This setting in your own code",
            interactive=False, elem_id="code",
        )  # fmt: skip
        return [message, *live, player, same_steps_baseline, figures, steps_shown, rates_shown, shown_code]

    def _run_settings(self) -> tuple[gr.components.Component, ...]:
        """Steps, guidance, preset, what this model lacks for it, and whether to show the third pane."""
        gr.Markdown("### Run")
        steps = gr.Slider(
            1, 100, 50, step=1, label="steps", info="Of all but a student; more is slower.", elem_id="steps"
        )
        guidance = gr.Slider(
            0, 12, 4, step=0.5, label="guidance",
            info="Strength of the prompt, but of a student, whose own is built in; 1 and less runs one branch.",
        )  # fmt: skip
        preset = gr.Dropdown(preset_names(), value=FIRST, label="preset", info="Sets the knobs.", elem_id="preset")
        preset_warning = gr.HTML("", elem_id="lacking")
        same_steps_baseline = gr.Checkbox(
            False, label="third pane: fewer plain steps", elem_id="also",
            info="What the plain model makes in as few steps as the accelerated side takes.",
        )  # fmt: skip
        return steps, guidance, preset, preset_warning, same_steps_baseline

    def _method_settings(self) -> list[gr.components.Component]:
        """A switch for each method, then the knobs of each; one for which nothing was trained is switched off."""
        switches, parameters, on = [], [], {type(m): m for m in load_preset(FIRST)}
        for name, method in METHODS.items():
            gr.Markdown(f"### {method.title} · [{method.paper}](https://arxiv.org/abs/{method.paper[6:]})")
            can = all(self.available_values[name].values())
            switch = gr.Checkbox(
                method in on, label=f"use {method.title}", elem_id=f"use-{name}", interactive=can,
                info=None if can else "Nothing was trained for this model yet: see the README.",
            )  # fmt: skip
            switches.append(switch)
            with gr.Row():
                parameters += controls.widgets(on.get(method) or method(), self.available_values[name]).values()
        return [*switches, *parameters]

    def load(self, name: str) -> list:
        """Widget values of a preset: what this model lacks for it, steps, guidance, switches, knobs."""
        preset = load_preset(name)
        chosen = {type(m): m for m in preset}
        switched, values, lacks = [], [], []
        for own, method in METHODS.items():
            available_values, asked = self.available_values[own], chosen.get(method)
            switched.append(asked is not None and all(available_values.values()))
            for knob in method.parameters():
                wanted = getattr(asked or method(), knob)
                values.append(controls.nearest_available(wanted, available_values.get(knob)))
                if asked and switched[-1] and values[-1] != wanted:
                    lacks.append(f"{method.title}'s {knob.replace('_', ' ')} {wanted}, {values[-1]} is set instead")
            if asked and not switched[-1]:
                lacks.append(f"{method.title}, which is off")
        note = f"{name} asks for what was not trained for this model (see the README): {'; '.join(lacks)}."
        shown = f'<div class="note bad" role="status">{escape(note)}</div>' if lacks else ""
        return [shown, *[gr.skip() if v is None else v for v in (preset.steps, preset.guidance)], *switched, *values]

    def stop(self, request: gr.Request):
        """End the visitor's run at its next step; the run says so itself, lest two answers cross."""
        job = self.running.get(request.session_hash)
        if job is None:
            return '<div class="note">Nothing is running.</div>'
        job.stop.set()
        return gr.skip()

    def run_pair(self, request: gr.Request, prompt, seed, steps, guidance, same_steps_baseline, *values):
        """Generate a pair and report on it while it grows."""
        switches, rest = dict(zip(METHODS, values)), list(values[len(METHODS) :])
        methods = {}
        for name, method in METHODS.items():
            own = {knob: rest.pop(0) for knob in method.parameters()}
            if switches[name]:
                methods[name] = controls.settings(method, own)
        asked = dict(prompt=prompt, seed=seed, steps=steps, guidance=guidance, methods=methods)
        work = CompareJob(self.model, asked, self.shelf, same_steps_baseline)
        job = self.worker.submit(work)
        self.running[request.session_hash] = job
        try:
            for kind, data in self.worker.stream(job):
                yield self._show(kind, data)
                if kind in ("refused", "failed"):
                    gr.Warning(_sentence(kind, data))
        finally:
            if self.running.get(request.session_hash) is job:
                del self.running[request.session_hash]

    def _show(self, kind: str, data: dict) -> list:
        """What the outputs show now: message, two panes, player, the rival's player, figures, timeline, maps, code."""
        keep = gr.skip()
        rest = [keep] * 6
        if kind == "waiting":
            ahead = data["ahead"]
            what = "Loading the model…" if data["loading"] else f"Waiting: {ahead} run{'s' * (ahead > 1)} ahead of you."
            return [f'<div class="note">{what}</div>', keep, keep, *rest]
        if kind == "started":
            baseline = pane_waiting("baseline", "kept from before" if data["kept"] else "next")
            return [data["note"], baseline, pane_waiting("accelerated", "after the baseline"), *rest]
        if kind == "step":
            shown = [pane(**data["pane"]) if p == data["which"] else keep for p in "ab"]
            return [keep, *shown, *rest]
        if kind == "pair":
            facts, hidden = data["report"], gr.update(visible=False)
            told = [metric_cards(facts), timeline(facts["trace"]), token_maps(facts["trace"]), snippet(facts)]
            return [data["note"], EMPTY_PANE, EMPTY_PANE, data["player"], hidden, *told]
        if kind == "rival":
            return [keep, EMPTY_PANE, EMPTY_PANE, keep, gr.update(value=data["player"], visible=True), *[keep] * 4]
        if kind == "stopping":
            return ['<div class="note">Stopping at the next step…</div>', keep, keep, *rest]
        if kind == "stopped":
            note = '<div class="note">Stopped. Nothing was lost: the last pair is still here.</div>'
            return [note, EMPTY_PANE, EMPTY_PANE, *rest]
        if kind in ("refused", "failed"):
            return [f'<div class="note bad">{_sentence(kind, data)}</div>', EMPTY_PANE, EMPTY_PANE, *rest]
        return [keep, keep, keep, *rest]


def _sentence(kind: str, data: dict) -> str:
    return escape(data["why"]) if kind == "refused" else f"Something went wrong here (error {data['name']})."


def main() -> None:
    """Serve the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--share", action="store_true", help="open a public link")
    parser.add_argument("--model", default=TINY, help="folder or Hugging Face id of a diffusers pipeline")
    given = parser.parse_args()
    launch(given.model, given.host, given.port, given.share)


def launch(
    model: str = TINY, host: str = "127.0.0.1", port: int | None = None, share: bool = False, **more
) -> gr.Blocks:
    """Start the server and return its Blocks."""
    demo = Page(model).build()
    demo.queue(max_size=20).launch(
        server_name=host, server_port=port, share=share, css=CSS, theme=gr.themes.Soft(),
        footer_links=["api", "settings"], ssr_mode=False, **more,
    )  # fmt: skip
    return demo


if __name__ == "__main__":
    main()
