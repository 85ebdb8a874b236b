"""The parts of the page; `app.py` puts them together."""
