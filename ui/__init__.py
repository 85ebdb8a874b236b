"""The page's parts; only `app.py` puts them together."""
