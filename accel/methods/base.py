"""What every method is: a frozen value whose fields are the paper's knobs, with one verb."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, NamedTuple

from pydantic import BaseModel, Field
from torch import Tensor, nn

from ..core.host import Host
from ..core.trace import Trace
from ..families import Family
from ..students.loading import weight_bytes


class RunSpec(NamedTuple):
    """A run as it is known before it begins."""

    model: nn.Module  # the denoiser
    family: Family
    latents: Tensor  # (b, c, f, h, w): a shape and a dtype
    count: int  # of steps
    guided: bool
    num_layers: int  # video self-attentions of the denoiser
    model_path: str = "nowhere"  # the pipeline's folder or name, beside which students lie


def model_path(host: Host) -> str:
    """A pipeline's folder or name; one that was built in memory has none."""
    return host.pipe.name_or_path or "nowhere"


def run_spec(host: Host) -> RunSpec:
    """A run that begins now, as it was known before."""
    guided = host.family.is_guided(host.pipe)
    model, num_layers = host.denoisers[host.active_index], len(host.attentions[host.active_index])
    return RunSpec(model, host.family, host.latents, host.step.count, guided, num_layers, model_path(host))


Choices = list | tuple[float, float]  # values of a knob, or the lowest and the highest


class Method(BaseModel, frozen=True, extra="forbid"):
    """A reversible change to how a denoiser is evaluated.

    Knobs are `Field(default, ge=, le=, multiple_of=, description=)`: widgets, flags, preset checks and the README's
    table are made from them; one with `json_schema_extra={"page": False}` is for presets and code, not for visitors.
    `neutral` lists the settings at which the output is bitwise the baseline's.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    neutral: ClassVar[dict]

    @classmethod
    def parameters(cls) -> dict[str, dict]:
        """The JSON schema of each knob that the page shows."""
        return {k: v for k, v in cls.model_json_schema()["properties"].items() if v.get("page", True)}

    @classmethod
    def available_values(cls, model: str | Path) -> dict[str, Choices]:
        """The values that some knobs have for a model's folder, where fewer than all; an empty list: it has none."""
        return {}

    def weights_dir(self, model: str | Path) -> Path | None:
        """Of what was trained for this method and a model, where it needs that."""
        return None

    def files(self, model: str | Path) -> list[Path]:
        """What it reads for a model beside the model's own files."""
        weights_dir = self.weights_dir(model)
        return sorted(p for p in weights_dir.glob("*") if p.is_file()) if weights_dir else []

    def required_settings(self) -> dict[str, float]:
        """The settings that a run must have for this method: `steps`, `guidance`; nothing for most."""
        return {}

    def estimate_memory(self, spec: RunSpec) -> int:
        """Bytes that a run of `count` steps on latents (b, c, f, h, w) will hold at most, known before it starts."""
        return 0

    def inactive_reason(self, spec: RunSpec) -> str:
        """Why it cannot save anything in a run, as far as that is known before it starts; empty if it may."""
        return ""

    @contextmanager
    def apply(self, host: Host, trace: Trace) -> Iterator[None]:
        """Wrap the host's places; everything is back on exit, also on error."""
        raise NotImplementedError
        yield


def student_field():
    """The knob that names another student than the one beside the model."""
    return Field("", description="Folder of a student; empty: beside the model.", json_schema_extra={"page": False})


class StudentMethod(Method):
    """A method that runs a student in the denoiser's place; its knobs have `steps` (0: no student) and `student`."""

    def default_dir(self, model: str | Path) -> Path:
        """The folder of its student beside a model."""
        raise NotImplementedError

    def weights_dir(self, model: str | Path) -> Path | None:
        """The student's."""
        return (Path(self.student) if self.student else self.default_dir(model)) if self.steps else None

    def estimate_memory(self, spec: RunSpec) -> int:
        """The weights that wait while the student's are in their place."""
        return weight_bytes(self.weights_dir(spec.model_path), spec.model) if self.steps else 0
