"""The arguments of `autopar-solve`. Nothing here imports torch, so that help and most mistakes take no time."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from autopar.arguments import read_budget, read_cluster, read_mesh
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from autopar.core.reading import check_path
from autopar.models.catalog import DEFAULT_BATCH, MODELS, check_name

# Kept equal by a test to the tables behind them, which live beside torch or PuLP.
MODES = ("auto", "ddp", "zero1", "zero2", "zero3", "1d", "sequence", "zero+1d", "2d", "2.5d", "3d", "pp", "pp+zero",
         "pp1d", "pp2d", "pp2.5d", "pp3d", "pp+sequence")
OPTIMIZERS = ("adamw", "adam", "sgd", "momentum")
PRECISIONS = ("fp32", "bf16", "bf16-mixed", "fp16-mixed")
SOLVERS = ("cbc", "highs")
HEADS = ("auto", "plain", "chunked")
BATCH_NORMS = ("whole", "micro-batch")

Ranks = tuple[tuple[int, ...], ...]
MOST_COUNTED = 10**9
"""Samples of a batch, tokens of a sample: beyond it sizes of tensors are no numbers that torch can hold."""
_DIGITS = 30
DESCRIPTION = """\
Plan the parallel training of a model on a cluster, and print the plan: how every operation is cut over
the devices, what a step takes and what a device holds. Nothing is trained, downloaded or allocated."""
EXAMPLES = """\
examples:
  autopar-solve --model gpt2 --cluster 8xA100-80GB --batch 64 --seq 1024
  autopar-solve --model my/model.py:build --cluster cluster.json --memory-budget 20GiB --out plan.json"""


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for; None where it leaves the choice to the model, the machine or the search."""

    model: str
    batch: int | None
    seq: int | None
    precision: str
    optimizer: str
    cluster: Cluster | None
    memory_budget: float | None
    mode: str
    mesh: tuple[int, ...] | None
    solver: str
    out: Path | None
    json: bool
    verbose: bool
    modes: bool = False
    explain: str | None = None
    emit: Path | None = None
    pins: tuple[tuple[str, str], ...] = ()
    pp: int | None = None
    dp: int | None = None
    tp: int | None = None
    micro_batches: int | None = None
    timeline: Path | None = None
    ppranks: Ranks | None = None
    dpranks: Ranks | None = None
    head: str = "auto"
    batch_norm: str = "whole"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are AutoparErrors."""

    def error(self, message: str) -> NoReturn:
        raise AutoparError(f"{message}; `{self.prog} --help` tells what there is")


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """The options in `arguments`, the process's own when None. Raises AutoparError; SystemExit after `--help`."""
    given = vars(_parser().parse_args(arguments))
    return Options(**{**given, "pins": tuple(given["pins"])})


def _parser() -> argparse.ArgumentParser:
    parser = Parser("autopar-solve", description=DESCRIPTION, epilog=EXAMPLES, allow_abbrev=False,
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_workload(parser.add_argument_group("what to train"))
    _add_place(parser.add_argument_group("where"))
    _add_search(parser.add_argument_group("how"))
    _add_output(parser.add_argument_group("what comes out"))
    return parser


def _add_workload(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", required=True, type=check_name, metavar="NAME",
                       help=f"one of {', '.join(MODELS)}; or path/to/file.py:factory, a function that returns a module "
                            "(whose forward takes input_ids and labels), (module, inputs) or (module, inputs, loss_fn) "
                            "and is called with batch= and seq= where it takes them")
    group.add_argument("--batch", type=_count, metavar="N",
                       help=f"samples of the global batch (default: {DEFAULT_BATCH}, or a factory's own)")
    group.add_argument("--seq", type=_count, metavar="N",
                       help="tokens a sample (default: the longest the model takes, or a factory's own)")
    group.add_argument("--precision", choices=PRECISIONS, default="bf16-mixed", metavar="P",
                       help=_choices(PRECISIONS))
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", metavar="O",
                       help=_choices(OPTIMIZERS))


def _add_place(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cluster", type=read_cluster, metavar="C",
                       help="a preset, [nodes x] devices x type such as 8xA100-80GB or 2x8xH100, or cpu:N for N local "
                            "processes; or a path to cluster JSON (default: what this machine has)")
    group.add_argument("--memory-budget", type=read_budget, metavar="BYTES",
                       help="what a device may hold: bytes, or a number with MB, MiB, GB or GiB such as 20GiB "
                            "(default: the device's memory less 8 %%)")


