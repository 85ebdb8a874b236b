"""HTML whose buttons are events: `<button data-id="...">`."""

from __future__ import annotations

from typing import Any

import gradio as gr

# A button with aria-pressed is a toggle. The page alone knows which are on: no answer that was under way undoes a quick
# click, and after new HTML the ones that are still there are on again.
ON_LOAD = """
const pressed = new Set();
const toggles = () => [...element.querySelectorAll('[aria-pressed]')];
const show = () => toggles().forEach((toggle) => { toggle.ariaPressed = String(pressed.has(toggle.dataset.id)); });
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-id]');
  if (!button || button.disabled) return;
  const {id} = button.dataset;
  if (button.ariaPressed !== null && !pressed.delete(id)) pressed.add(id);
  show();
  trigger('click', {id});
});
new MutationObserver(() => {
  const there = new Set(toggles().map((toggle) => toggle.dataset.id));
  const gone = [...pressed].filter((id) => !there.has(id));
  gone.forEach((id) => pressed.delete(id));
  show();
  if (gone.length) trigger('click', {id: gone[0]});
}).observe(element, {childList: true, subtree: true});
"""


class ClickableHTML(gr.HTML):
    """HTML with buttons. Handlers of `.click` take an `event: gr.EventData`; `event._data["id"]` is the button's.

    A button with `aria-pressed` is a toggle. One that is on and goes away with new HTML is told as a click, too.
    """

    def __init__(self, value: str | None = "", **kwargs: Any):
        super().__init__(value, js_on_load=ON_LOAD, **kwargs)
