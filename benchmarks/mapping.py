"""Where a pipeline's stages stand: devices as numbered, by hand, as the solver says, and where few, the best of all.

    python benchmarks/mapping.py --out benchmarks/results/mapping.md --plots benchmarks/results

All is predicted. Named clusters train GPTs of width 1024 on samples of 1,024 tokens in fp16; a step takes the compute
of its slowest stage in 1F1B and what is sent, as `autopar.solver.mapping` prices it. Random clusters (`drawn.py`) have
several tiers and uneven links, with random traffic on each axis; what counts there is how many layouts are proven the
best within the time, in CPU seconds, and the gap that is left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import drawn
from planning import machine

from autopar.core.cluster import Cluster
from autopar.core.files import write_whole
from autopar.core.ranks import HandLayout
from autopar.solver.grid import Send
from autopar.solver.mapping import Collective, Devices, Instance, place, price

WIDTH, TOKENS = 1024, 1024
SMALL = 8
"""Devices up to which every layout is priced."""
FOUR = HandLayout(((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)))
THREE = HandLayout(((0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)))


def joined(hosts: list[int], between: list[list[float]], within: float = 12e9) -> Cluster:
    """Hosts of so many A100s; bytes a second between each two."""
    n, base = len(hosts), Cluster.preset(f"{sum(hosts)}xA100-80GB")
    where = tuple(h for h, count in enumerate(hosts) for _ in range(count))
    rates = tuple(tuple(within if i == j else between[i][j] for j in range(n)) for i in range(n))
    latency = tuple(tuple(5e-6 if i == j else 4e-5 for j in range(n)) for i in range(n))
    uplinks = tuple(max(rate for j, rate in enumerate(row) if j != i) for i, row in enumerate(between))
    return replace(base, name="joined", hosts=where, rows=where, latency_s=latency, bytes_per_s=rates,
                   uplink_bytes_per_s=uplinks)


def turned(cluster: Cluster, order: list[int]) -> Cluster:
    """The same devices, numbered otherwise."""
    hosts = tuple(cluster.hosts[d] for d in order)
    return replace(cluster, hosts=hosts, rows=hosts)


FAST, SLOW = 9.4e9 / 8, 0.93e9 / 8
HETERO = joined([4, 4, 4], [[FAST, FAST, SLOW], [FAST, FAST, SLOW], [SLOW, SLOW, SLOW]])
TWO = joined([2, 2], [[6e9, 6e9], [6e9, 6e9]], 250e9)
CHAIN = joined([2, 2, 2], [[1e9, 1e9, 1e8], [1e9, 1e9, 1e9], [1e8, 1e9, 1e9]], 50e9)


@dataclass(frozen=True)
class Case:
    """A GPT on a named cluster in so many stages, and layouts by hand."""

    name: str
    cluster: Cluster
    layers: int
    batch: int
    stages: int
    hand: HandLayout | None = None

    @property
    def width(self) -> int:
        """Devices of a stage."""
        return self.cluster.size // self.stages

    @property
    def micro_batches(self) -> int:
        """Of one sample on each device of a stage."""
        return max(1, self.batch // self.width)

    def instance(self) -> Instance:
        """What is placed: activations forth and back, and once the sum of a stage's gradients."""
        gradients = 2.0 * 12.0 * self.layers * WIDTH**2 / self.stages
        sums = (Collective("all_reduce", (1,), gradients, 1.0),) if self.width > 1 else ()
        return Instance(self.cluster, (self.stages, self.width),
                        Send(2.0 * TOKENS * WIDTH, 2.0, 2.0 * (self.micro_batches - 1)), sums)

    @property
    def flop(self) -> float:
        """FLOP a step."""
        return 72.0 * self.batch * TOKENS * self.layers * WIDTH**2

    def compute_s(self) -> float:
        """Seconds a step computes, the filling and draining of the pipeline with it."""
        each = self.flop / self.cluster.size / self.micro_batches / self.cluster.devices[0].matmul_flops("bf16")
        return each * (self.micro_batches + self.stages - 1)


CASES = (
    *(Case(f"HeteroPipe, {layers} layers, batch {batch}, {stages} stages", HETERO, layers, batch, stages, hand)
      for layers in (12, 24, 48) for batch in (12, 768) for stages, hand in ((4, FOUR), (3, THREE))),
    Case("two hosts 0,1,0,1", turned(TWO, [0, 2, 1, 3]), 24, 32, 2, HandLayout(((0, 1), (2, 3)))),
    Case("three hosts in a chain, turned", turned(CHAIN, [0, 4, 2, 1, 5, 3]), 24, 48, 3,
         HandLayout(((0, 2, 1), (3, 5, 4)))),
)


