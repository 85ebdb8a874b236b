"""Endpoints for programs: a refused argument gives its caller the sentence, any other error only an id."""

from __future__ import annotations

import functools
import logging
import secrets
from collections.abc import Callable
from typing import Any

import gradio as gr

from accel.errors import AccelError

log = logging.getLogger(__name__)


def add_endpoint(function: Callable[..., Any]) -> None:
    """Register a typed, documented function under its own name; call it inside a `gr.Blocks`."""

    @functools.wraps(function)
    def endpoint(*args: Any) -> Any:
        try:
            return function(*args)
        except AccelError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except Exception:
            error_id = secrets.token_hex(4)
            log.exception("endpoint %s failed, error %s", function.__name__, error_id)
            text = f"An unexpected error occurred. The server's log has it as error {error_id}."
            raise gr.Error(text, print_exception=False) from None

    gr.api(endpoint, api_name=function.__name__, concurrency_limit=None)
