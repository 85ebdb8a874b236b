"""Endpoints for programs: a refused argument gives its caller the sentence, any other error only an id."""

from __future__ import annotations

import functools
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from accel.errors import AccelError
from ui.panels import unexpected

log = logging.getLogger(__name__)


def add_endpoint(function: Callable[..., Any], name: str = "") -> None:
    """Register a typed, documented function, or a generator of results, under a name; default: its own.

    Call it inside a `gr.Blocks`.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def endpoint(*args: Any) -> Iterator[Any]:
            with told_errors(function.__name__):
                yield from function(*args)
    else:

        @functools.wraps(function)
        def endpoint(*args: Any) -> Any:
            with told_errors(function.__name__):
                return function(*args)

    gr.api(endpoint, api_name=name or function.__name__, concurrency_limit=None)


@contextmanager
def told_errors(name: str) -> Iterator[None]:
    """Turns exceptions into what the caller of an endpoint is told."""
    try:
        yield
    except gr.Error:
        raise
    except AccelError as error:
        raise gr.Error(str(error), print_exception=False) from None
    except Exception:
        error_id = secrets.token_hex(4)
        log.exception("endpoint %s failed, error %s", name, error_id)
        raise gr.Error(unexpected(error_id), print_exception=False) from None