@dataclass(frozen=True, slots=True)
class Placed:
    """A layout of a case: TFLOP/s of all devices, seconds a step, bytes a step between hosts."""

    tflops: float
    step_s: float
    between_bytes: float


def outcome(case: Case, devices: Devices) -> Placed:
    """What a layout comes to."""
    step = case.compute_s() + price(case.instance(), devices)
    return Placed(case.flop / step / 1e12, step, crossing(case.instance(), case.micro_batches, devices))


def crossing(instance: Instance, micro_batches: int, devices: Devices) -> float:
    """Bytes a step between hosts: activations and their gradients, and rings from host to host."""
    hosts, width = instance.network.hosts, instance.size // instance.shape[0]
    places = [devices[i:i + width] for i in range(0, len(devices), width)]
    pairs = sum(hosts[a] != hosts[b] for one, other in itertools.pairwise(places)
                for a, b in zip(one, other, strict=True))
    found = 2.0 * micro_batches * instance.send.nbytes * pairs
    for each in instance.collectives:
        spans = (len({hosts[d] for d in group}) for group in places)
        found += sum(n * 2.0 * (width - 1) / width * each.nbytes for n in spans if n > 1)
    return found


def layouts(case: Case) -> Iterator[tuple[str, Devices]]:
    """The layouts of a case by what they are called."""
    yield "default", tuple(range(case.cluster.size))
    if case.hand:
        yield "hand", case.hand.devices(case.cluster.size)
    yield "solver", place(case.instance()).devices
    if case.cluster.size <= SMALL:
        yield "exhaustive", min(itertools.permutations(range(case.cluster.size)),
                                key=lambda devices: price(case.instance(), devices))


def named() -> Iterator[tuple[str, dict[str, Placed]]]:
    """Every case and its layouts."""
    for case in CASES:
        yield case.name, {name: outcome(case, devices) for name, devices in layouts(case)}


def best_stages() -> list[str]:
    """For HeteroPipe's cluster the stages and hosts that are best, by layers and batch."""
    said = []
    for layers, batch in itertools.product((12, 24, 48), (12, 48, 192, 768)):
        cases = [Case("", HETERO, layers, batch, stages) for stages in (2, 3, 4, 6, 12)]
        found = {case.stages: place(case.instance()) for case in cases}
        best = min(cases, key=lambda case: case.compute_s() + found[case.stages].seconds)
        hosts = [[HETERO.hosts[d] for d in found[best.stages].devices[j:j + best.width]]
                 for j in range(0, HETERO.size, best.width)]
        said.append(f"{layers} layers, batch {batch}: {best.stages} stages, hosts {hosts}")
    return said


@dataclass(frozen=True, slots=True)
class Proof:
    """A random cluster: devices, CPU seconds, the gap, and the default order's seconds over the layout's."""

    devices: int
    cpu_s: float
    gap: float
    gain: float


def proofs(count: int, devices: int | None, noise: float, limit_s: float) -> Iterator[Proof]:
    """Random clusters of so many devices, or up to 16, placed within `limit_s` CPU seconds."""
    for seed in range(count):
        size = devices or drawn.sizes(random.Random(seed), 16)
        instance, start = drawn.instance(seed, size, noise), time.process_time()
        found = place(instance, limit_s, clock=time.process_time)
        yield Proof(size, time.process_time() - start, found.gap, price(instance, tuple(range(size))) / found.seconds)


KINDS = (("up to 16 devices, tiers, uneven links", 100, None, 0.0, 10.0, 0.0),
         ("up to 16 devices, every pair unlike", 6, None, 0.1, 10.0, 0.0),
         ("64 devices on equal hosts, uneven links", 8, 64, 0.0, 5.0, 0.01))
"""Name, clusters, devices, noise, CPU seconds allowed, the gap that is the goal."""


