"""Plans kept between runs, found again by what they were made from.

A plan's file is named by a hash of the program, the cluster, the request and this package's own source, so nothing
that could change the plan leaves it in place. Files are plans like any other: read back they are checked, by the price
of what they run, and one that can't be read or claims another is made anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from functools import cache
from pathlib import Path

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.passes.decision import Context
from autopar.plan import Plan
from autopar.planner import Report, Request, check_kept, moment_by_moment, program_key, solve

FOLDER = "AUTOPAR_CACHE"
"""The environment variable that names the folder; `off` keeps nothing."""


def solve_or_recall(ctx: Context, cluster: Cluster, request: Request, report: Report = lambda _: None) -> Plan:
    """The plan that `solve` finds, from the folder of earlier ones where it is there. Raises as `solve` does."""
    path = place(ctx, cluster, request)
    if path is None:
        return _solved(ctx, cluster, request, report)
    with contextlib.suppress(AutoparError):
        if path.exists():
            found = dataclasses.replace(Plan.load(path), model=request.model)
            check_kept(found, ctx, cluster)
            report(f"plan {path.stem}, made before ({FOLDER}=off plans anew)")
            return found
    found = _solved(ctx, cluster, request, report)
    if found.status == "Optimal":
        with contextlib.suppress(AutoparError, OSError):  # a folder that can't be written only costs time
            path.parent.mkdir(parents=True, exist_ok=True)
            found.save(path)
    return found


def _solved(ctx: Context, cluster: Cluster, request: Request, report: Report) -> Plan:
    """The plan, its memory told moment by moment."""
    found = solve(ctx, cluster, request, report)[0]
    report("telling its memory")
    return moment_by_moment(found, ctx, cluster)


def place(ctx: Context, cluster: Cluster, request: Request) -> Path | None:
    """Where the plan for a request is kept, None for nowhere."""
    folder = kept_in("plans")
    if folder is None:
        return None
    asked = {**dataclasses.asdict(request), "model": None}
    made_from = (program_key(ctx), cluster.key(), json.dumps(asked, sort_keys=True), source_key())
    return folder / f"{hashlib.sha256(' '.join(made_from).encode()).hexdigest()[:16]}.json"


def kept_in(part: str) -> Path | None:
    """The folder of what is kept of a kind, None where nothing is."""
    folder = os.environ.get(FOLDER, "")
    if folder == "off":
        return None
    root = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "autopar"
    return root / part


@cache
def source_key() -> str:
    """A hash of this package's source."""
    found, root = hashlib.sha256(), Path(__file__).parent
    folders = [root, *(folder for folder in sorted(root.iterdir()) if folder.is_dir())]
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        found.update(path.read_bytes())
    return found.hexdigest()
