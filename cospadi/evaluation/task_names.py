"""Which lm-eval tasks there are, found without importing lm-eval."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

from cospadi.errors import UserError
from cospadi.evaluation import kick
from cospadi.evaluation.settings import EMBEDDED_TASKS, EvaluationConfig

KICK = Path(kick.__file__).parent
"""Tasks of the project in lm-eval's own form."""
_NAMED = re.compile(rb"""^["']?(task|group)["']?[ ]*:[ ]*["']?([^\s"'#]+)["']?[ ]*\r?$""", re.MULTILINE)


@functools.cache
def stock_tasks() -> dict[str, Path]:
    """Names of lm-eval's stock tasks and of ours in ``kick``, and the files that define them, without importing lm-eval (2 s; its
    index takes 15 s).

    Groups (``mmlu``), tags (``ai2_arc``) and a few tasks written in Python are not among them.
    """
    return stock_names()["task"]


@functools.cache
def stock_names() -> dict[str, dict[str, Path]]:
    """Names of tasks and of groups that have a file of their own."""
    root = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    names: dict[str, dict[str, Path]] = {"task": {}, "group": {}}
    for path in [*sorted(KICK.glob("*.yaml")), *sorted(root.glob("**/*.yaml"), key=Path.as_posix)]:
        named = dict(_NAMED.findall(path.read_bytes()))
        kind = "group" if b"group" in named else "task"
        if name := named.get(kind.encode()):
            names[kind].setdefault(name.decode(), path)
    return names


@functools.cache
def stock_manager() -> Any:
    from lm_eval.tasks import TaskManager

    print("Reading lm-eval's index of groups and tags (about 15 s)", flush=True)
    return TaskManager()


def check_tasks(config: EvaluationConfig) -> None:
    """Refuse task names that nobody knows, before anything runs.

    Raises:
        UserError: naming the closest known names.
    """
    for name in config.tasks:
        if not any(name in names for names in stock_names().values()) and name not in stock_manager().all_tasks:
            near = difflib.get_close_matches(name, {*stock_manager().all_tasks, *stock_tasks(), *EMBEDDED_TASKS}, n=4)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise UserError(
                f"evaluation.tasks: lm-eval {importlib.metadata.version('lm_eval')} has no task {name}.{hint} "
                "All names: lm-eval ls tasks."
            )
