"""Bytes of lowered segments: what running on meta says is what a device holds."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from autopar.codegen.arrivals import Arrival, arrivals
from autopar.codegen.executable import Executable, build, offline
from autopar.codegen.footprint import Footprint, Kernels, footprint
from autopar.codegen.lower import Target
from autopar.codegen.partitioned import compiled_footprint, parted
from autopar.codegen.step_bytes import by_call, eager_footprints, step_bytes
from autopar.core.mesh import Mesh
from autopar.planner import Request, decision_of, solve
from tests.builders import quick
from tests.programs import model_context

CASES = [("gpt2", "ddp", (2,)), ("gpt2", "1d", (2,)), ("gpt2", "zero3", (2,)), ("gpt2", "2d", (2, 2)),
         ("mlp", "1d", (2,)), ("resnet", "ddp", (2,))]


@cache
def lowered(name: str, mode: str, mesh: tuple[int, ...], device: str) -> Executable:
    context, where = model_context(name), quick(Mesh(mesh).size)
    plan, _ = solve(context, where, Request(name, mode, mesh, solver="highs"))
    decision = decision_of(plan, context)
    return build(Target(decision, offline(decision.mesh), where.pricer(decision.mesh), torch.device(device),
                        sums="outside"))


@pytest.mark.parametrize(("name", "mode", "mesh"), CASES)
def test_on_meta_as_on_a_device(name: str, mode: str, mesh: tuple[int, ...]) -> None:
    shadow, real = lowered(name, mode, mesh, "meta"), lowered(name, mode, mesh, "cpu")
    expected = eager_footprints(shadow, "cpu")
    seen = {id(call.lowered): call for call in shadow.calls}
    assert seen.keys() == expected.keys()
    for one, other in zip(shadow.calls, real.calls, strict=True):
        given = arrivals(other.lowered, real.decision, {})
        found = footprint(other.lowered.module, given, 1, torch.device("cpu"))
        assert found == expected[id(one.lowered)]


def test_what_autograd_keeps() -> None:
    x, weight = (Arrival(shape, torch.float32, True) for shape in ((8, 16), (16, 32)))

    def run(x: Tensor, weight: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        made = F.gelu(x @ weight)
        return made, made.exp()

    one = 8 * 32 * 4
    found = footprint(run, [x, weight], 1)
    assert found == Footprint(saved=one, arguments=(0, 1), results=(1,), results_bytes=(one, one), forward=3 * one,
                              backward=found.backward)
    assert found.backward >= 3 * one  # two gradients come in, one value was kept


def test_what_a_compiler_keeps_is_no_more() -> None:
    executable = lowered("gpt2", "1d", (2,), "meta")
    eager = eager_footprints(executable, "cpu")
    for call in {id(call.lowered): call for call in executable.calls}.values():
        given = arrivals(call.lowered, executable.decision, {})
        found = compiled_footprint(parted(Kernels(call.lowered.module, "cpu"), given, 1))
        plain = eager[id(call.lowered)]
        assert found.results_bytes == plain.results_bytes
        assert found.saved <= plain.saved
        assert found.forward >= found.saved
        assert found.backward > 0


def test_a_step_holds_more_than_rests() -> None:
    executable = lowered("gpt2", "ddp", (2,), "meta")
    prints = eager_footprints(executable, "cpu")
    found = step_bytes(executable, by_call(executable, prints), 8.0)
    saved = sum(prints[id(call.lowered)].saved for call in executable.calls)
    assert found.rest < found.update < found.peak
    assert found.backward > found.rest + saved - prints[id(executable.calls[-1].lowered)].saved
