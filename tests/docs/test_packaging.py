"""The wheel has what the code reads, and its dependencies allow the pinned versions."""

import runpy
import shutil
import tomllib

from packaging.requirements import Requirement

from accel.runtime import paths

PROJECT = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())
PINS = (Requirement(line) for line in (paths.ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#")
PINNED = {pin.name: str(pin.specifier).removeprefix("==") for pin in PINS}


def test_every_dependency_allows_the_pinned_version():
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        assert requirement.specifier.contains(PINNED[requirement.name]), requirement.name


def test_the_wheel_packs_what_exists():
    packed = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert all((paths.ROOT / source).exists() for source in packed)
    data = {target.removeprefix("accel/_data/") for target in packed.values()} - {"app.py"}
    assert data == {"presets", "models/tiny-wan", "examples/prompts", "examples/runs"}


def test_an_installed_package_finds_its_own_data(tmp_path):
    module = tmp_path / "site-packages" / "accel" / "runtime" / "paths.py"
    module.parent.mkdir(parents=True)
    shutil.copy(paths.__file__, module)
    assert runpy.run_path(str(module))["ROOT"] == tmp_path / "site-packages"
    (module.parents[1] / "_data").mkdir()
    assert runpy.run_path(str(module))["ROOT"] == module.parents[1] / "_data"
