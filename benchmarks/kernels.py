"""Linear and cross entropy in chunks against what torch makes of it: milliseconds and memory, forward and backward.

    python benchmarks/kernels.py --out kernels.json

One GPU, bf16, random hidden states, a loss that is the mean over tokens. All forms of a case are compiled first, then
run in turn ROUNDS times, TIMES steps one after another as in training; times are medians. Memory is what a step has at
most beside hidden states and weight, its gradients included. The ratios are over the plain form compiled by Inductor,
which may write over what its forward saved, and over the plain form as it is written; errors are of the weight's
gradient against fp32. What fails is printed as such; what there is no time for is named. `--parts` times the products
and the kernels over rows apart, by which chunks and sums were chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.kernels import triton_rows
from autopar.kernels.linear_cross_entropy import Chunks, linear_cross_entropy

ROUNDS, TIMES, WARMUP = 5, 4, 3
CASES = ((8192, 50304, 768), (8192, 50257, 768), (8192, 50304, 1600), (8192, 50304, 4096), (32768, 50304, 768),
         (16384, 32000, 4096), (8192, 128256, 4096), (8192, 256000, 1600))
"""(tokens, classes, width)."""
MIB = 2.0**20
Form = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, target) -> the mean loss."""


@dataclass(frozen=True)
class Row:
    """One form in one case; `failed` says why there are no figures."""

    case: str
    form: str
    milliseconds: float = 0.0
    mib: float = 0.0
    error: float = 0.0
    failed: str = ""


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As models write it."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """In chunks as plans have them."""
    return linear_cross_entropy(hidden, weight, target, None, torch.full((), 1.0 / len(target), device=hidden.device))


def in_chunks(count: int, dtype: torch.dtype) -> Form:
    """Ours, in so many chunks, the weight's gradient summed in `dtype`."""
    def form(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        scale = torch.full((), 1.0 / len(target), device=hidden.device)
        return linear_cross_entropy(hidden, weight, target, None, scale, Chunks(-(-len(hidden) // count), dtype))
    return form


def inductors_chunks(form: Form) -> Form:
    """`form` under Inductor's own chunking. Raises AttributeError where this torch has none."""
    from torch._inductor import config
    name = "auto_chunker" if hasattr(config, "auto_chunker") else "AutoChunker"
    getattr(config, name)
    made: Form = torch.compile(form, dynamic=False, options={f"{name}.enable": True})
    return made


def torchs_own(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """torch's chunked form, which 2.13 has."""
    from torch.nn import LinearCrossEntropyOptions
    loss: Tensor = F.linear_cross_entropy(hidden, weight, target, options=LinearCrossEntropyOptions())
    return loss


def compiled(form: Form) -> Form:
    """By Inductor."""
    made: Form = torch.compile(form, dynamic=False)
    return made


BF16, FP32 = torch.bfloat16, torch.float32
PLAIN, EAGER = "plain, Inductor", "plain, eager"
FORMS: dict[str, Callable[[], Form]] = {
    PLAIN: lambda: compiled(plain),
    EAGER: lambda: plain,
    "Inductor's chunks": lambda: inductors_chunks(plain),
    "torch's chunks": lambda: torchs_own,
    "ours": lambda: compiled(ours),
    "ours, 2 chunks, bf16 sums": lambda: compiled(in_chunks(2, BF16)),
    "ours, 4 chunks, bf16 sums": lambda: compiled(in_chunks(4, BF16)),
    "ours, 8 chunks, bf16 sums": lambda: compiled(in_chunks(8, BF16)),
    "ours, 4 chunks, fp32 sums": lambda: compiled(in_chunks(4, FP32)),
}


class Bench:
    """One case: its tensors, and the forms that run in it."""

    def __init__(self, tokens: int, classes: int, width: int, device: torch.device) -> None:
        self.name, self.device = f"{tokens} x {classes} x {width}", device
        generator = torch.Generator(device).manual_seed(0)
        draw = {"device": device, "generator": generator}
        self.hidden = torch.randn(tokens, width, **draw).to(BF16).requires_grad_()  # type: ignore[arg-type]
        self.weight = (torch.randn(classes, width, **draw) / width**0.5).to(BF16).requires_grad_()  # type: ignore[arg-type]
        self.target = torch.randint(classes, (tokens,), **draw)  # type: ignore[call-overload]

    def step(self, form: Form) -> tuple[Tensor, ...]:
        """The gradients of hidden and weight."""
        return torch.autograd.grad(form(self.hidden, self.weight, self.target), (self.hidden, self.weight))

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def exact(self) -> Tensor:
        """The weight's gradient in fp32."""
        hidden, weight = self.hidden.detach().float(), self.weight.detach().float().requires_grad_()
        total = torch.zeros_like(weight)
        for part in range(0, len(hidden), 1024):
            loss = F.cross_entropy(hidden[part:part + 1024] @ weight.t(), self.target[part:part + 1024],
                                   reduction="sum") / len(hidden)
            total += torch.autograd.grad(loss, weight)[0]
        return total

    def begin(self, name: str, exact: Tensor) -> tuple[Form | None, Row]:
        """A form that has run, and its memory and error."""
        try:
            form = FORMS[name]()
            for _ in range(WARMUP):
                found = self.step(form)
            error = float((found[1].float() - exact).norm() / exact.norm())
            del found
            return form, Row(self.name, name, 0.0, self.peak(form) / MIB, error)
        except Exception as failure:
            said = str(failure).strip().partition("\n")[0]
            return None, Row(self.name, name, failed=f"{type(failure).__name__}: {said}"[:120])

    def peak(self, form: Form) -> float:
        """Bytes a step has at most beside what is there."""
        if self.device.type != "cuda":
            self.step(form)
            return 0.0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(form)
        self.wait()
        return float(torch.cuda.max_memory_allocated() - before)

    def run(self) -> list[Row]:
        """All forms in turn."""
        torch._dynamo.reset()  # there is a limit to how often one function is compiled
        exact = self.exact()
        begun = [self.begin(name, exact) for name in FORMS]
        del exact
        took: dict[str, list[float]] = {row.form: [] for _, row in begun}
        for _ in range(ROUNDS):
            for form, row in begun:
                if form is not None:
                    took[row.form].append(milliseconds(lambda form=form: self.step(form), self.wait, TIMES))
        return [Row(**{**asdict(row), "milliseconds": statistics.median(took[row.form] or [0.0])}) for _, row in begun]


def milliseconds(work: Callable[[], Any], wait: Callable[[], None], times: int) -> float:
    """Of one of so many runs."""
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return 1e3 * (time.perf_counter() - start) / times


def table(found: list[Row]) -> str:
    """The rows of each case beside its plain forms."""
    lines = ["| tokens x classes x width | form | ms | over Inductor's plain | MiB | over Inductor's | over eager's | "
             "error |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    base = {(row.case, row.form): row for row in found if not row.failed}
    for row in found:
        if row.failed:
            lines.append(f"| {row.case} | {row.form} | {row.failed} | | | | | |")
            continue
        by_inductor, eager = base.get((row.case, PLAIN)), base.get((row.case, EAGER))
        lines.append(f"| {row.case} | {row.form} | {row.milliseconds:.3f} | "
                     f"{ratio(row.milliseconds, by_inductor and by_inductor.milliseconds)} | {row.mib:.0f} | "
                     f"{ratio(row.mib, by_inductor and by_inductor.mib)} | {ratio(row.mib, eager and eager.mib)} | "
                     f"{row.error:.1e} |")
    return "\n".join(lines)


def ratio(mine: float, theirs: float | None) -> str:
    """Mine over theirs."""
    return f"{mine / theirs:.3f}" if theirs else "-"


def parts(tokens: int, classes: int, width: int, device: torch.device) -> str:
    """What a chunk's products and kernels take apart from each other."""
    bench = Bench(tokens, classes, width, device)
    x, weight, target = bench.hidden.detach(), bench.weight.detach(), bench.target
    odd = torch.randn(classes - 47, width, device=device).to(BF16)
    logits = x @ weight.t()
    wide = torch.zeros(classes, width, dtype=FP32, device=device)
    same = torch.zeros(classes, width, dtype=BF16, device=device)
    hidden = torch.empty_like(x)
    products: dict[str, Callable[[], Any]] = {
        "logits": lambda: torch.mm(x, weight.t(), out=logits),
        f"logits of {classes - 47}, rows as before": lambda: torch.mm(x, odd.t(), out=logits[:, :classes - 47]),
        f"logits of {classes - 47}": lambda: torch.mm(x, odd.t()),
        "hidden": lambda: torch.mm(logits, weight, out=hidden),
        "weight": lambda: torch.mm(logits.t(), x, out=same),
        "weight, added": lambda: same.addmm_(logits.t(), x),
        "weight, in fp32": lambda: torch.mm(logits.t(), x, out_dtype=FP32),
        "weight, added in fp32": lambda: torch.addmm(wide, logits.t(), x, out_dtype=FP32, out=wide),
    }
    lines = [f"chunk of {tokens} x {classes} x {width}"]
    for name, work in products.items():
        lines.append(f"  {name}: " + timed(work, bench, 2e-9 * tokens * classes * width, "TFLOP/s"))
    gigabytes = 2e-6 * logits.numel()
    one = torch.ones((), device=device)
    for block, each in ((4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 16), (16384, 32)):
        triton_rows.LARGEST_BLOCK, triton_rows.ELEMENTS_A_THREAD = block, each
        for name, work, passes in (("sums", lambda: triton_rows.ROWS.sums(logits, target, classes), 1),
                                   ("both", lambda: triton_rows.ROWS.both(logits, target, one, classes), 2)):
            lines.append(f"  rows, {name}, block {block}, {each} a thread: "
                         + timed(work, bench, passes * gigabytes, "GB/s"))
    return "\n".join(lines)


def timed(work: Callable[[], Any], bench: Bench, amount: float, unit: str) -> str:
    """Milliseconds, and so much a millisecond."""
    try:
        for _ in range(WARMUP):
            work()
        took = statistics.median(milliseconds(work, bench.wait, 10) for _ in range(5))
    except Exception as failure:
        return f"FAILED {type(failure).__name__}: {str(failure).strip().partition(chr(10))[0][:120]}"
    return f"{took:.3f} ms, {amount / took:.0f} {unit}"


def main() -> None:
    """Run the cases, then print all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--case", nargs=3, type=int, action="append", metavar=("TOKENS", "CLASSES", "WIDTH"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", action="store_true", help="a chunk's parts instead of whole steps")
    parser.add_argument("--seconds", type=float, default=230.0, help="after so many no case is begun")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device, start = torch.device(arguments.device), time.perf_counter()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    if arguments.parts:
        print("\n".join(parts(*case, device) for case in arguments.case or [(1024, 50304, 768), (1024, 50304, 4096)]))
        return
    found: list[Row] = []
    for case in arguments.case or CASES:
        if time.perf_counter() - start > arguments.seconds:
            found.append(Row(" x ".join(map(str, case)), "all", failed=f"not run in {arguments.seconds:.0f} s"))
            continue
        found += Bench(*case, device).run()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    told = {"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in found]}
    if arguments.out:
        arguments.out.write_text(json.dumps(told, indent=1))
    print(json.dumps(told) if arguments.json else f"{name}, torch {torch.__version__}\n{table(found)}")


if __name__ == "__main__":
    main()
