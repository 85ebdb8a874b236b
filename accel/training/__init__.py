"""Trains the shipped weights and the students of other models: `python -m accel train ...`.

Only the command line imports this package.
"""
