"""Plans and runs the parallel training of a plain PyTorch model on a measured cluster.

Names are imported when they are first used, so that planning costs no more than it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import compile, plan
    from autopar.core.cluster import Cluster
    from autopar.core.errors import AutoparError
    from autopar.launch import init
    from autopar.passes.capture import capture
    from autopar.plan import Plan
    from autopar.planner import verify

__version__ = "0.1.0"
_HOMES = {
    "AutoparError": "core.errors", "Cluster": "core.cluster", "Plan": "plan", "capture": "passes.capture",
    "compile": "api", "init": "launch", "plan": "api", "verify": "planner",
}
__all__ = ["AutoparError", "Cluster", "Plan", "capture", "compile", "init", "plan", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autopar.{_HOMES[name]}"), name)
