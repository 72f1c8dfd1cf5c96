"""What invites people in is true: contributing, security, settings, workflows and forms."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = ["CONTRIBUTING.md", "SECURITY.md", "conf/README.md"]
WORKFLOWS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(".github/workflows/*.yml"))
FORMS = [".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"]
OTHERS = [".github/ISSUE_TEMPLATE/config.yml", ".pre-commit-config.yaml", ".snakemake-workflow-catalog.yml"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
MODULES = sorted((ROOT / "cospadi").rglob("*.py"))


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """Make targets that a page calls: in a block, between backticks, or after ``run:``."""
    return re.findall(r"(?:^\s*|`|run: )make ([a-z][a-z-]*)", page, re.MULTILINE)


@pytest.mark.parametrize("path", [*WORKFLOWS, *FORMS, *OTHERS])
def test_yaml_is_a_mapping(path):
    assert isinstance(yaml.safe_load(text(path)), dict)


@pytest.mark.parametrize("path", ["CONTRIBUTING.md", ".github/workflows/tests.yml"])
def test_make_targets_exist(path):
    named = commands(text(path))
    assert named
    assert set(named) <= TARGETS


def test_no_page_calls_a_target_that_is_not_there():
    for path in [*PAGES, *WORKFLOWS, *FORMS, *OTHERS]:
        assert set(commands(text(path))) <= TARGETS, path


def test_every_target_but_plain_ones_is_explained_by_make_help():
    explained = set(re.findall(r"^# make ([a-z-]+)", text("Makefile"), re.MULTILINE))
    assert {"reproduce", "notebooks", "test", "test-fast"} <= explained <= TARGETS


@pytest.mark.parametrize("path", PAGES)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", text(path))
    assert links
    for link in links:
        if not link.startswith("http"):
            assert ((ROOT / path).parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("path", PAGES)
def test_anchors_are_headings_of_their_page(path):
    for target, anchor in re.findall(r"\]\(([^)#\s]+)#([^)\s]+)\)", text(path)):
        page = ((ROOT / path).parent / target).read_text(encoding="utf-8")
        headings = [h.lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", page, re.MULTILINE)]
        assert anchor in headings, anchor


def test_the_settings_page_names_every_file_under_its_folder():
    page = text("conf/README.md")
    rooms = re.split(r"^### `(\w+)/`", page, flags=re.MULTILINE)
    named = {
        f"{room}/{file}"
        for room, part in zip(rooms[1::2], rooms[2::2], strict=True)
        for file in re.findall(r"^\| `(\w+\.yaml)` \| .+ \|$", part, re.MULTILINE)
    }
    conf = ROOT / "conf"
    assert named == {path.relative_to(conf).as_posix() for path in conf.glob("*/*.yaml")}
    assert "`config.yaml`" in page


def test_contributing_is_short():
    assert len(text("CONTRIBUTING.md").splitlines()) < 120


@pytest.mark.parametrize("path", WORKFLOWS)
def test_workflows_end_and_may_only_read(path):
    workflow = yaml.safe_load(text(path))
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())


def test_workflows_run_pythons_that_are_supported():
    from packaging.specifiers import SpecifierSet

    supported = SpecifierSet(re.search(r'requires-python = "(.+)"', text("pyproject.toml"))[1])
    pythons = yaml.safe_load(text(".github/workflows/tests.yml"))["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all(python in supported for python in pythons)
    assert min(pythons, key=lambda python: int(python.partition(".")[2])) == "3.11"


def test_workflows_call_modules_that_exist():
    imported = re.findall(r"from cospadi import (\w+); (\w+)\.(\w+)\(", "".join(map(text, WORKFLOWS)))
    assert imported
    for module, name, function in imported:
        assert module == name
        assert hasattr(importlib.import_module(f"cospadi.{module}"), function)


@pytest.mark.parametrize("path", FORMS)
def test_forms_have_what_github_asks_for(path):
    form = yaml.safe_load(text(path))
    assert form["name"]
    assert form["description"]
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for part in form["body"]:
        assert part["type"] in {"markdown", "textarea", "input", "dropdown", "checkboxes"}
        assert part["attributes"]["value" if part["type"] == "markdown" else "label"]


def test_hooks_run_programs_of_the_environment_that_are_pinned():
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"
    programs = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert programs == {".venv/bin/ruff", ".venv/bin/snakefmt"}
    for program in programs:
        assert re.search(rf"^{Path(program).name}==", text("constraints.txt"), re.MULTILINE)


def test_the_catalog_is_told_what_the_rules_need():
    said = yaml.safe_load(text(".snakemake-workflow-catalog.yml"))["usage"]["software-stack-deployment"]
    rules = "\n".join(
        path.read_text(encoding="utf-8") for path in [ROOT / "Snakefile", *ROOT.glob("workflow/**/*.smk")]
    )
    assert said["conda"] == bool(re.search(r"^\s+conda:", rules, re.MULTILINE))
    assert said["apptainer"] == bool(re.search(r"^\s+container:", rules, re.MULTILINE))
    assert said["report"] == ("report(" in rules)


def test_no_module_reads_pickles_or_trusts_code_of_a_model():
    """As SECURITY.md says; the stub and the help name the option for other programs."""
    for path in MODULES:
        code = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(import|from) (pickle|dill|cloudpickle|joblib)\b", code, re.MULTILINE), path
        assert not re.search(r"\btorch\.load\(|allow_pickle|\byaml\.(load|unsafe_load|full_load)\(", code), path
        if path.name not in {"write.py", "model.py"}:
            assert "trust_remote_code" not in code, path
