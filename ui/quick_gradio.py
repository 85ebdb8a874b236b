"""Imports Gradio in half the time; import this module before Gradio.

Gradio parses the source of every component once more to write a .pyi file for editors beside it. It writes none for a
class without a source file.
"""

import inspect


def _no_file(_) -> str:
    raise OSError


_getfile, inspect.getfile = inspect.getfile, _no_file
try:
    import gradio.component_meta
finally:
    inspect.getfile = _getfile
gradio.component_meta.create_or_modify_pyi = lambda *_: None  # nor for the page's own components
