"""The page of settings, made from the fields of the settings classes and their docstrings when the site is built."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """MkDocs calls this once the pages are known: one more is added."""
    files.append(File.generated(config, "settings.md", content=page()))
    return files


def page() -> str:
    """The page as Markdown: a table per settings class, room by room."""
    parts = [
        "# Settings",
        "Every setting with its default. `conf/` holds other values; a key that is not here is refused.",
    ]
    classes = [
        node
        for file in [*sorted(ROOT.glob("cospadi/*/settings.py")), ROOT / "cospadi" / "settings.py"]
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]
    prefixes = _prefixes(classes)
    parts += [_section(node, prefixes.get(node.name)) for node in classes]
    return "\n\n".join(parts) + "\n"


def _prefixes(classes: list[ast.ClassDef]) -> dict[str, str]:
    """What stands before the name of a setting: ``CoSpaDiConfig`` -> ``factorization``."""
    (root,) = [node for node in classes if node.name == "Config"]
    prefixes = {
        ast.unparse(field.annotation): field.target.id for field in root.body if isinstance(field, ast.AnnAssign)
    }
    for node in classes:  # a class comes after the one it inherits from
        for base in node.bases:
            if ast.unparse(base) in prefixes:
                prefixes.setdefault(node.name, prefixes[ast.unparse(base)])
    return prefixes


def _section(node: ast.ClassDef, prefix: str | None) -> str:
    """A class: what it is, and its own fields."""
    inherits = ", ".join(ast.unparse(base) for base in node.bases)
    lines = [f"## {node.name}", "", ast.get_docstring(node) or ""]
    if prefix:
        lines += ["", f"Written as `{prefix}.<setting>`."]
    if inherits:
        lines += ["", f"With all settings of {inherits}."]
    rows = [
        _row(field, node.body[place + 1 :]) for place, field in enumerate(node.body) if isinstance(field, ast.AnnAssign)
    ]
    if rows:
        lines += ["", "| Setting | Meaning | Type | Default |", "| :-- | :-- | :-- | :-- |", *rows]
    return "\n".join(lines)


def _row(field: ast.AnnAssign, after: list[ast.stmt]) -> str:
    default = "" if field.value is None else ast.unparse(field.value)
    default = "required" if default == "MISSING" else _code(_default(field.value)) if default else ""
    meaning = _docstring(after[0]).replace("|", "\\|") if after else ""
    return "| " + " | ".join([f"`{field.target.id}`", meaning, _code(ast.unparse(field.annotation)), default]) + " |"


def _code(text: str) -> str:
    """Code in a table's cell. Markdown prints the backslash of an escaped ``|`` between backticks, so HTML says it."""
    return f"<code>{text.replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def _default(value: ast.expr) -> str:
    """What a field is without a value; of ``field(default_factory=lambda: …)`` what the function makes."""
    if isinstance(value, ast.Call) and value.keywords:
        factory = ast.unparse(value.keywords[0].value)
        return {"list": "[]", "dict": "{}"}.get(factory) or factory.removeprefix("lambda: ")
    return ast.unparse(value)


def _docstring(node: ast.stmt) -> str:
    is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return " ".join(node.value.value.split()) if is_text else ""
