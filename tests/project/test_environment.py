"""One environment, three files: they agree, and the code is clean."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]
CONDA_LINES = [line for line in CONDA["dependencies"] if isinstance(line, str)]
REQUIRED = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
]


def test_conda_takes_the_packages_from_pip_with_the_same_pins():
    (pip,) = [line["pip"] for line in CONDA["dependencies"] if isinstance(line, dict)]
    assert pip == ["--constraint constraints.txt", "--editable .[dev]"]
    assert "dev" in PROJECT["optional-dependencies"]
    assert CONDA["name"] == PROJECT["name"]


def test_conda_and_pip_allow_the_same_pythons():
    (line,) = [line for line in CONDA_LINES if re.match(r"python\b", line)]
    conda, pip = SpecifierSet(line.removeprefix("python")), SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 20)]
    assert [m for m in minors if m in conda] == [m for m in minors if m in pip]
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in pip


@pytest.mark.parametrize("line", CONDA_LINES)
def test_conda_understands_every_line(line):
    from rattler import MatchSpec

    assert MatchSpec(line).name.normalized == re.match(r"[\w-]+", line)[0]


def test_pins_are_exact_and_of_packages_that_are_required():
    required = {canonicalize_name(requirement.name): requirement for requirement in REQUIRED}
    assert "torch==2.13.0" in map(str, CONSTRAINTS)
    for pin in CONSTRAINTS:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert specifier.version in required[canonicalize_name(pin.name)].specifier


@pytest.mark.parametrize("requirement", [r for r in REQUIRED if not r.marker or r.marker.evaluate()], ids=str)
def test_what_is_installed_is_what_is_required(requirement):
    from importlib.metadata import version

    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["snakefmt", "--check", "Snakefile", "workflow"],
        ["lint-imports"],
    ],
    ids=" ".join,
)
def test_the_code_is_formatted_and_clean(command):
    program = Path(sys.executable).parent / command[0]
    run = subprocess.run([program, *command[1:]], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.xdist_group("any")
def test_tests_of_a_group_stay_on_one_worker(request):
    """They share a finished run, and xdist knows a group by the end of a test's name."""
    alone = not hasattr(request.config, "workerinput")
    assert alone or request.node.nodeid.endswith("@any")
