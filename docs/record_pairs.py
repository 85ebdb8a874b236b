"""Records the pairs of examples/runs, which the page offers before anything is computed.

python -m docs.record_pairs [PRESET ...] records the presets named, or all, one after the other. Nothing else should run
on the machine meanwhile, because the page shows the times.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from docs.names import check_names
from ui.recorded import RECORDINGS, RUNS

REPEATS = 1
FILES = ("a.mp4", "b.mp4", "a.jpg", "b.jpg")


def command(preset: str, out: Path) -> list[str]:
    """The command line that generates the pair of a preset."""
    prompt, seed = RECORDINGS[preset]
    options = ["--preset", preset, "--prompt", prompt, "--seed", str(seed), "--repeats", str(REPEATS)]
    return [sys.executable, "-m", "accel", "compare", *options, "--out", str(out)]


def record(preset: str) -> None:
    """Write the folder of a preset's pair. Raises CalledProcessError if the pair could not be generated."""
    with tempfile.TemporaryDirectory(prefix="accel-") as temporary:
        made = Path(temporary)
        subprocess.run(command(preset, made), check=True)
        report = {**json.loads((made / "run.json").read_text()), "measured": time.strftime("%Y-%m-%d")}
        (folder := RUNS / preset).mkdir(parents=True, exist_ok=True)
        for file in FILES:
            shutil.copyfile(made / file, folder / file)
        (folder / "run.json").write_text(json.dumps(report))


def main() -> None:
    """Record the presets named on the command line, or all."""
    names = sys.argv[1:] or list(RECORDINGS)
    check_names(names, RECORDINGS)
    for name in names:
        record(name)


if __name__ == "__main__":
    main()
