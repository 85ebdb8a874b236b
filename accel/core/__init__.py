"""Runs a stock diffusers pipeline under wrappers: host, hooks, attention interface, trace, counted FLOPs."""