def _add_search(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--mode", choices=MODES, default="auto", metavar="M", help=_choices(MODES))
    group.add_argument("--mesh", type=read_mesh, metavar="SHAPE",
                       help="the grid of devices, such as 4x2 (default: the best of all shapes)")
    group.add_argument("--pp", type=_count, metavar="N", help="stages of a pipeline (default: the best number)")
    group.add_argument("--dp", type=_count, metavar="N", help="with --tp in place of --mesh: parts of the batch")
    group.add_argument("--tp", type=_count, metavar="N", help="with --dp in place of --mesh: parts of parameters")
    group.add_argument("--micro-batches", type=_count, metavar="N",
                       help="micro-batches of a pipeline's step (default: the best number)")
    group.add_argument("--head", choices=HEADS, default="auto", metavar="H",
                       help=f"a linear layer and its cross entropy in chunks of rows, so that there are never all "
                            f"logits: {_choices(HEADS)}; auto is where that is predicted to be quicker")
    group.add_argument("--batch-norm", choices=BATCH_NORMS, default="whole", metavar="B",
                       help=f"what batch norm takes its statistics of: {_choices(BATCH_NORMS)}; with whole a pipeline "
                            "runs a model that has some in one micro-batch")
    group.add_argument("--ppranks", type=_ranks, metavar="LISTS",
                       help="with --pp, a layout by hand: the devices of each pipeline, stage by stage, such as "
                            "[[0,1],[2,3]]; it is priced beside the solver's (default: the solver's)")
    group.add_argument("--dpranks", type=_ranks, metavar="LISTS",
                       help="with --ppranks: the devices that hold the same stage, such as [[0,2],[1,3]] (default: as "
                            "--ppranks tell)")
    group.add_argument("--solver", choices=SOLVERS, default="cbc", metavar="S", help=_choices(SOLVERS))
    group.add_argument("--pin", action="append", type=_pin, default=[], dest="pins", metavar="OP=STRATEGY",
                       help="fix an op to a strategy, both as a plan prints them, such as 'up=S0R = S0R X RR'; may be "
                            "given several times")


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=writable, metavar="PLAN.JSON",
                       help="also write the plan to this file (default: not written)")
    group.add_argument("--emit", type=writable, metavar="STEP.PY",
                       help="also write what one rank runs to this file, as Python that runs under torchrun (default: "
                            "not written)")
    group.add_argument("--timeline", type=writable, metavar="FILE",
                       help="also draw a step as it is predicted, a row a device, to this .html or .png (default: not "
                            "drawn)")
    group.add_argument("--json", action="store_true",
                       help="print the plan as one JSON object instead of text, and in it what --modes finds")
    group.add_argument("--modes", action="store_true",
                       help="also plan in each of the other modes, and print what a step takes in it, or why there is "
                            "none")
    group.add_argument("--explain", metavar="OP",
                       help="also print what the step would take with this op, by its name in the plan, cut otherwise")
    group.add_argument("--verbose", action="store_true",
                       help="print the cost of every edge first, tell what is being done, and show tracebacks")


def _choices(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]} (default: %(default)s)"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:_DIGITS]) <= MOST_COUNTED):
        raise argparse.ArgumentTypeError(f"{text[:_DIGITS]!r} is not a whole number above 0 and at most {MOST_COUNTED}")
    return int(text)


def _ranks(text: str) -> Ranks:
    try:
        return tuple(tuple(map(int, each)) for each in json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]!r} are no lists of devices, such as [[0,1],[2,3]]") from error


def writable(text: str) -> Path:
    """The path, once a file beside it could be made, as it will be when the plan is there. Raises AutoparError."""
    path = Path(check_path("the path of a file to write", text))
    draft = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        if path.is_dir() or not path.parent.is_dir():
            raise AutoparError(f"cannot write {path}: " + ("it is a folder; name a file in it" if path.is_dir() else
                               f"there is no folder {path.parent}; make it first"))
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise AutoparError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from error
    return path


def _pin(text: str) -> tuple[str, str]:
    name, found, strategy = text.partition("=")
    if not (found and name.strip() and strategy.strip()):
        raise AutoparError(f"pin {text!r} is not of the form 'op=S0R = S0R X RR': the name of an op, =, its strategy")
    return name.strip(), strategy.strip()
