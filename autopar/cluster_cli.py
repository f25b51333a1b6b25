"""`autopar-cluster`: exit status 0 when done, 2 when what was asked for can't be done, 1 for faults of ours."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from autopar.console.cluster_options import Measure, parse_options
from autopar.core.errors import AutoparError, RankLost

INTERRUPTED = 130
RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Where launchers say which rank this is; kept equal by a test to the table of `launch`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or show as `arguments` say, and return the exit status. SystemExit after `--help`."""
    try:
        text = _answer(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except AutoparError as error:
        if _first() or _alone(error):
            print(f"autopar-cluster: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2
    except Exception as error:
        traceback.print_exception(error)
        return 1
    if text:
        print(text, flush=True)
    return 0


def _answer(arguments: Sequence[str] | None) -> str:
    """The text to print."""
    options = parse_options(arguments)
    from autopar.console import cluster_command  # torch comes with it, and mistakes should not wait for it
    return cluster_command.measure(options) if isinstance(options, Measure) else cluster_command.show(options)


def _first() -> bool:
    """Whether this is the rank that speaks for all, as far as the launcher says."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def _alone(error: AutoparError) -> bool:
    """Whether other ranks may not know of `error`: the ranks had not met, or lost one."""
    torch: Any = sys.modules.get("torch")
    return isinstance(error, RankLost) or (torch is not None and not torch.distributed.is_initialized())


if __name__ == "__main__":
    sys.exit(main())
