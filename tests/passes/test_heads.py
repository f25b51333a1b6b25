"""Which heads go in chunks, what they become, and where that pays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar.api import arguments
from autopar.core.cluster import Cluster
from autopar.explanation import explain
from autopar.passes.capture import Program, capture
from autopar.passes.heads import ChunkHeads, heads_of, pays
from autopar.passes.micro import micro
from autopar.planner import Request, prepare, program_key, solve, verify
from tests.builders import gpt2
from tests.programs import OnCpu, program, targets

ROWS, WIDTH, CLASSES = 12, 8, 10


def operands() -> tuple[Tensor, nn.Parameter, Tensor, nn.Parameter]:
    """hidden (3, 4, D), weight, target with some that are ignored, bias."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((3, 4, WIDTH), (CLASSES, WIDTH),
                                                                                  (CLASSES,)))
    target = torch.randint(CLASSES, (3, 4), generator=generator)
    target[0, 1] = -100
    return hidden, nn.Parameter(weight), target, nn.Parameter(bias)


def flat(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), target.reshape(-1), **options)


def shifted(logits: Tensor, target: Tensor) -> Tensor:
    return flat(logits[:, :-1].contiguous(), target[:, 1:])


def read_twice(logits: Tensor, target: Tensor) -> Tensor:
    return flat(logits, target) + logits.square().mean()


TAKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "flat": flat,
    "upcast": lambda logits, target: flat(logits.double(), target),
    "rows of themselves": lambda logits, target: F.cross_entropy(logits.flatten(0, 1), target.flatten()),
    "a sum": lambda logits, target: flat(logits, target, reduction="sum"),
    "a class ignored": lambda logits, target: flat(logits, target.clamp(min=0), ignore_index=3),
    "a scaled loss": lambda logits, target: flat(logits, target) * 0.5,
}
LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "smoothed": lambda logits, target: flat(logits, target, label_smoothing=0.1),
    "weighted": lambda logits, target: flat(logits, target, weight=torch.ones(CLASSES)),
    "by row": lambda logits, target: flat(logits, target, reduction="none").sum(),
    "read twice": read_twice,
    "maps": lambda logits, target: F.cross_entropy(logits.transpose(1, 2), target),
    "scaled logits": lambda logits, target: flat(logits * 2, target),
    "shifted": shifted,
}


def heads(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Program, tuple[Any, ...]]:
    given = operands()
    return program(lambda h, w, t, b: loss(F.linear(h, w, b), t), *given), given


@pytest.mark.parametrize("name", TAKEN)
def test_heads_that_become_one_op_and_do_the_same(name: str) -> None:
    found, given = heads(TAKEN[name])
    before = OnCpu(torch.fx.GraphModule(nn.Module(), found.graph)).run(*ordered(found, given))
    assert len(heads_of(found)) == 1
    chunked = ChunkHeads()(found)
    chunked.graph.lint()
    assert "autopar" in targets(chunked) and not {"linear", "cross_entropy_loss", "to"} & set(targets(chunked))
    after = OnCpu(torch.fx.GraphModule(nn.Module(), chunked.graph)).run(*ordered(chunked, given))
    assert torch.allclose(before[0], after[0]) and before[0].dtype == after[0].dtype


def ordered(found: Program, given: tuple[Any, ...]) -> list[Tensor]:
    """The operands of `heads` in the order of a program's placeholders."""
    hidden, weight, target, bias = given
    named = {"held1": weight, "held3": bias}
    inputs = iter((hidden, target))
    held = [found.sources[n.name] for n in found.graph.nodes if n.op == "placeholder"]
    return [named[s.name] if s.kind == "parameter" else next(inputs) for s in held]


@pytest.mark.parametrize("name", LEFT)
def test_heads_that_stay_as_they_are(name: str) -> None:
    found, _ = heads(LEFT[name])
    before = targets(found)
    assert not heads_of(found) and targets(ChunkHeads()(found)) == before


@pytest.mark.parametrize(("rows", "width", "classes", "parts", "worth"), [
    (65536, 768, 50304, 8, True), (65536, 768, 50304, 1, True), (16384, 4096, 128256, 8, True), (128, 32, 96, 4, False),
    (256, 2048, 1000, 1, False)])
def test_chunks_pay_where_there_are_many_logits(rows: int, width: int, classes: int, parts: int,
                                                               worth: bool) -> None:
    hidden, weight = (torch.empty(shape, device="meta") for shape in ((rows, width), (classes, width)))
    found = program(lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t), hidden, nn.Parameter(weight),
                    torch.empty(rows, dtype=torch.int64, device="meta"), precision="bf16-mixed")
    assert pays(found, Cluster.preset("8xH200").devices[0], parts) == worth


def test_the_word_decides_and_the_plan_names_the_op_and_is_verified() -> None:
    case, cluster = gpt2(), Cluster.preset("cpu:2")

    def asked(head: Any) -> Program:
        return replace(capture(case.model, arguments(case.inputs), "fp32"), head=head)

    keys = {head: program_key(prepare(asked(head), cluster)) for head in ("auto", "plain", "chunked")}
    assert keys["auto"] == keys["plain"] != keys["chunked"]
    ctx = prepare(asked("chunked"), cluster)
    plan, _ = solve(ctx, cluster, Request("gpt2", "auto"))
    assert "linear_cross_entropy" in {op.name for op in plan.ops}
    for head in keys:
        assert verify(plan, asked(head), cluster)[0] == pytest.approx(plan.step_time_s)
    explained = explain(plan, asked("auto"), cluster, "linear_cross_entropy")
    assert explained.planned.seconds == pytest.approx(plan.step_time_s)


def test_micro_batches_sum_up_to_the_batch() -> None:
    case = gpt2()
    assert isinstance(case.inputs, dict)
    asked = replace(capture(case.model, arguments(case.inputs), "fp32"), head="chunked")  # type: ignore[arg-type]
    cut = micro(prepare(asked, Cluster.preset("cpu:2")), 4)
    held = dict([*case.model.named_parameters(), *case.model.named_buffers()])
    total = 0.0
    for part in range(4):
        given = {**held, **{name: x.chunk(4)[part] for name, x in case.inputs.items()}, **cut.program.constants,
                 **{name: count.of(case.inputs) for name, count in cut.counts.items()}}
        values = [given[cut.program.sources[n.name].name] for n in cut.program.graph.nodes if n.op == "placeholder"]
        made = OnCpu(torch.fx.GraphModule(nn.Module(), cut.program.graph)).run(*values)
        total += float(next(x for x in made if x is not None).detach())
    assert len(cut.counts) == 1 and total == pytest.approx(float(case.call(case.model).detach()), rel=1e-6)


def test_saved_bytes_are_gradients_in_place_of_logits() -> None:
    case, cluster = gpt2(vocab=4096), Cluster.preset("cpu:1")
    saved = {}
    for head in ("plain", "chunked"):
        ctx = prepare(replace(capture(case.model, arguments(case.inputs), "fp32"), head=head), cluster)
        saved[head] = solve(ctx, cluster, Request("gpt2", "ddp"))[0].memory.activations
    logits, gradients = 128 * 4096 * 4, (128 + 4096) * 32 * 4
    assert saved["plain"] - saved["chunked"] == pytest.approx(logits - gradients, rel=1e-6)
