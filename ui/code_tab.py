"""The Code tab: the pair shown in Compare as Python, as a command and as a preset file; a link and downloads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import gradio as gr
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from accel.errors import AccelError, sentence
from accel.evaluation.verdict import subject
from accel.runtime.paths import ROOT
from accel.runtime.repeat import check_repeatable, command, preset_yaml, python_code
from ui.context import Context
from ui.endpoints import add_endpoint
from ui.panels import READ_ALOUD, note
from ui.recorded import Recorded, recorded_pairs
from ui.share import NOT_OURS, SharedSettings, link_query, read_link, read_preset, shared_parameters
from ui.templating import render

Update = dict[gr.components.Component, Any]

SHOWN = {"interactive": False, "wrap_lines": True, "lines": 1, "max_lines": 30, "buttons": ["copy"]}  # of a `gr.Code`
RECORDED = ROOT / "examples" / "runs"
RUN_ID, RECORDED_NAME = re.compile(r"[0-9a-f]{32}"), re.compile(r"[a-z0-9][a-z0-9-]*")
# Without a clipboard, as on plain http, the whole link is in the box.
COPY = """(text) => { const url = new URL(text, location.href).href;
navigator.clipboard?.writeText(url).catch(() => {}); return url; }"""
# The address follows the pair shown, so that a page that loads anew has its settings; what others read stays.
# A misspelt name goes: with it the page would refuse its own address.
FOLLOW = f"""(link) => {{ if (!link) return;
const url = new URL(link, location.href), before = new URLSearchParams(location.search);
for (const [name, value] of before)
    if ({[*NOT_OURS]}.includes(name) || /^(__|utm_)/.test(name)) url.searchParams.set(name, value);
history.replaceState(history.state, "", url); }}"""


class CodeTab:
    """Code, command, preset and link of the pair shown; create it inside a `gr.Tab`, then `wire` it."""

    def __init__(self, context: Context):
        """Create the components; they show the first recorded pair."""
        self.context = context
        views = self._views(None)
        self.about = gr.HTML(views[0], elem_id="code-about")
        self.message = gr.HTML(visible=False, elem_id="code-message", html_template=READ_ALOUD)
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                self.code = gr.Code(views[1], language="python", label="In your own code", elem_id="code",
                                    **SHOWN)  # fmt: skip
                self.command = gr.Code(views[2], language="shell", label="On the command line", elem_id="command",
                                       **SHOWN)  # fmt: skip
            with gr.Column(scale=2, min_width=320):
                self._add_take_home(views)

    def _add_take_home(self, views: list) -> None:
        self.preset = gr.Code(views[3], language="yaml", label="As a preset: change it and use it here",
                              elem_id="preset-yaml", **{**SHOWN, "interactive": True})  # fmt: skip
        with gr.Row():
            self.use = gr.Button("Use this preset", size="md", min_width=120, elem_id="use-preset")
            self.upload = gr.UploadButton("Upload a preset file", size="md", min_width=120, type="binary",
                                          file_types=[".yaml", ".yml"], elem_id="upload-preset")  # fmt: skip
        self.link = gr.Textbox(views[4], label="Link to these settings", interactive=False, elem_id="share-link",
                               lines=2, max_lines=8)  # fmt: skip
        self.copy = gr.Button("Copy the link", size="md", elem_id="copy-link")
        self.downloads = gr.HTML(views[5], elem_id="downloads")

    @property
    def views(self) -> list[gr.components.Component]:
        """What changes with the pair that is shown."""
        return [self.about, self.code, self.command, self.preset, self.link, self.downloads]

    def wire(self, page) -> None:
        """Connect the events; `page.compare` says which pair is shown and takes settings."""
        self.page = page
        quick = {"api_visibility": "private", "queue": False, "show_progress": "hidden"}
        page.compare.shown.change(self.show, page.compare.shown, self.views, **quick)
        for event in page.compare.shows:
            event.then(self.show, page.compare.shown, self.views, **quick)
        outputs = [self.message, *page.compare.outputs]
        page.compare.follow(self.use.click(self.use_preset, [self.preset, page.model], outputs, **quick))
        page.compare.follow(self.upload.upload(self.use_preset, [self.upload, page.model], outputs, **quick))
        self.copy.click(None, self.link, self.link, js=COPY, **quick)
        self.link.change(None, self.link, None, js=FOLLOW, **quick)

    def show(self, shown: str | None) -> Update:
        """The views of a pair: the id of a stored one, or the name of a recorded one."""
        return dict(zip(self.views, self._views(shown)))

    def link_of(self, shown: str | None) -> str:
        """The link to the settings of a pair."""
        return self.show(shown)[self.link]

    def use_preset(self, text: str | bytes, model: str) -> Update:
        """The settings of a preset file in the Compare tab, for a model, or a message that says what is wrong."""
        try:
            preset = read_preset(text or "")
        except AccelError as error:
            return {self.message: gr.update(value=note(str(error), bad=True), visible=True)}
        return {
            self.message: gr.update(visible=False), self.page.tabs: gr.Tabs(selected="compare"),
            **self.page.compare.load_settings(preset, {}, model),
            self.page.compare.message: note("The preset is set. Press Run to generate with it."),
        }  # fmt: skip

    def settings_of_url(self, request: gr.Request) -> Update:
        """The settings in a page's address in the Compare tab, or a message that says what is wrong with them."""
        try:
            shared = read_link(dict(request.query_params), self._models())
        except AccelError as error:
            return {self.page.compare.message: note(f"The link was not used: {error}.", bad=True)}
        if shared is None:
            return {self.page.compare.message: gr.skip()}  # Gradio refuses {}
        pair = recorded_with(shared_parameters(request.query_params))
        same = {**self.page.compare.show_recorded(pair), **self.show(pair.name)} if pair else {}
        return {**self._load(shared), **same}

    def code_of(self, run_id: str) -> dict:
        """A stored pair as text that repeats it: Python code, a command, a preset file, and a link's query.

        Example: code(run_id)["python"]
        """
        report, _ = self._repeatable(run_id)
        return {"python": python_code(report), "command": command(report), "preset": preset_yaml(report),
                "link": f"?{link_query(report)}"}  # fmt: skip

    def add_endpoints(self) -> None:
        """Register the tab's endpoint; call it inside the page's `gr.Blocks`."""
        add_endpoint(self.code_of, "code")

    def routes(self) -> list[Route]:
        """The preset file of a pair, made when it is asked for; these come before the routes of stored files."""
        return [Route(f"/{folder}/{{name}}/preset.yaml", self._preset_file) for folder in ("runs", "recorded")]

    def _preset_file(self, request: Request) -> Response:
        report, url = self._find(request.path_params["name"])
        if report is None or not request.url.path.endswith(f"/{url}/preset.yaml"):
            return PlainTextResponse("There is no such file.", 404)
        try:
            check_repeatable(report)
        except AccelError as error:
            return PlainTextResponse(sentence(error), 404)
        headers = {"Content-Disposition": 'attachment; filename="preset.yaml"', "X-Content-Type-Options": "nosniff"}
        return PlainTextResponse(preset_yaml(report), headers=headers)

    def _load(self, shared: SharedSettings) -> Update:
        text = "The settings are those of the link. Press Run to generate with them."
        compare, model = self.page.compare, shared.model or self.context.model
        updates = compare.load_settings(shared.preset, shared.run, model)
        views = compare.views_of(model, updates[compare.preset])
        return {**compare.stock(model), **updates, self.page.model: model, **views, compare.message: note(text)}

    def _models(self) -> dict[str, str]:
        """The models that the page offers, each with the reason why it cannot run here, or an empty text."""
        return {choice.id: choice.reason for choice in self.context.models}

    def _views(self, shown: str | None) -> list[Any]:
        """Values of `views`; empty if there is no pair."""
        try:
            report, url = self._repeatable(shown)
        except AccelError as error:
            return [note(sentence(error), bad=True), "", "", "", "", ""]
        about = render("code_about", subject=subject(report), prompt=report["prompt"], seed=report["seed"])
        preset, link = preset_yaml(report), f"?{link_query(report)}"
        return [about, python_code(report), command(report), preset, link, downloads(preset, url)]

    def _repeatable(self, shown: str | None) -> tuple[dict, str]:
        """The same as `_find`. Raises AccelError if the pair is gone, or of an earlier version."""
        report, url = self._find(shown)
        if report is None:
            raise AccelError("that result is no longer stored")
        check_repeatable(report)
        return report, url

    def _find(self, shown: str | None) -> tuple[dict | None, str]:
        """The report of a pair and the address of its folder."""
        if shown and RUN_ID.fullmatch(shown):
            stored = self.context.store.find(shown)
            return (stored.report, f"runs/{shown}") if stored else (None, "")
        file = recorded_file(shown)
        return (json.loads(file.read_text()), f"recorded/{file.parent.name}") if file else (None, "")


def recorded_with(parameters: dict[str, str]) -> Recorded | None:
    """The recorded pair whose link has these parameters: a page that loads anew shows it again."""
    return next((p for p in recorded_pairs() if dict(parse_qsl(link_query(p.report))) == parameters), None)


def recorded_file(name: str | None) -> Path | None:
    """`run.json` of a recorded pair; of the first one without a name; None if there is none."""
    if name is None:
        return next((pair.folder / "run.json" for pair in recorded_pairs()), None)
    file = RECORDED / name / "run.json"
    return file if RECORDED_NAME.fullmatch(name) and file.is_file() else None


def downloads(preset: str, url: str) -> Markup:
    """Links to the preset as a file, the report as a zip, and all values."""
    data = f"data:text/yaml;charset=utf-8,{quote(preset)}"  # made here, so it needs no file on the server
    return render("downloads", preset=data, url=url)
