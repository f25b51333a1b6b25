"""What goes wrong in real use: ranks that differ, buffers written twice, state dicts across plans."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autopar
from tests.builders import CASES, quick
from tests.test_exactness import whole

pytestmark = pytest.mark.dist


class Centred(nn.Module):
    """Subtracts a running mean that it updates by two writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.get_buffer("mean")
        mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.out(x - mean).square().mean()


def buffers(rank: int, world_size: int) -> tuple[list[float], list[float]]:
    """Losses and the buffer at the end, compiled less plain."""
    torch.manual_seed(0)
    plain, x = Centred(), torch.randn(8, 4)
    reference = copy.deepcopy(plain)
    model = autopar.compile(plain, quick(world_size), inputs={"x": x}, precision="fp32")
    losses = [float(model(x=x).detach() - reference(x).detach()) for _ in range(3)]
    return losses, (model.state_dict()["mean"] - reference.get_buffer("mean")).tolist()


def test_buffers_written_twice(pool: Any) -> None:
    for losses, difference in pool(2).run(buffers):
        assert [*losses, *difference] == pytest.approx([0.0] * 7, abs=1e-6)


def started(rank: int, world_size: int, mode: str) -> tuple[list[float], list[float]]:
    """The first weights of the plain model on this rank and of the compiled one."""
    torch.manual_seed(rank)
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mine = plain[0].weight[0, :3].tolist()
    inputs = (torch.ones(4, 8), torch.zeros(4, 8))
    model = autopar.compile(plain, quick(world_size), inputs=inputs, loss_fn=nn.functional.mse_loss, mode=mode,
                            precision="fp32")
    return mine, whole(model.state_dict()["0.weight"])[0, :3].tolist()


@pytest.mark.parametrize("mode", ["ddp", "zero3", "1d"])
def test_all_start_with_the_weights_of_rank_zero(pool: Any, mode: str) -> None:
    found = pool(2).run(started, mode)
    assert found[0][0] != found[1][0]
    assert [after for _, after in found] == [found[0][0]] * 2


def moved(rank: int, world_size: int, source: str, target: str) -> float:
    """The largest difference after a state dict of one plan is loaded under another."""
    def compiled(mode: str, seed: int) -> Any:
        case = CASES["gpt2"]()
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.normal_()
        return autopar.compile(case.model, quick(world_size), inputs=case.inputs, mode=mode, precision="fp32")
    first, second = compiled(source, 1), compiled(target, 2)
    second.load_state_dict(first.state_dict())
    before, after = first.state_dict(), second.state_dict()
    assert "lm_head.weight" in before, "tied parameters go by all their names"
    return max(float((whole(before[n]) - whole(after[n])).abs().max()) for n in before)


@pytest.mark.parametrize(("source", "target"), [("zero3", "1d"), ("1d", "ddp"), ("zero3", "zero3")])
def test_state_dicts_of_dtensors_move_between_plans(pool: Any, source: str, target: str) -> None:
    assert pool(2).run(moved, source, target) == [0.0, 0.0]


def mixed(rank: int, world_size: int, trouble: str) -> str:
    """What a rank is told when ranks bring batches that do not go together."""
    case = CASES["gpt2"]()
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, mode="ddp", precision="fp32")
    case.call(model)
    late = {name: (x + rank) % 96 for name, x in case.inputs.items()}
    inputs = {"later data": late, "whole and half": case.part(1, 2) if rank else case.inputs}[trouble]
    try:
        case.call(model, inputs)
    except autopar.AutoparError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(("trouble", "words"), [("later data", "data differ"), ("whole and half", "different kinds")])
def test_batches_that_do_not_go_together_are_refused_everywhere(pool: Any, trouble: str, words: str) -> None:
    assert all(words in said for said in pool(2).run(mixed, trouble))


def unlike(rank: int, world_size: int, what: str) -> str:
    """What a rank is told when rank 1 is given another `what`."""
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    given: dict[str, Any] = {"inputs": (torch.ones(4, 8), torch.zeros(4, 8)), "mode": "zero3", "precision": "fp32"}
    if rank:
        plain[1].weight.requires_grad_(what != "trained")
        given |= {"inputs": {"inputs": None}, "mode": {"mode": "ddp"}, "precision": {"precision": "bf16"}}.get(what, {})
    try:
        autopar.compile(plain, quick(world_size), loss_fn=nn.functional.mse_loss, **given)
    except autopar.AutoparError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize(("what", "words"), [
    ("trained", ["1.weight", "trained, on rank 0", "frozen, on another"]), ("inputs", ["inputs=", "given", "absent"]),
    ("mode", ["zero3", "ddp"]), ("precision", ["fp32", "bf16"]),
])
def test_ranks_are_given_the_same(pool: Any, what: str, words: list[str]) -> None:
    for said in pool(2).run(unlike, what):
        assert all(word in said for word in words), said


def alone(rank: int, world_size: int, what: str, folder: str) -> str:
    """What a rank is told when rank 0 alone does what all have to do, and the other calls the model."""
    inputs = (torch.ones(4, 8), torch.zeros(4, 8))
    model = autopar.compile(nn.Linear(8, 8), quick(world_size), inputs=inputs, loss_fn=nn.functional.mse_loss,
                            mode="zero3", precision="fp32")
    done = {"save": lambda: autopar.save_checkpoint(folder, model), "gather": model.full_state_dict,
            "load": lambda: autopar.load_checkpoint(folder, model)}[what]
    try:
        model(*inputs) if rank else done()
    except autopar.AutoparError as error:
        return str(error)
    return "not refused"


@pytest.mark.parametrize("what", ["save", "load", "gather"])
def test_what_all_do_is_not_for_rank_zero(pool: Any, tmp_path: Any, what: str) -> None:
    for said in pool(2).run(alone, what, str(tmp_path)):
        assert "call them on each" in said, said
