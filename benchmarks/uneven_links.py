"""Train on three hosts of two ranks each, one of them behind slow links, and print what placing devices is worth.

    python benchmarks/uneven_links.py                 # as root on Linux; needs the commands ip and tc

Hosts are network namespaces: 940 Mbit/s between two of them and 93 Mbit/s to the third, a tenth of the rates of
HeteroPipe's cluster. Ranks are numbered host by host, or in turn as `mpirun --map-by node` does. Rows of each
numbering: the plan that autopar makes of the links it measures; the same stages on devices in the order of their
ranks; data parallelism. The claim is the first over the second where hosts take turns. Where there can be no namespaces
it says so, and nothing is claimed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

FAST, SLOW = 940e6, 93e6
"""Bits a second: between hosts 0 and 1, and to host 2."""
HOSTS, STEPS, FEW, LEAST = 3, 11, 4, 1.5
NUMBERINGS: dict[str, tuple[int, ...]] = {"in turn": (0, 1, 2, 0, 1, 2), "host by host": (0, 0, 1, 1, 2, 2)}
"""By name the host of each rank."""
ROOT = Path(__file__).parents[1]
SECONDS = 900.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbering", choices=NUMBERINGS, action="append", help="which numberings (default: all)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from tests.namespaces import NoNamespaces
    try:
        found = {name: trials(NUMBERINGS[name]) for name in given.numbering or NUMBERINGS}
    except NoNamespaces as reason:
        print(f"skipped: namespaces can't be made here: {reason}")
        return 0
    text = "\n".join([HEAD, *(line for name, rows in found.items() for line in lines(name, rows))])
    print(text)
    if given.out:
        given.out.write_text(text + "\n")
    return claimed(found)


HEAD = """\
| ranks | layout | stages x mesh, micro-batches | devices by stage | step ms | predicted ms |
| --- | --- | --- | --- | --- | --- |"""


def lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The table's rows of one numbering."""
    return [f"| {name} | {row['layout']} | {row['shape']} | {row['devices']} | {1e3 * row['step_s']:.0f} | "
            + (f"{1e3 * row['predicted_s']:.0f}" if row["predicted_s"] else "-") + " |" for row in rows]


def claimed(found: dict[str, list[dict[str, Any]]]) -> int:
    """Print the claim; 1 where it does not hold."""
    for name, rows in found.items():
        times = {row["layout"]: row["step_s"] for row in rows}
        ratio = times["default order"] / times["autopar"]
        print(f"ranks {name}: autopar's layout {ratio:.2f}x faster than default order, "
              f"{times['ddp'] / times['autopar']:.2f}x than data parallelism")
        if name == "in turn" and ratio < LEAST:
            print(f"claimed is {LEAST}x")
            return 1
    return 0


def trials(hosts: tuple[int, ...]) -> list[dict[str, Any]]:
    """What ranks on `hosts` measure. Raises NoNamespaces."""
    from tests.namespaces import Spaces, joined
    with joined(HOSTS, {(0, 1): FAST, (0, 2): SLOW, (1, 2): SLOW}) as spaces:
        ranks = Spaces(tuple(spaces.names[host] for host in hosts))
        os.environ["PYTHONPATH"] = str(ROOT)
        done = ranks.run([sys.executable, str(Path(__file__).resolve()), "--rank"], SECONDS)
    failed = [each.stderr for each in done if each.returncode]
    if failed:
        raise SystemExit(failed[0])
    rows: list[dict[str, Any]] = json.loads(done[0].stdout.splitlines()[-1])
    return rows


# What each rank does

def job() -> tuple[Any, dict[str, Any]]:
    """A GPT-2 of 6 layers, 512 wide, and a batch of 12 x 64 tokens: its gradients are much, its activations little."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    config = GPT2Config(n_layer=6, n_head=8, n_embd=512, vocab_size=2048, n_positions=64, use_cache=False,
                        bos_token_id=0, eos_token_id=0)
    tokens = torch.randint(0, 2048, (12, 64))
    return GPT2LMHeadModel(config).train(), {"input_ids": tokens, "labels": tokens}


def rank_main() -> None:
    """Measure the links, plan, and time each layout."""
    import torch.distributed as dist

    import autopar
    autopar.init()
    cluster = autopar.Cluster.measure()
    model, inputs = job()
    best = autopar.compile(model, cluster, inputs=inputs, precision="fp32", solver="highs")
    other = autopar.compile(job()[0], cluster, inputs=inputs, precision="fp32", plan=in_order(best.plan))
    plain = autopar.compile(job()[0], cluster, inputs=inputs, precision="fp32", mode="ddp")
    rows = rows_of({"autopar": best, "default order": other}, inputs, STEPS) + rows_of({"ddp": plain}, inputs, FEW)
    if dist.get_rank() == 0:
        print(json.dumps(rows))


def in_order(plan: Any) -> Any:
    """The plan with its places on devices in order; itself without stages."""
    if not plan.stages:
        return plan
    size = len(plan.stages[0].devices)
    place = {devices: tuple(range(i * size, (i + 1) * size)) for i, devices in enumerate(plan.pipelining.places)}
    stages = tuple(dataclasses.replace(stage, devices=place[stage.devices]) for stage in plan.stages)
    return dataclasses.replace(plan, pipelining=dataclasses.replace(plan.pipelining, stages=stages))


def rows_of(models: dict[str, Any], inputs: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """The median step of each after its first, the models in turn, so that what else the machine does is all of theirs.
    """
    import torch
    optimizers = {layout: torch.optim.AdamW(model.parameters()) for layout, model in models.items()}
    times: dict[str, list[float]] = {layout: [] for layout in models}
    for _ in range(steps):
        for layout, model in models.items():
            times[layout].append(seconds_of(model, optimizers[layout], inputs))
    return [row(layout, model.plan, statistics.median(times[layout][1:])) for layout, model in models.items()]


def seconds_of(model: Any, optimizer: Any, inputs: dict[str, Any]) -> float:
    """Of one step, the optimizer's included."""
    import torch.distributed as dist
    dist.barrier()
    start = time.perf_counter()
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.barrier()
    return time.perf_counter() - start


def row(layout: str, plan: Any, step_s: float) -> dict[str, Any]:
    """What the table tells of a layout."""
    devices = " ".join("(" + ",".join(map(str, stage.devices)) + ")" for stage in plan.stages) or "all"
    shape = f"{len(plan.stages) or 1} x {'x'.join(map(str, plan.mesh))}, {plan.micro_batches} by {plan.schedule}"
    return {"layout": layout, "shape": shape, "devices": devices, "step_s": step_s,
            "predicted_s": 0.0 if layout == "default order" else plan.step_time_s}


if __name__ == "__main__":
    if sys.argv[1:] == ["--rank"]:
        rank_main()
    else:
        sys.exit(main())
