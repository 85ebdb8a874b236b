"""A stand-in for `app.Page`: a text that is shown again, and a file that can be uploaded."""

from __future__ import annotations

import gradio as gr


class SmallPage:
    css = ""
    theme = staticmethod(gr.themes.Base)

    def __init__(self, context):
        self.context = context

    def build(self) -> gr.Blocks:
        with gr.Blocks(analytics_enabled=False) as self.demo:
            box, shown, file = gr.Textbox(), gr.Textbox(), gr.File()
            box.submit(lambda text: text, box, shown, api_name="echo")
            file.upload(lambda file: "", file, shown, api_name="upload")
        return self.demo

    def routes(self) -> list:
        return []
