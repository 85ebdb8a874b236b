"""Contact sheets for a model card: held-out prompts of the toy world, by the base model and by its students.

python -m docs.make_sheets MODEL [SHEET ...] writes docs/images/NAME-SHEET.jpg for the sheets named, or all that the
model has students for: sixteen prompts, two in a row, every fourth frame of each. Nothing is selected.
"""

import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from tqdm import tqdm

from accel.evaluation.suites import PROMPT_SEED, Setting
from accel.runtime.generate import generate
from accel.runtime.models import load_pipeline, model_defaults, resolve
from accel.runtime.paths import ROOT
from accel.runtime.run import build_run
from accel.world.scene import held_out_prompts
from docs.names import check_names

SHEETS = {
    "base": Setting(),
    "gpd": Setting("gpd"),
    "meanflow": Setting("meanflow", overrides={"meanflow": {"steps": 10}}),
}
PROMPTS = 16  # the first ones of the list that results are reported on
EVERY = 4  # frames


def sheet(pipe, model: str, setting: Setting) -> np.ndarray:
    """An image (h, w, 3) of the prompts' videos by a setting, two prompts in a row."""
    defaults, settings = model_defaults(pipe, model), setting.settings()
    strips = []
    for prompt in tqdm(held_out_prompts(PROMPTS, PROMPT_SEED)):
        run = build_run(defaults, model=model, prompt=prompt, seed=0, **settings)
        strips.append(np.concatenate(list(generate(run, pipe, defaults).frames[::EVERY]), 1))
    return np.concatenate([np.concatenate(strips[i : i + 2], 1) for i in range(0, PROMPTS, 2)])


def main() -> None:
    """Write the sheets of the model on the command line."""
    if len(sys.argv) < 2:
        sys.exit("error: which model?")
    check_names(sys.argv[2:], SHEETS)
    model, names = sys.argv[1], sys.argv[2:] or [n for n, s in SHEETS.items() if s.is_available(sys.argv[1])]
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    for name in names:
        file = ROOT / "docs" / "images" / f"{Path(resolve(model)).name}-{name}.jpg"
        iio.imwrite(file, sheet(pipe, model, SHEETS[name]), quality=88)
        print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
