"""The arguments of `autopar-cluster`. Nothing here imports torch, so that help and most mistakes take no time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autopar.arguments import read_cluster
from autopar.console.options import Parser, writable
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError

DESCRIPTION = """\
Measure the devices and links of a cluster, or print what is known of one."""
EXAMPLES = """\
examples:
  torchrun --no-python --nproc-per-node 4 autopar-cluster measure --out cluster.json
  autopar-cluster show cluster.json --plot links.png"""
_MEASURE = """\
Measure with the backend that training uses, NCCL where there are GPUs and else gloo. Start it on every rank, by
torchrun, srun or mpirun: one rank a device, at least two. It takes about a minute on four devices."""

PICTURES = (".png", ".pdf", ".svg", ".jpg")
_ENDINGS = f"{', '.join(PICTURES[:-1])} or {PICTURES[-1]}"


@dataclass(frozen=True, slots=True)
class Measure:
    """Measure, and write the cluster to `out`."""

    out: Path
    name: str | None
    json: bool


@dataclass(frozen=True, slots=True)
class Show:
    """Print `cluster`, and draw it in the file `plot`."""

    cluster: Cluster
    plot: Path | None
    json: bool


def parse_options(arguments: Sequence[str] | None = None) -> Measure | Show:
    """What `arguments` ask for, the process's own when None. Raises AutoparError; SystemExit after `--help`."""
    given = vars(_parser().parse_args(arguments))
    kinds: dict[Literal["measure", "show"], type[Measure | Show]] = {"measure": Measure, "show": Show}
    return kinds[given.pop("command")](**given)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("autopar-cluster", description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="measure|show")
    measure = commands.add_parser("measure", help="measure devices and links", description=_MEASURE)
    measure.add_argument("--out", type=Path, required=True, metavar="CLUSTER.JSON", help="the file to write, on rank 0")
    measure.add_argument("--name", metavar="NAME", help="what to call the cluster (default: its devices)")
    measure.add_argument("--json", action="store_true", help="print the file's JSON instead of text")
    show = commands.add_parser("show", help="print devices and links")
    show.add_argument("cluster", type=read_cluster, metavar="CLUSTER.JSON", help="a cluster's file, or a preset")
    show.add_argument("--plot", type=_picture, metavar="FILE.PNG",
                      help=f"also draw the links and collectives, which ends in {_ENDINGS}")
    show.add_argument("--json", action="store_true", help="print the file's JSON instead of text")
    return parser


def _picture(text: str) -> Path:
    """The path of a picture to write. Raises AutoparError."""
    path = writable(text)
    if path.suffix.lower() not in ("", *PICTURES):
        raise AutoparError(f"cannot draw to {path}, needed is a name that ends in {_ENDINGS}, such as links.png")
    return path
