"""The Compare tab: settings on the left; prompt, videos and figures on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.events import Dependency

from accel.errors import AccelError, sentence
from accel.runtime.example_prompts import example_prompts, is_example
from accel.runtime.models import ModelDefaults, read_defaults
from accel.runtime.presets import DEFAULT_PRESET, Preset, load_preset, preset_names
from accel.runtime.repeat import check_repeatable, preset_of, reference_of
from ui.clickable import ClickableHTML
from ui.context import Context
from ui.controls import Change, MethodControls, Update, changes_from, is_usable, missing_parts, words
from ui.estimates import estimate_text
from ui.pair_runs import PairRuns
from ui.pair_view import PairView
from ui.panels import READ_ALOUD, note
from ui.preset_cards import PLAIN, card_choices
from ui.recorded import Recorded, recorded_pairs
from ui.share import holds_settings
from ui.side_settings import ReferenceControls, Side, SideSettings, describe_side, side_of
from ui.templating import render

MODEL_GONE = "Its model is not offered here any more: Run takes the chosen one."


@dataclass(frozen=True)
class PairSettings:
    """What the widgets say: model, prompt and seed of both sides, and each side's own settings."""

    run: dict[str, Any]
    reference: Side
    candidate: Side
    keep: bool  # earlier candidates of the same reference stay in the player


