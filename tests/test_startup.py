"""Importing accel, its help and its refusals load no heavy library: they must answer within a second."""

import json
import subprocess
import sys

HEAVY = {"torch", "diffusers", "transformers", "peft", "scipy", "skimage", "gradio", "matplotlib", "imageio"}
COMMANDS = """
import json, sys
from accel.cli import main
found = []
for arguments in {commands!r}:
    sys.argv = ["accel", *arguments]
    try:
        main()
    except SystemExit as ended:
        found.append([ended.code, sorted(set(sys.modules) & set({heavy!r}))])
print(json.dumps(found))
"""


def ends(commands: list[list[str]]) -> list:
    """Exit code of each command, all in one new interpreter, and the heavy libraries that are loaded after it."""
    return loaded(COMMANDS.format(commands=commands, heavy=sorted(HEAVY)))


def loaded(code: str) -> list:
    """The last line that a new interpreter prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_accel_loads_no_heavy_library():
    code = f"import json, sys, accel; print(json.dumps(sorted(set(sys.modules) & set({sorted(HEAVY)!r}))))"
    assert loaded(code) == []


REFUSED = {
    "unknown preset": ["run", "--prompt", "x", "--preset", "warp"],
    "unknown parameter": ["run", "--prompt", "x", "--set", "fastercache.speed=9"],
    "parameter out of range": ["compare", "--prompt", "x", "--set", "asymrnr.budget=9"],
    "steps that a student does not have": ["run", "--prompt", "x", "--preset", "gpd", "--steps", "20"],
    "wrong size": ["run", "--prompt", "x", "--height", "70"],
    "unknown suite": ["bench", "--suite", "moon"],
    "missing model": ["run", "--prompt", "x", "--model", "models/none"],
    "unknown part": ["train", "moon"],
}


def test_help_loads_no_heavy_library():
    assert ends([["--help"], ["run", "--help"], ["train", "--help"]]) == 3 * [[0, []]]


def test_bad_input_is_refused_before_a_heavy_library_is_loaded():
    assert dict(zip(REFUSED, ends([*REFUSED.values()]))) == dict.fromkeys(REFUSED, [2, []])
