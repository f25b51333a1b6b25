"""What a compiled model returns: its loss alone, or all outputs as they lie on the mesh."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autopar
from autopar.codegen.outputs import NotKept
from tests.builders import CASES, Case, quick
from tests.families import family
from tests.test_exactness import gradient_errors, whole

pytestmark = pytest.mark.dist
TOLERANCE = 1e-5


def case_of(name: str) -> Case:
    case = CASES[name]() if name in CASES else family(name)
    if name == "gpt2":
        case.model.config.output_hidden_states = True  # type: ignore[union-attr]
    return case


def outputs(case: Case, model: nn.Module, inputs: Any) -> list[Any]:
    """The loss and the other outputs of a call."""
    if isinstance(inputs, dict):
        made = model(**inputs)
        return [made.loss, made.logits, *(getattr(made, "hidden_states", None) or ())]
    if isinstance(model, autopar.codegen.runtime.ParallelModule):
        return list(model(*inputs))
    output = model(*inputs[:-1])
    assert case.loss_fn is not None
    return [case.loss_fn(output, inputs[-1]), output]


def errors(found: list[Any], wanted: list[Any]) -> float:
    """The worst difference, of the loss and of whole outputs."""
    return max(float((whole(f).detach() - w.detach()).abs().max()) for f, w in zip(found, wanted, strict=True))


def both(rank: int, world_size: int, name: str, mode: str, mesh: Any) -> tuple[float, float, float, list[str]]:
    """Errors of the outputs, of gradients that come through them too, of outputs in eval mode; how the outputs lie."""
    case = case_of(name)
    reference = copy.deepcopy(case.model)
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, mode=mode,
                            mesh=mesh, precision="fp32", returns="all")
    found, wanted = outputs(case, model, case.inputs), outputs(case, reference, case.inputs)
    assert not isinstance(found[0], DTensor) and all(isinstance(x, DTensor) for x in found[1:])
    (found[0] + sum(whole(x).square().mean() for x in found[1:])).backward()
    (wanted[0] + sum(x.square().mean() for x in wanted[1:])).backward()
    step = max(gradient_errors(model, reference).values())
    model.eval(), reference.eval()
    with torch.no_grad():
        part = case.part(rank, world_size)
        evaluated = outputs(case, model, part)
        quiet = errors(evaluated, outputs(case, reference, case.inputs))
    assert not any(x.requires_grad for x in evaluated)
    return errors(found, wanted), step, quiet, [str(x.placements) for x in found[1:]]


@pytest.mark.parametrize(("name", "mode", "mesh", "world_size"), [
    ("gpt2", "ddp", None, 2), ("gpt2", "1d", None, 2), ("gpt2", "sequence", None, 2), ("gpt2", "2d", (2, 2), 4),
    ("gpt2", "zero+1d", (2, 2), 4), ("resnet", "zero3", None, 2), ("mlp", "auto", (2, 2), 4), ("t5", "auto", None, 2),
])
def test_all_outputs_are_the_plain_models(pool: Any, name: str, mode: str, mesh: Any, world_size: int) -> None:
    for step, gradients, evaluated, placements in pool(world_size).run(both, name, mode, mesh):
        assert max(step, evaluated) <= 10 * TOLERANCE and gradients <= TOLERANCE, (step, gradients, evaluated)
        assert "Shard" in " ".join(placements), "left as they lie"


def kept(rank: int, world_size: int) -> list[str]:
    """What is said of outputs that are not kept."""
    case = CASES["gpt2"]()
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, precision="fp32")
    made = model(**case.inputs)
    assert type(made) is type(case.model(**case.inputs)) and isinstance(made.loss, Tensor)
    said = []
    for use in (lambda: made.logits.shape, lambda: made.logits[0], lambda: made["logits"].argmax(-1)):
        with pytest.raises(autopar.AutoparError) as refusal:
            use()
        said.append(str(refusal.value))
    return said


def test_other_outputs_say_how_they_are_kept(pool: Any) -> None:
    for said in pool(2).run(kept):
        assert all("output 'logits' is not kept" in text and 'returns="all"' in text for text in said)


@pytest.mark.parametrize("use", [
    lambda x: x + 1, lambda x: 1 - x, lambda x: x @ x, lambda x: -x, lambda x: x > 0, lambda x: x == 3, float, len,
    bool, list, abs, lambda x: 3 in x, lambda x: torch.softmax(x, -1), lambda x: torch.cat([torch.ones(2), x]),
    lambda x: torch.ones(2) * x, lambda x: nn.functional.relu(x), lambda x: x(1), lambda x: x.mean(), np.asarray,
])
def test_whatever_is_done_to_an_output_that_is_not_kept(use: Any) -> None:
    with pytest.raises(autopar.AutoparError, match=r"output 'logits' is not kept.*returns=\"all\""):
        use(NotKept("logits"))


def test_what_looks_for_absent_outputs_finds_one() -> None:
    output = NotKept("logits")
    assert output is not None and output != None and None not in (output,) and len({output}) == 1  # noqa: E711
    assert repr(copy.deepcopy(output)) == "<output logits not kept>"