class CompareTab:
    """Layout and handlers; create it inside a `gr.Tab`. It knows no method by name."""

    def __init__(self, context: Context):
        self.context = context
        self.defaults = read_defaults(context.model) or ModelDefaults()
        with gr.Row(elem_id="compare", equal_height=False):
            with gr.Column(scale=0, min_width=336, elem_id="settings"):
                self._add_candidate()
                self._add_reference()
            with gr.Column(scale=1, min_width=320, elem_id="stage"):
                self._add_prompt()
                self.message = gr.HTML(elem_id="message", html_template=READ_ALOUD)
                self.live = gr.HTML(elem_id="live")
                self.view = PairView(context)
        self.runs = PairRuns(self)
        self.until_loaded = gr.Timer(2)
        self.shown = gr.State(None)  # id of the stored pair, or name of the recorded pair, that is shown
        self.panes = gr.State([])  # ids of the stored pairs whose candidates are in the player

    def _add_candidate(self) -> None:
        gr.HTML('<h2 class="side-b"><b>B</b> Candidate</h2>')
        self.preset = gr.Radio(card_choices(self.context.model), value=DEFAULT_PRESET, label="preset",
                               elem_id="preset", show_label=False)  # fmt: skip
        self.preset_note = gr.HTML(elem_id="preset-note", html_template=READ_ALOUD)
        self.controls = MethodControls(self.context.model, load_preset(DEFAULT_PRESET))
        self.changed = ClickableHTML(elem_id="changed")
        self.side = SideSettings("b", self.defaults.steps, self.defaults.guidance, load_preset(DEFAULT_PRESET).methods)
        self.keep = gr.Checkbox(
            False, label="Keep earlier candidates in the player", elem_id="keep",
            info="Up to three, of the same prompt, seed and reference.",
        )  # fmt: skip

    def _add_reference(self) -> None:
        gr.HTML('<h2 class="side-a"><b>A</b> Reference</h2>')
        self.reference = ReferenceControls(self.defaults.steps, self.defaults.guidance)
        self.pin = gr.Button("Pin the candidate shown as the reference", size="sm", elem_id="pin")

    def _add_prompt(self) -> None:
        prompts, shown = example_prompts(read_defaults(self.context.model)), next(iter(recorded_pairs()), None)
        prompt, seed = prompts[0], 1
        if shown and shown.report["model"] == self.context.model:  # Run then makes what is shown
            prompt, seed = shown.report["prompt"], shown.report["seed"]
        with gr.Row(elem_id="prompt-row", equal_height=True):
            self.prompt = gr.Textbox(
                prompt, label="Prompt", lines=1, max_lines=3, scale=8, elem_id="prompt", max_length=2000
            )
            self.seed = gr.Number(seed, label="Seed", precision=None, scale=1, min_width=84, elem_id="seed")
            with gr.Row(elem_id="run-bar", scale=2):
                self.run = gr.Button("▶ Run", variant="primary", min_width=88, elem_id="run")
                self.stop = gr.Button("■ Stop", min_width=72, elem_id="stop", interactive=False)
        with gr.Row(elem_id="under-prompt"):
            self.examples = ClickableHTML(render("examples", prompts=prompts[1:4]), elem_id="examples")
            self.estimate = gr.HTML(elem_id="estimate", html_template=READ_ALOUD)

    @property
    def setting_components(self) -> list[gr.components.Component]:
        """Everything that `settings` needs, without the model."""
        return [self.prompt, self.seed, self.keep, *self.reference.components, *self.side.components,
                *self.controls.components]  # fmt: skip

    def settings(self, model: str, values: list[Any]) -> PairSettings:
        """What the widgets say, from the values of `setting_components`. Raises AccelError if there is no reference."""
        (prompt, seed, keep), rest = values[:3], list(values[3:])
        cut = len(self.reference.components)
        reference, (own, methods) = rest[:cut], (rest[cut : cut + 4], rest[cut + 4 :])
        candidate = self.side.side(own, self.controls.settings(methods))
        return PairSettings(
            {"model": model, "prompt": prompt, "seed": seed}, self.reference.side(reference), candidate, bool(keep)
        )

    @property
    def run_sliders(self) -> dict[gr.Slider, str]:
        """The sliders of both sides that begin with the model's own values, and which values."""
        sides = self.reference.settings, self.side
        return {**{side.steps: "steps" for side in sides}, **{side.guidance: "guidance" for side in sides}}

    @property
    def outputs(self) -> list[gr.blocks.Block]:
        """Everything that running, showing a pair or loading settings can change."""
        return [
            self.page.tabs, self.page.model, self.message, self.live, self.run, self.stop, self.shown, self.panes,
            *self.view.components, self.preset, self.preset_note, self.changed, self.estimate, self.examples,
            self.reference.plain, self.reference.settings.noise_levels, self.side.noise_levels,
            *self.controls.groups.values(), *self.setting_components,
        ]  # fmt: skip

    @property
    def dependent_outputs(self) -> list[gr.components.Component]:
        """What `settings_changed` changes."""
        widgets = (widget for widgets in self.controls.parameters.values() for widget in widgets.values())
        return [
            *self.controls.groups.values(), *widgets, self.side.steps, self.side.guidance, self.side.noise_levels,
            self.changed, self.estimate,
        ]  # fmt: skip

    def wire(self, page) -> None:
        """Connect the events; `page` has the model selector, the visitor and the tabs."""
        self.page = page
        self.inputs = inputs = [page.model, self.preset, *self.setting_components]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        self.quick = quick = {**private, "queue": False}
        finished = gr.on(
            [self.run.click, self.prompt.submit], self.runs.run_pair, [self.shown, self.panes, page.visitor, *inputs],
            self.runs.outputs, concurrency_limit=None, **private,
        )  # fmt: skip
        self.stop.click(self.runs.stop_pairs, None, self.message, **quick)
        chosen = self.preset.input(
            self.choose_preset, [self.shown, page.model, self.preset, self.prompt], self.outputs,
            trigger_mode="always_last", **quick,
        )  # fmt: skip
        self.follow(self.examples.click(chosen_example, None, self.prompt, **quick))
        reset = self.changed.click(self.reset, inputs, self.outputs, **quick)
        pinned = self.pin.click(
            self.pin_candidate,
            self.shown,
            [self.message, self.reference.settings.noise_levels, *self.reference.components],
            **quick,
        )
        edited = [c.input for c in self.setting_components if hasattr(c, "input")]
        gr.on(edited, self.settings_changed, inputs, self.dependent_outputs, trigger_mode="always_last", **quick)
        self.switched = switched = page.model.input(
            self.switch_model, [page.model, self.preset, self.prompt], self.outputs, trigger_mode="always_last", **quick
        )
        self.shows = [chosen]  # events after which `shown` may be another: outside the queue a State has no change
        for loaded in (finished, chosen, switched, reset, pinned):
            self.follow(loaded)
        self.until_loaded.tick(
            self.first_estimate, inputs, [self.estimate, self.until_loaded, *self.run_sliders], **quick
        )

    def follow(self, event: Dependency) -> None:
        """After an event that sets widgets: show what belongs to the new settings, and what a run will take."""
        event.then(self.settings_changed, self.inputs, self.dependent_outputs, **self.quick)

    # Showing what was generated before

    @property
    def _set_aside(self) -> Update:
        """The panes of a running pair as a strip above the player, which shows something else now."""
        return {self.live: gr.update(elem_classes=["aside"])}

    def show_stored(self, run_id: str) -> Update:
        """A stored pair in the Compare tab, with its settings in the widgets."""
        stored = self.context.store.find(run_id)
        if stored is None:
            return self._gone("That result is no longer stored.")
        settings, about_run = self._settings_of(stored.report)
        return {
            self.page.tabs: gr.Tabs(selected="compare"), **self.view.show([stored]), self.shown: run_id,
            self.panes: [run_id], **settings, **self._set_aside,
            self.message: note(f"Shown from the history. {about_run}"),
        }  # fmt: skip

    def show_recorded(self, pair: Recorded) -> Update:
        """A recorded pair in the player, without its settings."""
        return {**self.view.show_recorded(pair), self.shown: pair.name, **self._set_aside}

    def show_two(self, first: str, second: str) -> Update:
        """The candidates of two stored pairs side by side, the first one as the reference of the next run."""
        stored = [self.context.store.find(run_id) for run_id in (first, second)]
        if None in stored:
            return self._gone("One of these results is no longer stored.")
        text = "Two results from the history, each measured at its own time, so no speed-up is told."
        settings, about_run = self._settings_of(stored[1].report)
        pinned, reason = self._pinned(stored[0].report)
        return {
            self.page.tabs: gr.Tabs(selected="compare"), **self.view.show_candidates(stored), self.shown: second,
            self.panes: [], self.message: note(f"{text} {reason or about_run}"), **settings, **self._set_aside,
            **pinned,
        }  # fmt: skip

    def pin_candidate(self, shown: str | None) -> Update:
        """Make the candidate that is shown the reference of the next runs."""
        stored = self.context.store.find(shown) if shown else None
        if stored is None:
            return {self.message: note("There is no result of yours to pin: run one first.", bad=True)}
        pinned, reason = self._pinned(stored.report)
        text = f"Pinned: {describe_side(side_of(stored.report))}. The next candidate is compared with it."
        return {self.message: note(reason or text, bad=bool(reason)), **pinned}

    def _pinned(self, report: dict) -> tuple[Update, str]:
        """The widgets with a stored candidate as the reference, or why it cannot be one."""
        if refusal := refusal_of(report):
            return {}, refusal
        return self._reference_updates(side_of(report)), ""

    def _reference_updates(self, side: Side) -> Update:
        """The reference's widgets for given settings: the stock pipeline, or a pinned result."""
        if side["methods"]:
            return {self.reference.source: "pinned", self.reference.pinned: side}
        return {self.reference.source: "plain", **self.reference.settings.updates(side)}

    def _settings_of(self, report: dict) -> tuple[Update, str]:
        """The widgets for a stored pair, with its model if the page still offers it, and what Run does with them."""
        if refusal := refusal_of(report):
            return {}, refusal
        model, preset = report["model"], Preset(methods=report["methods"])
        controls, _ = self.controls.preset_values(preset, model)
        own, about_run = {self.preset: card_of(preset)}, MODEL_GONE
        if any(choice.id == model for choice in self.context.models):
            own = {self.page.model: model, **self.views_of(model, card_of(preset))}
            about_run = "Run measures it again."
        return {
            self.prompt: report["prompt"], self.seed: report["seed"], **own, **controls, self.preset_note: "",
            **self.side.updates(side_of(report)), **self._reference_updates(side_of(reference_of(report))),
        }, about_run  # fmt: skip

    def _gone(self, text: str) -> Update:
        return {self.page.tabs: gr.Tabs(selected="compare"), self.message: note(text, bad=True)}

    # Settings

    def load_preset(self, model: str, name: str | None) -> Update:
        """Set the candidate's widgets to a preset, and say what of it the model lacks."""
        preset = load_preset(name) if name in preset_names() else Preset()
        reason = self.context.missing(model)
        missing = f"This model cannot run here: {reason}." if reason else ""
        return {**self.load_settings(preset, {}, model), self.preset: name, self.message: note(missing, bad=True)}

    def switch_model(self, model: str, name: str | None, prompt: str) -> Update:
        """The preset on another model, or the default one without a preset or weights, with the model's own examples.

        A prompt of the visitor's own stays.
        """
        if name is None or (name in preset_names() and missing_parts(load_preset(name), model)):
            name = DEFAULT_PRESET
        own = {self.prompt: example_prompts(read_defaults(model))[0]} if is_offered(prompt) else {}
        return {**self.load_preset(model, name), **self.views_of(model, name), **self.stock(model), **own}

    def stock(self, model: str) -> Update:
        """The widgets of the stock pipeline as the reference, in a model's own steps and guidance."""
        defaults = self.context.defaults(model)
        return self.reference.settings.updates({"steps": defaults.steps, "guidance": defaults.guidance})

    def views_of(self, model: str, name: str | None) -> Update:
        """A model's cards, of which one is chosen, and its example prompts."""
        prompts = example_prompts(read_defaults(model))
        return {
            self.preset: gr.update(choices=card_choices(model), value=name),
            self.examples: render("examples", prompts=prompts[1:4]),
        }

    def choose_preset(self, shown: str | None, model: str, name: str, prompt: str) -> Update:
        """The same, and the model's recorded pair of the preset unless a pair of the visitor's own is shown.

        Its prompt and seed come with it, but a prompt of the visitor's own stays.
        """
        recorded = {pair.name: pair for pair in recorded_pairs() if pair.report["model"] == model}
        updates = self.load_preset(model, name)
        if name in recorded and (shown is None or shown in recorded):
            updates |= self.show_recorded(recorded[name])
            if is_offered(prompt):
                report = recorded[name].report
                updates |= {self.prompt: report["prompt"], self.seed: report["seed"]}
        return updates

    def load_settings(self, preset: Preset, run: dict[str, Any], model: str) -> Update:
        """The widgets for a preset on a model; prompt, seed, steps, guidance, solver and shift where they are given."""
        controls, missing = self.controls.preset_values(preset, model)
        defaults = self.context.defaults(model)
        usable = {name: parameters for name, parameters in preset.methods.items() if is_usable(name, model)}
        side = {**preset.settings(), **run, "methods": usable}
        side |= {key: getattr(defaults, key) for key in ("steps", "guidance") if side.get(key) is None}
        text = f"This preset runs in part only: {'; '.join(missing)}." if missing else ""
        typed = {self.prompt: run.get("prompt"), self.seed: run.get("seed")}
        reference = run.get("reference")
        return {
            **controls, **self.side.updates(side), self.changed: "",
            self.preset: card_of(preset),
            **{widget: value for widget, value in typed.items() if value is not None},
            **(self._reference_updates({"solver": "default", "shift": None, **reference}) if reference else {}),
            self.preset_note: note(text, bad=True) if missing else "",
        }  # fmt: skip

    def settings_changed(self, model: str, preset: str, *values) -> Update:
        """Which parameters are shown and marked as changed, and what a run will take."""
        methods = values[-len(self.controls.components) :]
        settings = self.controls.settings(methods)
        changes = self._changes(model, preset, settings)
        return {
            **self.controls.visibility(methods), **self.controls.marks(changes), **self.side.visibility(settings),
            self.changed: changed_strip(preset, changes), self.estimate: self.estimate_text(model, values),
        }  # fmt: skip

    def first_estimate(self, request: gr.Request, model: str, preset: str, *values) -> Update:
        """What a run will take, as soon as the model is loaded.

        Steps and guidance are then the model's own, unless the address of the page holds settings.
        """
        loading = self.context.workers.is_loading(model)
        own = {} if loading or holds_settings(request.query_params) else self._own_defaults(model, values)
        values = [own.get(component, value) for component, value in zip(self.setting_components, values)]
        return {self.estimate: self.estimate_text(model, values), self.until_loaded: gr.Timer(active=loading), **own}

    def _own_defaults(self, model: str, values: Sequence[Any]) -> Update:
        """Sliders that still have what was assumed of a model, at what it says itself now that it is loaded."""
        own, updates = self.context.defaults(model), {}
        assumed, value_of = self.defaults, dict(zip(self.setting_components, values))
        for slider, name in self.run_sliders.items():
            if value_of[slider] == getattr(assumed, name) != getattr(own, name):
                updates[slider] = getattr(own, name)
        return updates

    def reset(self, event: gr.EventData, model: str, preset: str, *values) -> Update:
        """Set one changed parameter, or all, back to the preset's value."""
        wanted = event._data["id"]
        changes = self._changes(model, preset, self.controls.settings(values[-len(self.controls.components) :]))
        back = [c for c in changes if wanted in ("all", f"{c.method}.{c.parameter}")]
        left = [change for change in changes if change not in back]
        updates = {
            self.controls.parameters[c.method][c.parameter]: gr.update(value=c.preset_value, elem_classes=["knob"])
            for c in back
        }  # fmt: skip
        return {**updates, self.changed: changed_strip(preset, left)}

    def _changes(self, model: str, preset: str | None, methods: dict) -> list[Change]:
        base = load_preset(preset) if preset in preset_names() else Preset()
        return changes_from(base, methods, model)

    def estimate_text(self, model: str, values: list[Any]) -> str:
        """What a run will take on this machine, or why it cannot run."""
        try:
            settings = self.settings(model, values)
        except AccelError as error:
            return sentence(error)
        return estimate_text(self.context, settings.run, settings.reference, settings.candidate)


def refusal_of(report: dict) -> str:
    """Why a stored pair cannot be repeated, in a sentence; empty if it can."""
    try:
        check_repeatable(report)
    except AccelError as error:
        return sentence(error)
    return ""


def is_offered(prompt: str) -> bool:
    """Whether a prompt is an example or that of a recorded pair, and not the visitor's own."""
    return is_example(prompt) or any(pair.report["prompt"] == prompt for pair in recorded_pairs())


def card_of(preset: Preset) -> str | None:
    """The card whose methods these are, if there is one."""
    return preset_of(preset.methods) if preset.methods else PLAIN


def chosen_example(event: gr.EventData) -> str:
    """The prompt of the example that was clicked."""
    return event._data["id"]


def changed_strip(preset: str | None, changes: list[Change]) -> str:
    """The changed parameters with a button each that sets them back."""
    rows = [(f"{c.method}.{c.parameter}", words(c.parameter), c.preset_value, c.value) for c in changes]
    return render("changed", preset=preset or "the defaults", rows=rows) if rows else ""
