"""Tells transformers of compressed checkpoints as soon as transformers is there, without importing it."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _Watch(MetaPathFinder):
    """Imports `cospadi.checkpoint.transformers_plugin` once the registry that it enters itself into has been imported."""

    def find_spec(self, name, path, target=None):
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("cospadi.checkpoint.transformers_plugin")

        spec.loader.exec_module = execute_and_register
        return spec


def register() -> None:
    """Now, if transformers has been imported; otherwise when it will be: it takes seconds, and most commands need none."""
    if REGISTRY in sys.modules:
        importlib.import_module("cospadi.checkpoint.transformers_plugin")
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
