"""Loads pipelines and presets, generates videos and writes them."""
