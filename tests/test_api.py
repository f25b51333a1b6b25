"""`compile` and `plan` as users call them: what is meant is taken, the rest is refused alike on every rank."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autopar import api
from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError
from tests.builders import quick

X, Y = torch.ones(8, 16), torch.zeros(8, dtype=torch.long)


class Net(nn.Module):
    """Sixteen in, four out; a loss where there is a target."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 4)

    def forward(self, x: Tensor, target: Tensor | None = None, scale: float = 1.0) -> Tensor:
        output: Tensor = self.down(self.up(x).relu()) * scale
        return output if target is None else F.cross_entropy(output, target)


class Masked(Net):
    def forward(self, x: Tensor, target: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return x[x > 0].sum()


class Branch(Net):
    def forward(self, x: Tensor, target: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return super().forward(x) if x[x > 0].shape[0] > 3 else x.sum()


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


def uncopied() -> nn.Module:
    model = Net()
    model.handle = sys.stderr  # type: ignore[assignment]
    return model


# What differs from Net() on two processes, for compile and plan alike, and what is said of it.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model": None}, "model is None, of type NoneType, needed is a torch.nn.Module"),
    "a class": ({"model": Net}, "model is the class Net, needed is a torch.nn.Module; pass an instance, Net(...)"),
    "a name": ({"model": "gpt2"}, "model is 'gpt2', of type str"),
    "masked": ({"model": Masked, "inputs": (X,), "loss_fn": None}, "depends on the values of tensors"),
    "branch": ({"model": Branch, "inputs": (X,), "loss_fn": None}, "make the forward free of control flow"),
    "uncopied": ({"model": uncopied}, "can't be copied: move it out of the module"),
    "cluster": ({"cluster": 3}, "cluster is 3, of type int"),
    "cluster text": ({"cluster": "2xB200"}, "unknown device type 'B200'"),
    "cluster file": ({"cluster": "none/cluster.json"}, "cannot read none/cluster.json"),
    "cluster size": ({"cluster": "cpu:999999"}, "the most that can be planned for"),
    "mesh": ({"mesh": 2.0}, "mesh is 2.0, of type float"), "mesh text": ({"mesh": "2by1"}, "is not of the form 4x2"),
    "mesh size": ({"mesh": (4,)}, "mesh 4 has 4 devices, cluster cpu:2 has 2"),
    "mesh axes": ({"mesh": (2, 1, 1, 1, 1)}, "has 5 axes, a mesh has 1 to 4"),
    "mode and mesh": ({"mode": "2d", "mesh": 2}, "mode 2d wants q x q devices"),
    "mode": ({"mode": "fast"}, "unknown mode 'fast'"), "mode type": ({"mode": ["auto"]}, "mode is ['auto']"),
    "budget": ({"memory_budget": "lots"}, "memory 'lots' is not of the form 20GiB"),
    "budget 0": ({"memory_budget": 0}, "memory budget is 0"), "budget nan": ({"memory_budget": float("nan")}, "is nan"),
    "too little": ({"memory_budget": "1kB".replace("k", "")}, "budget"),
    "optimizer": ({"optimizer": torch.optim.AdamW}, "optimizer is <class"),
    "precision": ({"precision": torch.bfloat16}, "precision is torch.bfloat16"),
    "solver": ({"solver": "glpk"}, "unknown solver 'glpk'"), "pins": ({"pins": ["up"]}, "pins are ['up']"),
    "pinned op": ({"pins": {"op": "RR"}}, "no op is called 'op'"),
    "pinned to": ({"pins": {"up": "S9"}}, "op up can't be pinned to 'S9'"),
    "loss": ({"loss_fn": "mse"}, "loss_fn is 'mse'"), "keywords": ({"inputs": {"x": X}}, "by keyword only"),
    "no samples": ({"inputs": (X[:0], Y[:0])}, "a batch of 0 samples"), "few": ({"inputs": (X,)}, "argument: 'x'"),
    "columns": ({"inputs": (X[:, :3], Y)}, "can't be exported at "),
    "numbers": ({"inputs": (3, 4)}, "can't be exported"),
    "a list": ({"inputs": [X, Y]}, "inputs are a list of 2, needed is a tuple of positional arguments, such as (x, y)"),
    "layout": ({"ppranks": [[0, 1]]}, "lay out 2 stages, and mode auto is asked for without pp=; give pp=2 too"),
    "groups": ({"dpranks": [[0], [1]], "pp": 2}, "and there are no ppranks"),
    "batch of 3": ({"inputs": (X[:3], X[:3, :4]), "loss_fn": F.mse_loss, "mode": "ddp"},
                   "the batch of 3 does not divide over 2"),
}
COMPILED_ONLY: dict[str, tuple[dict[str, Any], str]] = {
    "meta": ({"model": on_meta}, "on meta, without values: up.weight and 3 more"),
    "batch": ({"batch": "whole"}, "unknown batch 'whole'; known: global, local"),
    "ranks": ({"cluster": "cpu:4"}, "cpu:4 has 4 devices, 2 ranks are running"),
    "plan": ({"plan": 3}, "plan is 3, of type int"), "plan file": ({"plan": "none.json"}, "cannot read none.json"),
    "plan and mesh": ({"plan": "p.json", "mesh": 2}, "a plan is given, which decides all, and mesh"),
    "lazy meta": ({"model": on_meta, "inputs": None}, "on meta, without values"),
    "lazy class": ({"model": Net, "inputs": None}, "model is the class Net"),
}


def refused(call: Any) -> tuple[str, str]:
    try:
        call()
    except AutoparError as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def given(mistake: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a mistake in them."""
    model = mistake.get("model", Net())
    made = {"model": model() if model in (Masked, Branch, uncopied, on_meta) else model}
    return {"cluster": "cpu:2", "inputs": (X, Y), "loss_fn": F.cross_entropy, **mistake, **made}


@pytest.mark.parametrize("name", MISTAKES)
def test_plan_refuses(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    mistake, said = MISTAKES[name]
    kind, text = refused(lambda: api.plan(**given(mistake)))
    assert said in text and "\n" not in text and kind != "nothing"
    assert capfd.readouterr() == ("", ""), "what torch has to say of a failure is not the user's"


def compile_all(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """What each mistake is refused with, and at the end that the ranks are still in step."""
    found = {name: refused(lambda: api.compile(**given(mistake)))  # noqa: B023
             for name, (mistake, _) in {**MISTAKES, **COMPILED_ONLY}.items()}
    model = api.compile(Net(), "cpu:2", inputs=(X, Y), loss_fn=F.cross_entropy)
    return {**found, "none": ("works", f"{model(X, Y).item():.3f}")}


@pytest.mark.dist
def test_compile_refuses_on_every_rank_alike(pool: Any) -> None:
    first, second = pool(2).run(compile_all)
    for name, (_, said) in {**MISTAKES, **COMPILED_ONLY}.items():
        text = first[name][1]
        assert said in text and "\n" not in text, (name, text)
        assert second[name][1] == text, name
    assert first["too little"][0] == second["too little"][0] == "Infeasible"
    assert first["none"] == second["none"]


def one_rank_only(rank: int, world_size: int, folder: str) -> list[tuple[str, str]]:
    """What ranks are told when only one of them makes a mistake, or only one has a file."""
    def attempt(**mistake: Any) -> tuple[str, str]:
        return refused(lambda: api.compile(**given(mistake)))
    mine = Path(folder) / str(rank)
    mine.mkdir()
    if rank == 0:
        Cluster.preset("cpu:2").save(mine / "cluster.json")
        api.plan(Net(), "cpu:2", inputs=(X, Y), loss_fn=F.cross_entropy).save(mine / "plan.json")
    return [
        attempt(cluster=mine / "cluster.json"),
        attempt(cluster=Cluster.preset("cpu:2" if rank else "2xH100")),
        attempt(model=Net() if rank else Net),
        attempt(model=Masked if rank else Net()),
        attempt(plan=mine / "plan.json"),
    ]


@pytest.mark.dist
def test_one_rank_s_mistake_ends_all(pool: Any, tmp_path: Path) -> None:
    first, second = pool(2).run(one_rank_only, str(tmp_path))
    wanted = ("cannot read", "the plan is for", "model is the class Net", "Net on rank 0 and Masked on another")
    for said, mine, other in zip(wanted, first, second, strict=False):
        assert said in mine[1] and mine[1] == other[1]
    assert first[-1] == second[-1] == ("nothing", ""), "rank 0's plan is everybody's"


def called(rank: int, world_size: int) -> list[float]:
    """Differences of losses and gradients to the plain model, in every way it may be called, however it was traced."""
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((X, Y), {}), ((X,), {"target": Y}), ((), {"x": X, "target": Y}), ((), {"target": Y, "x": X}),
        ((), {"scale": 1.0, "target": Y, "x": X}), ((X, Y, 1.0), {}),
    ]
    found = []
    for inputs in ((X, Y), {"target": Y, "x": X}, {"x": X, "target": Y, "scale": 1.0}, None):
        plain = Net()
        model = api.compile(copy.deepcopy(plain), quick(world_size), inputs=inputs, precision="fp32")
        for args, kwargs in ways:
            loss, reference = model(*args, **kwargs), plain(*args, **kwargs)
            loss.backward()
            found.append(float((loss - reference).detach().abs()))
    return found


@pytest.mark.dist
def test_called_as_the_plain_model_by_position_or_keyword(pool: Any) -> None:
    for differences in pool(2).run(called):
        assert differences == pytest.approx([0.0] * 24, abs=1e-6)


def miscalled(rank: int, world_size: int) -> list[tuple[str, str]]:
    """What calls are refused with that don't fit what was traced, by rank 0 alone at the end."""
    model = api.compile(Net(), "cpu:2", inputs=(X, Y), precision="fp32")
    calls: list[Any] = [
        lambda: model(X), lambda: model(x=X), lambda: model(X, Y, target=Y), lambda: model(X, Y, 2.0),
        lambda: model(X, Y, other=3), lambda: model(X.long(), Y), lambda: model(X, Y.float()),
        lambda: model(X, "labels"), lambda: model(X[:3], Y), lambda: model(X[:, :3], Y), lambda: model([X], Y),
        lambda: model(X) if rank == 0 else model(X, Y),
    ]
    found = [refused(call) for call in calls]
    return [*found, ("works", f"{model(X, Y).item():.4f}")]


@pytest.mark.dist
def test_calls_that_do_not_fit_are_refused_on_every_rank(pool: Any) -> None:
    first, second = pool(2).run(miscalled)
    wanted = ["made for x, target", "made for x, target", "2 by position, target", "3 by position",
              "2 by position, other", "input x is of torch.int64, the plan was made for torch.float32",
              "input target is of torch.float32", "input target is 'labels', of type str, the plan",
              "(3, 16)", "(8, 3)", "input x is [tensor("]
    for said, mine, other in zip(wanted, first, second, strict=False):
        assert said in mine[1] and mine == other
    assert first[-2:] == second[-2:] and "made for x, target" in first[-2][1]


def lazily(rank: int, world_size: int) -> list[tuple[str, str]]:
    """A first call that can't be planned is refused; the next one is a first call again."""
    model = api.compile(Net(), "cpu:2", precision="fp32")
    found = [refused(lambda: model(X[:0], Y[:0])), refused(lambda: model(X[:, :3], Y)), refused(lambda: model())]
    return [*found, ("works", f"{model(x=X, target=Y).item():.4f}"), refused(lambda: model(X, Y))]


@pytest.mark.dist
def test_a_first_call_that_does_not_fit(pool: Any) -> None:
    first, second = pool(2).run(lazily)
    assert first == second
    assert [said in text for said, (_, text) in zip(("0 samples", "can't be exported", "argument"), first, strict=False)
            ] == [True] * 3
    assert first[3][0] == "works" and first[4] == ("nothing", "")
