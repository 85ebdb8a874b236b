"""The names that scripts of this folder are given on the command line."""

import sys
from collections.abc import Iterable, Sequence


def check_names(names: Sequence[str], known: Iterable[str]) -> None:
    """End the program with a sentence for a name that is not known."""
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: {unknown[0]} is not one of {', '.join(known)}")
