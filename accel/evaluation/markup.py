"""HTML and SVG from the Jinja2 templates in `templates/`; every value is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


@cache
def _templates() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent / "templates")
    return Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, **values: Any) -> Markup:
    """`templates/TEMPLATE.html` with its values. It is marked as safe, so other templates take it unescaped."""
    return Markup(_templates().get_template(f"{template}.html").render(values))
