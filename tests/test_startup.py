"""Importing accel, its help and its refusals load no heavy library: they must answer within a second."""

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "diffusers", "transformers", "peft", "scipy", "skimage", "gradio", "matplotlib", "imageio"}
COMMAND = """
import json, sys
sys.argv = ["accel", *{arguments!r}]
try:
    from accel.cli import main
    main()
except SystemExit as ended:
    code = ended.code
print(json.dumps([code, sorted(set(sys.modules) & set({heavy!r}))]))
"""


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


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_loads_no_heavy_library(arguments):
    assert loaded(COMMAND.format(arguments=arguments, heavy=sorted(HEAVY))) == [0, []]


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_before_a_heavy_library_is_loaded(arguments):
    assert loaded(COMMAND.format(arguments=arguments, heavy=sorted(HEAVY))) == [2, []]
