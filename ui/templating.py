"""HTML from the Jinja2 templates in `ui/templates`; every value is escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def render(template: str, **values: Any) -> Markup:
    """HTML of `templates/TEMPLATE.html`. It is marked as safe, so another template takes it as a value unescaped."""
    return Markup(TEMPLATES.get_template(f"{template}.html").render(values))