def random_rows(share: float, shown: Any) -> Iterator[tuple[str, list[Proof], float]]:
    """Each kind of random clusters; `share` of them."""
    for name, count, devices, noise, limit_s, goal in KINDS:
        found = []
        for proof in proofs(max(1, round(share * count)), devices, noise, limit_s):
            found.append(proof)
            print(f"\r{name}: {len(found)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        print(summary(name, found, goal), file=shown, flush=True)
        yield name, found, goal


def summary(name: str, found: list[Proof], goal: float) -> str:
    """What the random clusters of a kind say."""
    met = sum(proof.gap <= goal + 1e-9 for proof in found)
    seconds = sorted(proof.cpu_s for proof in found)
    gain = [proof.gain for proof in found]
    done = "proven the best" if not goal else f"within {goal:.0%}"
    return (f"{name}: {met} of {len(found)} {done}, CPU s median {statistics.median(seconds):.2f}, worst "
            f"{seconds[-1]:.1f}; worst gap {max(proof.gap for proof in found):.1%}; default order takes "
            f"{statistics.median(gain):.2f}x the solver's in the median, {max(gain):.1f}x at most: "
            f"{'met' if met == len(found) else 'NOT met'}")


HEADER = ("| cluster | layout | TFLOP/s | step s | GB between hosts |", "| --- | --- | --- | --- | --- |")


def lines(name: str, found: dict[str, Placed]) -> list[str]:
    """The lines of a case in the table."""
    return [f"| {name} | {layout} | {p.tflops:.1f} | {p.step_s:.4f} | {p.between_bytes / 1e9:.3f} |"
            for layout, p in found.items()]


def plot(found: dict[str, dict[str, Placed]], folder: Path) -> None:
    """Three bar charts: TFLOP/s, seconds a step, bytes between hosts."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    fields = {"tflops": "TFLOP/s", "step_s": "seconds a step", "between_bytes": "bytes between hosts"}
    for field, label in fields.items():
        figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(found) + 2), layout="constrained")
        for k, layout in enumerate(("default", "hand", "solver", "exhaustive")):
            rows = [(i, getattr(each[layout], field)) for i, each in enumerate(found.values()) if layout in each]
            axes.barh([i + 0.2 * k for i, _ in rows], [value for _, value in rows], 0.2, label=layout)
        axes.set_yticks([i + 0.3 for i in range(len(found))], list(found))
        axes.set_xscale("log")
        axes.set_xlabel(f"{label}, predicted")
        axes.invert_yaxis()
        axes.legend()
        figure.savefig(folder / f"mapping-{field.partition('_')[0]}.png", dpi=100)
        pyplot.close(figure)


def claims(found: dict[str, dict[str, Placed]]) -> list[str]:
    """The solver's layout beside the others."""
    by_hand = [each["solver"].step_s <= each["hand"].step_s * (1 + 1e-9) for each in found.values() if "hand" in each]
    small = [abs(each["solver"].step_s - each["exhaustive"].step_s) <= 1e-9 * each["solver"].step_s
             for each in found.values() if "exhaustive" in each]
    gain = [each["default"].step_s / each["solver"].step_s for each in found.values()]
    return [f"at or under the layout by hand: {sum(by_hand)} of {len(by_hand)}",
            f"as the best of all layouts where those were priced: {sum(small)} of {len(small)}",
            f"default order over the solver's: {statistics.median(gain):.2f}x in the median, {max(gain):.2f}x at most"]


def main() -> None:
    """Print the tables, and write them beside what made them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the random clusters (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of tables")
    parser.add_argument("--out", type=Path, help="also write the tables, with command and machine, to this file")
    parser.add_argument("--plots", type=Path, help="also draw three bar charts into this folder")
    options = parser.parse_args()
    shown: Any = sys.stderr if options.json else sys.stdout
    where, found = machine(), dict[str, dict[str, Placed]]()
    print("\n".join([where, "", *HEADER]), file=shown, flush=True)
    for name, placed in named():
        found[name] = placed
        print("\n".join(lines(name, placed)), file=shown, flush=True)
    changes, said = best_stages(), claims(found)
    print("\n".join(["", *said, "", *changes, ""]), file=shown, flush=True)
    kinds = list(random_rows(options.share, shown))
    if options.plots:
        plot(found, options.plots)
    if options.json:
        cases = {name: {layout: asdict(p) for layout, p in each.items()} for name, each in found.items()}
        print(json.dumps({"machine": where, "cases": cases, "claims": said, "best": changes,
                          "random": {name: [asdict(proof) for proof in each] for name, each, _ in kinds}}))
    if options.out:
        table = [line for name, placed in found.items() for line in lines(name, placed)]
        write_whole(options.out, "\n".join([
            "# Layouts of pipelines, as predicted", "", f"Machine: {where}.", "", "```",
            f"python benchmarks/mapping.py {shlex.join(sys.argv[1:])}", "```", "", *HEADER, *table, "",
            *(f"- {line}" for line in said), "", "HeteroPipe's cluster, the best stages and the hosts they are on:", "",
            *(f"- {line}" for line in changes), "", "Random clusters:", "",
            *(f"- {summary(name, each, goal)}" for name, each, goal in kinds), ""]))


if __name__ == "__main__":
    main()
