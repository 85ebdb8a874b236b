"""The command line. Progress goes to stderr, text to stdout; the last line of stdout is one JSON document."""

# Torch takes seconds to import, so commands import it after their arguments are checked (tests/test_startup.py).

from __future__ import annotations

import sys

import typer
from typer.exceptions import TyperException

from ..errors import AccelError, explain_os_error
from ..runtime.cpu_quota import limit_threads
from .measurements import bench, docs, gpu, sweep, tune
from .options import INTERRUPTED
from .preparation import calibrate, fit, profile, train
from .toy_world import judge, sample
from .videos import compare, report, run

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help=__doc__)
world = typer.Typer(no_args_is_help=True, help="The captioned toy world: render samples, judge videos.")
for command in (run, compare, report, bench, tune, sweep, profile, calibrate, fit, gpu, docs, train):
    app.command()(command)
for command in (sample, judge):
    world.command()(command)
app.add_typer(world, name="world")


def main() -> None:
    """Run a command. Bad input ends with one line on stderr and exit code 2, what the machine lacks with 1, a stop with
    130.
    """
    limit_threads()
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            _fail("stopped", code)
        sys.exit(code if isinstance(code, int) else 0)
    except TyperException as error:  # wrong arguments; without arguments its text is the help
        text = error.format_message()
        print(text if "Usage:" in text else f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except AccelError as error:
        _fail(str(error), 1 if getattr(error.__cause__, "errno", None) else 2)  # the system's refusal, or bad input
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        _fail(explain_os_error(error), 2)
    except OSError as error:
        _fail(explain_os_error(error), 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not have been imported
            raise
        _fail("the GPU has too little memory for this run: make the video smaller, or choose methods that hold less", 1)


def _fail(sentence: str, code: int) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(code)
