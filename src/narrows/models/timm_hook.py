"""Our models in timm's registry, whichever of the two is imported first, without importing timm.

`import narrows` must stay cheap, and timm is no dependency of it. Where timm is loaded already, models are registered
at once; otherwise a finder waits in `sys.meta_path` for the import of timm and registers them at its end.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_in_timm() -> None:
    """Register now, or as soon as timm is imported."""
    if "timm" in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenTimmIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenTimmIsImported())


class _WhenTimmIsImported(MetaPathFinder):
    """Finds timm as the other finders do, and has it registered with when it has run."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname != "timm":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec: ModuleSpec | None = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = run_and_register
        return spec


def _register() -> None:
    from narrows.models.sepvit import timm_models

    timm_models.register()
