"""A run: everything that determines a video, checked before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator

from ..errors import AccelError, quote
from ..methods import METHODS
from .models import ModelDefaults, read_config, resolve
from .presets import (
    OWN_NOISE_LEVELS,
    Solver,
    describe_range,
    explain,
    is_text,
    normalize,
    normalize_methods,
    required_settings,
)

MAX_PROMPT_LENGTH = 2000  # characters
SOLVERS: tuple[str, ...] = get_args(Solver)


class Run(BaseModel, frozen=True, extra="forbid"):
    """One generation, by value. `methods` are {name: {parameter: value}}, from the innermost to the outermost.

    `shift` is the flow shift of the noise levels; None is the model's own.
    """

    model: str
    prompt: str
    seed: int = Field(0, ge=0, le=2**63 - 1)
    height: int = Field(ge=16, le=2160)
    width: int = Field(ge=16, le=3840)
    frames: int = Field(ge=1, le=1025)
    steps: int = Field(ge=1, le=1000)
    guidance: float = Field(ge=0, le=30, allow_inf_nan=False)
    solver: Solver = "default"
    shift: float | None = Field(None, ge=0.1, le=20, allow_inf_nan=False)
    methods: dict[str, dict] = {}

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        if len(prompt) > MAX_PROMPT_LENGTH:
            raise ValueError(f"the prompt has {len(prompt)} characters, at most {MAX_PROMPT_LENGTH} are allowed")
        if not is_text(prompt):
            raise ValueError("the prompt holds half of a character, which is not text: type it again")
        return prompt.strip()


def parse_run(defaults: ModelDefaults, settings: Any) -> Run:
    """A checked run from untrusted JSON, or from the values of widgets.

    Only settings that are left out come from the methods' requirements or the defaults: an emptied number is refused.
    Raises AccelError in one sentence.
    """
    if not isinstance(settings, dict):
        raise AccelError(f"the settings {quote(settings)} are not understood: give {{setting: value}}")
    if empty := [
        key for key, value in settings.items() if value is None and key in Run.model_fields and key != "shift"
    ]:
        raise AccelError(f"{empty[0]} is empty: give {describe_range(Run, empty[0])}")
    return build_run(defaults, **{str(key): value for key, value in settings.items()})


def build_run(defaults: ModelDefaults, /, **settings) -> Run:
    """A checked run. Settings that are missing or None come from the methods' requirements, else from the defaults.

    Raises AccelError in one sentence.
    """
    given = {k: v for k, v in settings.items() if v is not None}
    if "methods" in given:
        given["methods"] = normalize_methods(given["methods"])
    given = normalize(Run, given)
    required = required_settings(given.get("methods", {}))
    _check_required(given, required)
    base = {key: getattr(defaults, key) for key in ("height", "width", "frames", "steps", "guidance")}
    try:
        return Run(**{**base, **required, **given})
    except ValidationError as error:
        first = error.errors()[0]
        sentence = str(first["ctx"]["error"]) if first["type"] == "value_error" else explain(error, Run)
        raise AccelError(sentence) from None


def _check_required(given: dict[str, Any], required: dict[str, Any]) -> None:
    """Raise AccelError where settings contradict what a student or a fitted solver requires."""
    names = " + ".join(given.get("methods", ()))
    for key, value in required.items():
        if given.get(key, value) == value:
            continue
        if key in OWN_NOISE_LEVELS:
            raise AccelError(f"a solver or shift is not possible with {names}, which brings its own noise levels")
        parameters = [f"{name}.{key}" for name in given["methods"] if key in METHODS[name].model_fields]
        hint = f"; set {' or '.join(parameters)} instead" if parameters else ""
        raise AccelError(
            f"{key} = {quote(given[key])} is not possible with {names}, which needs {key} = {value:g}{hint}"
        )


def check_size(run: Run, pipe) -> None:
    """Raise AccelError if a loaded model cannot make this size."""
    _check_multiples(run, *_multiples(pipe))


def smallest_size(pipe) -> dict[str, int]:
    """Height, width and number of frames of the smallest video that is more than one token, as inputs of a pipeline."""
    space, time = _multiples(pipe)
    return {"height": 2 * space, "width": 2 * space, "num_frames": 1 + time}


def _multiples(pipe) -> tuple[int, int]:
    """What height and width, and frames - 1, of a pipeline's videos are multiples of."""
    from ..families import family_of

    family = family_of(pipe)
    space, time = family.compression(pipe)
    return space * family.patch(family.denoiser(pipe))[-1], time


def check_size_from_files(run: Run) -> None:
    """The same from the configuration files of a local model, as far as they hold the factors."""
    folder = Path(resolve(run.model))
    vae, transformer = (folder / part / "config.json" for part in ("vae", "transformer"))
    if vae.is_file() and transformer.is_file():
        vae, patch = read_config(vae), read_config(transformer).get("patch_size")
        if isinstance(patch, list) and {"scale_factor_spatial", "scale_factor_temporal"} <= vae.keys():
            _check_multiples(run, vae["scale_factor_spatial"] * patch[-1], vae["scale_factor_temporal"])


def _check_multiples(run: Run, space: int, time: int) -> None:
    """Height and width are multiples of `space`, and frames - 1 is one of `time`."""
    for name, value in (("height", run.height), ("width", run.width)):
        if value % space:
            raise AccelError(f"{name} = {value} is not possible: it must be a multiple of {space}")
    if (run.frames - 1) % time:
        raise AccelError(f"frames = {run.frames} is not possible: it must be 1 more than a multiple of {time}")


class Cancelled(Exception):
    """Raised from a step callback to stop a run."""
