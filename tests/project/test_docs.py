"""The site builds without a warning, and what its pages say can be typed."""

import ast
import doctest
import importlib.util
import inspect
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from cospadi.checkpoint.checksums import CHECKSUMS
from cospadi.checkpoint.layers import SHARES, LowRankLinear, SparseDictionaryLinear, SparsePlusLowRankLinear
from cospadi.checkpoint.specs import LAYER_KINDS
from cospadi.checkpoint.transformers_plugin import FORMAT_VERSION, METHOD
from cospadi.cli import _parser
from cospadi.factorization import cost
from cospadi.factorization.methods import factorize_groups
from cospadi.factorization.settings import METHODS
from cospadi.settings import CONF, Config, load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(language: str) -> list[str]:
    return [
        text for page in PAGES for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language
    ]


def hook(name: str) -> ModuleType:
    """A file of docs/ that MkDocs runs."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_page() -> str:
    return hook("settings_page").page()


API = hook("api_pages")
NOTEBOOKS = hook("notebook_pages")
GENERATED = {
    "settings.md",
    *map(API.page_name, API.ROOMS),
    *map(NOTEBOOKS.page_name, NOTEBOOKS.notebooks()),
}


def test_the_site_builds_without_a_warning_and_shows_all_that_is_public(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "compression_ratio" in (tmp_path / "settings" / "index.html").read_text(encoding="utf-8")
    names = set()
    for room in API.ROOMS:
        page = (tmp_path / API.page_name(room).removesuffix(".md") / "index.html").read_text(encoding="utf-8")
        assert "<blockquote>" not in page, f"{room}: a doctest is shown as a quotation"
        shown = set(re.findall(r'id="(cospadi[\w.]+)"', page))
        names |= {name for name in public_names(room) if name not in shown}
    assert names == set()


def public_names(room: str) -> list[str]:
    """Public functions and classes of a room with their full names."""
    return [
        f"{module}.{node.name}"
        for module in API.modules(room)
        for node in ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def test_every_room_has_a_page_of_its_functions():
    rooms = {file.parent.relative_to(ROOT / "cospadi").as_posix() for file in (ROOT / "cospadi").rglob("__init__.py")}
    assert rooms - set(API.ROOMS) == {
        ".",
        "bench",
        "cli",
        "evaluation/kick",
    }  # commands and tasks, not functions to call
    assert {"cospadi.factorization.budget.rank", "cospadi.kernels.pursuit.pursue"} <= {
        name for room in API.ROOMS for name in public_names(room)
    }


def test_docstrings_become_markdown():
    assert doctest.testmod(API).failed == 0
    text = API.as_markdown("In order::\n\n    a -> b\n\n>>> 1\n1\n\nArgs:\n    x: one.", {}.get)
    assert text == "In order:\n\n    a -> b\n\n~~~python\n>>> 1\n1\n~~~\n\nArgs:\n    x: one."
    links = API.as_markdown("As `htp` and `other`, not ``htp``.", {"htp": "cospadi.htp"}.get)
    assert links == "As [`htp`][cospadi.htp] and `other`, not ``htp``."


def test_every_setting_has_a_row():
    page = settings_page()
    sections = {part.split("\n")[0]: part for part in page.split("\n## ")[1:]}
    rooms = [field.type for field in fields(Config)]
    named = {*(str(room) for room in rooms), *(schema.__name__ for schema in METHODS.values())}
    assert named <= set(sections)
    assert "Written as `calibration.<setting>`" in sections["CalibrationConfig"]
    for schema in METHODS.values():
        assert "Written as `factorization.<setting>`" in sections[schema.__name__]
        for field in inspect.get_annotations(schema):
            assert f"| `{field}` |" in sections[schema.__name__]


def test_every_settings_class_is_on_the_page():
    """Wherever it stands: the page reads settings files alone."""
    classes = {
        node.name: node
        for file in sorted((ROOT / "cospadi").rglob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        and node.name.endswith("Config")
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    }
    sections = {part.split("\n")[0]: part for part in settings_page().split("\n## ")[1:]}
    assert len(classes) > 20
    for name, node in classes.items():
        named = [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
        assert [field for field in named if f"| `{field}` |" not in sections[name]] == [], name


def test_the_readme_is_a_page_and_not_a_paper():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_code_of_the_pages_is_code():
    assert blocks("python")
    for text in blocks("python"):
        ast.parse(text)
    for text in blocks("yaml"):
        assert yaml.safe_load(text)


def test_every_method_has_all_that_a_method_needs():
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    files = {file.stem: file.read_text(encoding="utf-8") for file in (CONF / "factorization").glob("*.yaml")}
    for name, schema in METHODS.items():
        assert factorize_groups.dispatch(schema) is not factorize_groups.dispatch(object), (
            f"{name} has no function in methods.py"
        )
        assert f"{name}_schema" in "".join(files.values()), f"{name} has no file in conf/factorization"
    for name in files:
        config = load([f"factorization={name}"]).factorization
        assert cost.factorize(config, 64, 64) is not None
        assert f"`{name}`" in methods, f"{name} has no row in docs/methods.md"


def test_the_files_that_recipes_name_exist():
    recipes = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:cospadi|conf|docs)/[\w/.]+)`", recipes)
    assert len(named) > 12
    assert [file for file in named if not (ROOT / file).exists()] == []


def test_studies_and_commands_that_are_named_exist():
    (stages,) = [action for action in _parser()._actions if action.dest == "==SUPPRESS==" and action.choices]
    text = "\n".join([*blocks(""), *blocks("bash"), *blocks("sh")])
    commands = re.findall(r"^cospadi ([a-z-]+)", text, re.MULTILINE)
    assert len(commands) > 5
    assert set(commands) <= set(stages.choices)
    studies = set(re.findall(r"\bstudy=([a-z_]+)", text)) - {"mine"}  # the one that a page shows how to write
    assert studies
    assert studies <= {file.stem for file in (CONF / "study").glob("*.yaml")}


def test_make_targets_that_are_named_exist():
    targets = re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(named) > 3
    assert named <= set(targets)


def test_notebooks_are_pages_with_their_code():
    for notebook in NOTEBOOKS.notebooks():
        page = NOTEBOOKS.page(notebook)
        assert page.startswith("# ")
        assert f"`notebooks/{notebook.name}`" in page
        for code in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
            ast.parse(code)
            assert code.strip() in notebook.read_text(encoding="utf-8")


def numbers(page: str) -> list[tuple[str, str]]:
    """Tables with right-aligned columns, which hold numbers, and the paragraph after each."""
    parts = re.split(r"\n\n+", page)
    return [(table, after) for table, after in zip(parts, [*parts[1:], ""], strict=True) if "| --: |" in table]


@pytest.mark.parametrize("name", ["bench", "methods", "paper-models", "quantization", "results", "sharing", "tutorial"])
def test_every_table_of_numbers_says_where_it_comes_from(name):
    tables = numbers((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8"))
    assert tables
    for table, after in tables:
        source = re.fullmatch(r"\*(.+)\*", after, re.DOTALL)
        assert source, f"{table.splitlines()[0]} is followed by {after!r}"
        assert "ommit" in source[1]
        assert re.search(r"`[0-9a-f]{7}`", source[1])


def test_every_section_of_the_solver_log_says_where_it_comes_from():
    sections = (ROOT / "docs" / "solver-log.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(sections) > 5
    for section in sections:
        assert re.match(r"[^\n]+\n\n\*Entered in `[0-9a-f]{7}`", section), section.split("\n")[0]


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = GENERATED | {page.name for page in (ROOT / "docs").glob("*.md")}
    assert [page for page in sorted(pages) if f": {page}\n" not in menu] == []


def test_the_file_format_page_names_what_a_checkpoint_holds():
    page = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")
    assert f"| {FORMAT_VERSION} | `formats` |" in page
    assert f"| {FORMAT_VERSION + 1} |" not in page
    for word in (METHOD, CHECKSUMS, SHARES, *LAYER_KINDS):
        assert f"`{word}`" in page, word
    formats = {"values": ("int4", 32)}
    layers = [
        LowRankLinear(8, 8, 2, "float16"),
        SparseDictionaryLinear(8, 8, 2, 4, "float16", value_bits=4, formats=formats),
        SparsePlusLowRankLinear(8, 8, 2, 4, "float16"),
    ]
    for layer in layers:
        words = [*layer.spec, *layer.state_dict()]
        assert [word for word in words if f"`{word}" not in page and not word.endswith("_scales")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or link in GENERATED or (page.parent / link).exists(), link
