"""Parameters of written programs: gathered whole in parts of any size, again where they are not kept; bad input."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autopar.codegen import private
from autopar.codegen.communicator import Communicator, Group
from autopar.codegen.executable import offline
from autopar.codegen.source.given import Given, inputs, values
from autopar.codegen.source.rank import Rank
from autopar.codegen.source.state import Resting, State
from autopar.core.errors import AutoparError
from autopar.core.mesh import Mesh

CPU = torch.device("cpu")
ALONE = Rank(offline(Mesh((1,))), CPU)
PARAMETERS = {
    "a": Resting((5, 3), "RR", gathered=(0,), dim=0), "b": Resting((4, 7), "RR", gathered=(0,), dim=1),
    "c": Resting((1,), "R", gathered=(0,), kept=True), "d": Resting((6, 4), "S0R", stored=(4, 6)),
    "e": Resting((3,), "R", gathered=(0,), trained=False), "f": Resting((2,), "R"),
}


def whole(name: str) -> Tensor:
    shape = PARAMETERS[name].shape
    return torch.rand(shape, generator=torch.Generator().manual_seed(ord(name)))


def gathered(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """By name, how far the gathered parameter and its gradient's part are off; a rank's loss counts as often as its
    number and one more."""
    place = Rank.on((world_size,), CPU)
    state = State.of(place, PARAMETERS, (), whole)
    with state.use(**{n: n for n in PARAMETERS}) as p:
        held = {n: x.detach().clone() for n, x in p.items()}
        loss = sum((rank + 1) * (x * x.detach()).sum() for x in p.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    found = {}
    for name, resting in PARAMETERS.items():
        full = whole(name).reshape(resting.stored or resting.shape)
        mine = resting.split(full, place)
        times = 3 if resting.gathered else rank + 1
        grad = state.tensors[name].grad
        assert (grad is not None) == resting.trained and state.tensors[name].shape == mine.shape
        expected = full if resting.gathered else mine
        off = 0.0 if grad is None or not grad.numel() else float((grad - times * mine).abs().max())
        found[name] = float((held[name] - expected).abs().max()), off
    return found


@pytest.mark.dist
def test_gathered_and_scattered_in_parts_of_any_size(pool: Any) -> None:
    for found in pool(2).run(gathered):
        assert set(found) == set(PARAMETERS)
        assert all(value == 0.0 and grad < 1e-6 for value, grad in found.values()), found


def collectives(rank: int, world_size: int, kept: bool) -> list[str]:
    """What two layers send in a step."""
    sent: list[str] = []

    def told(name: str) -> Any:
        plain = getattr(private, name)

        def call(*args: Any) -> Tensor:
            sent.append(name)
            return plain(*args)  # type: ignore[no-any-return]
        return call

    resting = {f"{layer}.{n}": Resting((4, 4), "RR", gathered=(0,), kept=kept) for layer in "01" for n in ("w", "v")}
    state = State.of(Rank.on((world_size,), CPU), resting, (), lambda _: torch.eye(4))
    x = torch.ones(2, 4)
    with mock.patch.multiple(private, all_gather=told("all_gather"), reduce_scatter=told("reduce_scatter")):
        for layer in "01":
            with state.use(**state.block(layer)) as p:
                x = torch.relu(x @ p["w"].t()) @ p["v"]
        sent.append("backward")
        x.sum().backward()
    return sent


@pytest.mark.dist
@pytest.mark.parametrize(("kept", "backward"), [
    (True, ["reduce_scatter"] * 2), (False, ["all_gather", "reduce_scatter"] * 2)])
def test_a_segment_is_gathered_at_once_and_again_unless_it_is_kept(pool: Any, kept: bool, backward: list[str]) -> None:
    for sent in pool(2).run(collectives, kept):
        assert sent == ["all_gather"] * 2 + ["backward"] + backward


def alive(rank: int, world_size: int, kept: bool) -> bool:
    """Whether a gathered parameter outlives its use, with a backward to come."""
    resting = {"w": Resting((4, 4), "RR", gathered=(0,), kept=kept)}
    state = State.of(Rank.on((world_size,), CPU), resting, (), lambda _: torch.eye(4))
    x = torch.ones(2, 4, requires_grad=True)
    with state.use(w="w") as p:
        y = x @ p["w"].t()
    storage = private.StorageWeakRef(p.pop("w").untyped_storage())
    gc.collect()
    lives = not storage.expired()
    y.sum().backward()
    assert x.grad is not None
    return lives


@pytest.mark.dist
@pytest.mark.parametrize("kept", [True, False])
def test_only_what_is_kept_outlives_its_use(pool: Any, kept: bool) -> None:
    assert pool(2).run(alive, kept) == [kept] * 2


def refused(rank: int, world_size: int) -> str:
    try:
        Rank.on((4,), CPU)
    except AutoparError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_refused_on_another_number_of_ranks(pool: Any) -> None:
    assert all("mesh 4 of 4 ranks, 2 are running" in said for said in pool(2).run(refused))


def test_random_values_are_the_same_wherever_they_are_drawn() -> None:
    buffers = {"mean": Given((2,), torch.float32), "count": Given((), torch.int64)}
    first, second, other = (values(None, seed, PARAMETERS, buffers) for seed in (1, 1, 2))
    assert torch.equal(first("a"), second("a")) and not torch.equal(first("a"), other("a"))
    assert first("mean").tolist() == [1.0, 1.0] and first("count").tolist() == 0 and first("count").dtype == torch.int64
    given = {"ids": Given((50, 4), torch.int64, below=3), "x": Given((2, 3), torch.bfloat16)}
    found = inputs(None, 0, given, ALONE)
    assert set(found["ids"].flatten().tolist()) == {0, 1, 2} and found["x"].dtype == torch.bfloat16
    second = Rank(Communicator(Mesh((2,)), {(0,): Group("", 1, (0, 1))}), CPU)
    part = inputs(None, 0, {"ids": replace(given["ids"], samples=(0,)), "x": given["x"]}, second)
    assert torch.equal(part["ids"], found["ids"][25:]) and torch.equal(part["x"], found["x"])


@pytest.mark.parametrize(("held", "said"), [
    ({"a": (5, 3)}, "lacks b, c, d, 5 of 6 tensors needed"), (dict.fromkeys(PARAMETERS, (9,)), r"a has shape \(9,\)")])
def test_a_state_that_does_not_fit_is_refused(tmp_path: Path, held: dict[str, tuple[int, ...]], said: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in held.items()}, tmp_path / "state.safetensors")
    with pytest.raises(AutoparError, match=said):
        values(str(tmp_path / "state.safetensors"), 0, PARAMETERS, {})


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inputs.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AutoparError, match="cannot read"):
        inputs(str(path), 0, {"x": Given((100,), torch.float32)}, ALONE)
    with pytest.raises(AutoparError, match="cannot read"):
        inputs(str(tmp_path / "none"), 0, {}, ALONE)
