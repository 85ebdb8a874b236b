"""`python -m accel ...`"""

from .cli import main

main()
