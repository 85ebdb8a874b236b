"""What all tabs of the page share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import gradio as gr

from accel.runtime.models import ModelDefaults, read_defaults
from ui.reference_cache import ReferenceCache

if TYPE_CHECKING:
    from ui.model_list import ModelChoice
    from ui.store import Store
    from ui.worker import Work, Workers


@dataclass
class Context:
    """The server's first model, its workers, the store of finished pairs, the models to choose from, and its caches."""

    model: str
    workers: Workers
    store: Store
    models: list[ModelChoice] = field(default_factory=list)
    references: ReferenceCache = field(default_factory=ReferenceCache)
    owner_key: str = ""  # "?owner=KEY" in the address shows and deletes the pairs of all visitors; "": nobody may

    def missing(self, model: str) -> str:
        """Why a model of the selector cannot run here, in a sentence; empty if it can."""
        return next((choice.reason for choice in self.models if choice.id == model), "")

    def defaults(self, model: str) -> ModelDefaults:
        """What a model generates by default; of one that is not loaded and does not say so, what Wan does."""
        loaded = self.workers.pipeline(model)
        return loaded[1] if loaded else read_defaults(model) or ModelDefaults()

    def is_owner(self, request: gr.Request) -> bool:
        """Whether the address of a request has the owner's key."""
        key = request.query_params.get("owner", "")
        return bool(self.owner_key) and secrets.compare_digest(key.encode(), self.owner_key.encode())


def compare_work(context: Context, visitor: str, settings: dict, reference: dict, candidate: dict) -> Work:
    """The work of a `CompareJob`, which is imported by the worker: two threads must not import diffusers at once."""

    def work(job, pipe, defaults) -> None:
        from ui.compare_job import CompareJob

        CompareJob(context, visitor, settings, reference, candidate)(job, pipe, defaults)

    return work
