"""The settings of a side beside its methods, and where the reference comes from."""

from __future__ import annotations

from typing import Any

import gradio as gr

from accel.errors import AccelError
from accel.runtime.presets import RUN_SETTINGS, load_preset, preset_names, required_settings
from accel.runtime.run import SOLVERS
from ui.slider import ClampedSlider

SOURCES = {
    "The stock pipeline": "plain", "A preset": "preset", "The last candidate": "last", "The pinned result": "pinned"
}  # fmt: skip
MAX_STEPS, MAX_GUIDANCE = 100, 12  # of the sliders; a run may have more
Side = dict[str, Any]  # steps, guidance, solver, shift, methods


class SideSettings:
    """The widgets of one side's run settings; create it inside a `gr.Blocks`."""

    def __init__(self, side: str, steps: int, guidance: float, methods: dict[str, dict] | None = None):
        """`side` ("a" or "b") makes the names of the widgets unique; `methods` are those that it begins with."""
        name, decided = {"a": "reference", "b": "candidate"}[side], decided_by(methods or {})
        self.steps = ClampedSlider(
            1, MAX_STEPS, steps, step=1, label=f"steps of the {name}", elem_id=f"steps-{side}", buttons=[],
            visible="steps" not in decided,
        )  # fmt: skip
        self.guidance = ClampedSlider(
            0, MAX_GUIDANCE, guidance, step=0.5, label=f"guidance of the {name}", elem_id=f"guidance-{side}",
            buttons=[], visible="guidance" not in decided,
        )  # fmt: skip
        with gr.Accordion(
            "Solver", open=False, elem_classes="advanced", visible="solver" not in decided
        ) as self.noise_levels:
            self.solver = gr.Dropdown(SOLVERS, value="default", label=f"solver of the {name}", elem_id=f"solver-{side}")
            self.shift = gr.Number(
                None, label=f"flow shift of the {name}", elem_id=f"shift-{side}",
                info="Higher spends more steps on coarse structure; empty: the model's own.",
            )  # fmt: skip

    @property
    def components(self) -> list[gr.components.Component]:
        """The widgets in the order of `side`."""
        return [self.steps, self.guidance, self.solver, self.shift]

    def side(self, values: list[Any], methods: dict[str, dict]) -> Side:
        """The settings of a side from the values of `components`; what is hidden is as the methods decide it."""
        return {**dict(zip(RUN_SETTINGS, values)), **decided_by(methods), "methods": methods}

    def visibility(self, methods: dict[str, dict]) -> dict:
        """Hide what the side's methods decide."""
        decided = decided_by(methods)
        sliders = {"steps": self.steps, "guidance": self.guidance}
        return {
            **{slider: gr.update(visible=name not in decided) for name, slider in sliders.items()},
            self.noise_levels: gr.update(visible="solver" not in decided),
        }

    def updates(self, side: Side) -> dict:
        """The widgets' values for the settings of a side; what is None, or decided by its methods, stays as it is.

        A slider grows for a value above its end: it would refuse every later event of the page.
        """
        methods = side.get("methods", {})
        new, decided = self.visibility(methods), decided_by(methods)
        for slider, name, end in ((self.steps, "steps", MAX_STEPS), (self.guidance, "guidance", MAX_GUIDANCE)):
            if side.get(name) is not None and name not in decided:  # the methods may be switched off again
                new[slider] |= {"value": side[name], "maximum": max(end, side[name])}
        return {**new, self.solver: side.get("solver") or "default", self.shift: side.get("shift")}


def decided_by(methods: dict[str, dict]) -> dict[str, Any]:
    """The run settings that methods bring with them; none where they do not go together, which a run will say."""
    try:
        return required_settings(methods)
    except AccelError:
        return {}


class ReferenceControls:
    """What the candidate is compared with: the stock pipeline, a preset, the last candidate or a pinned result."""

    def __init__(self, steps: int, guidance: float):
        """Create the widgets: the stock pipeline, in the model's own number of steps."""
        self.source = gr.Radio(list(SOURCES.items()), value="plain", label="compare with", elem_id="reference-source")
        with gr.Column(elem_classes="knobs") as self.plain:
            self.settings = SideSettings("a", steps, guidance)
        self.preset = gr.Dropdown(preset_names(), value="fastercache", label="preset of the reference",
                                  visible=False, elem_id="reference-preset")  # fmt: skip
        self.last, self.pinned = gr.State(None), gr.State(None)  # settings of a side
        self.source.change(
            lambda source: (gr.update(visible=source == "plain"), gr.update(visible=source == "preset")),
            self.source, [self.plain, self.preset], queue=False, api_visibility="private",
        )  # fmt: skip

    @property
    def components(self) -> list[gr.components.Component]:
        """Everything that `side` needs."""
        return [self.source, self.preset, self.last, self.pinned, *self.settings.components]

    def side(self, values: list[Any]) -> Side:
        """The settings of the reference from the values of `components`.

        Raises AccelError if there is no last candidate or pinned result yet.
        """
        source, preset, last, pinned, *plain = values
        if source == "preset":
            return load_preset(preset).settings()
        stored = {"last": last, "pinned": pinned}.get(source)
        if source in ("last", "pinned") and stored is None:
            what = "no candidate has been generated yet" if source == "last" else "no result is pinned"
            raise AccelError(f"{what}: run one first, or compare with the stock pipeline")
        return stored or self.settings.side(plain, {})


def side_of(run: dict) -> Side:
    """The settings of a side from a run or a report."""
    return {"solver": "default", "shift": None, **{key: run[key] for key in ("steps", "guidance", "methods")},
            **{key: run[key] for key in ("solver", "shift") if key in run}}  # fmt: skip


def describe_side(side: Side) -> str:
    """A side in a few words: its methods, steps and what is not the model's own."""
    parts = [" + ".join(side["methods"]) or "plain", f"{side['steps']} steps"]
    parts += [side["solver"]] if side.get("solver", "default") != "default" else []
    parts += [f"shift {side['shift']:g}"] if side.get("shift") else []
    return ", ".join(parts)
