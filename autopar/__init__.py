"""Plans and runs the parallel training of a plain PyTorch model on a measured cluster.

Names are imported when they are first used, so that planning costs no more than it needs.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import compile, plan
    from autopar.checkpoint import load as load_checkpoint
    from autopar.checkpoint import save as save_checkpoint
    from autopar.core.cluster import Cluster
    from autopar.core.errors import AutoparError
    from autopar.explanation import explain
    from autopar.launch import init
    from autopar.meta_start import empty
    from autopar.passes.capture import capture
    from autopar.plan import Plan
    from autopar.planner import verify

__version__ = "0.1.0"
_HOMES = {
    "AutoparError": "core.errors", "Cluster": "core.cluster", "Plan": "plan", "capture": "passes.capture",
    "compile": "api", "empty": "meta_start", "explain": "explanation", "init": "launch",
    "load_checkpoint": "checkpoint:load", "plan": "api", "save_checkpoint": "checkpoint:save", "verify": "planner",
}
__all__ = ["AutoparError", "Cluster", "Plan", "capture", "compile", "empty", "explain", "init", "load_checkpoint",
           "plan", "save_checkpoint", "verify"]


class _Package(ModuleType):
    """A package whose `plan` is the function, though importing `autopar.plan` would set it to that module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "plan" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    home, _, there = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"autopar.{home}"), there or name)
