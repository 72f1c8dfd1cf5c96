"""What the README says about the repository is true."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> list[str]:
    """Paths of the README's tree: two blanks of indent a level, the name first, folders end in a slash."""
    block = re.search(r"## The tree.*?```\n(.*?)```", README, re.DOTALL)[1]
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        names, indent = line.split("  #")[0].rstrip(), len(line) - len(line.lstrip())
        folders = folders[: indent // 2]
        prefix = "".join(folders)
        for name in names.split():
            paths.append(prefix + name)
        if names.strip().endswith("/") and len(names.split()) == 1:
            folders.append(names.strip())
    return paths


def tracked() -> set[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_everything_in_the_tree_exists():
    assert len(tree()) > 40
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_every_top_level_name_and_every_module_is_in_the_tree():
    try:
        files = tracked()
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("not a git checkout, so there is no list of files to compare the tree with")
    shown = set(tree())
    top = {f.split("/")[0] + ("/" if "/" in f else "") for f in files if not f.startswith(".")}
    modules = {f for f in files if re.fullmatch(r"cospadi/(pipeline/|factorization/)?[a-z_]+\.py", f)}
    modules -= {"cospadi/__main__.py", "cospadi/factorization/__init__.py", "cospadi/pipeline/__init__.py"}
    rooms = {
        re.match(r"(cospadi|conf|workflow)/[a-z_]+/", f)[0]
        for f in files
        if re.match(r"(cospadi|conf|workflow)/\w+/", f)
    }
    assert (top | modules | rooms) - shown == set()


def test_commands_and_links_exist():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in re.findall(r"^make ([a-z]+)", README, re.MULTILINE):
        assert command in targets, command
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link
