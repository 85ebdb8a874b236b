"""How the shipped weights are made: `python -m accel train ...`. Nothing but the command line imports this."""
