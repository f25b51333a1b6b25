"""Where processes that tests start find this project, and what the tests themselves were told of."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
