"""HTML whose buttons are events: `<button data-id="...">`."""

from __future__ import annotations

from typing import Any

import gradio as gr

# A button with aria-pressed is a toggle. The event has the ids of all pressed ones, so that quick clicks lose nothing.
ON_LOAD = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-id]');
  if (!button || button.disabled) return;
  if (button.ariaPressed !== null) button.ariaPressed = String(button.ariaPressed !== 'true');
  const pressed = [...element.querySelectorAll('[aria-pressed=true]')].map((other) => other.dataset.id);
  trigger('click', {id: button.dataset.id, pressed});
});
"""


class ClickableHTML(gr.HTML):
    """HTML with buttons. Handlers of `.click` take an `event: gr.EventData`; `event._data` is a dict.

    "id": the `data-id` of the button; "pressed": the ids of all toggles (buttons with `aria-pressed`) that are on.
    """

    def __init__(self, value: str | None = "", **kwargs: Any):
        super().__init__(value, js_on_load=ON_LOAD, **kwargs)
