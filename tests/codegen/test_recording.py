"""What constructors do to parameters is done again as they did it, for any of them alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autopar.core.errors import AutoparError
from autopar.material import read_material
from autopar.meta_start import empty, recorded


class Drawn(nn.Module):
    """Parameters made in all the ways that constructors have: of draws, of numbers, of views, of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.steps = nn.Parameter(torch.arange(6.0).reshape(2, 3).t() * 2)
        self.drawn = nn.Parameter(torch.randn(3, 4) * 0.1 + 5)
        self.table = nn.Parameter(torch.from_numpy(np.arange(4.0, dtype=np.float32)))
        self.whole = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
        self.register_buffer("counts", torch.arange(4))
        nn.init.orthogonal_(self.up.weight)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        self.up.bias.data[3:5].fill_(7.0)
        with torch.no_grad():
            self.down.bias.copy_(self.drawn.reshape(-1)[:8])
            self.scale[0] += 10
        self.twin = copy.deepcopy(self.down)
        self.rates = [x.item() for x in torch.linspace(0, 1, 3)]


FIXED = {"scale": torch.tensor([11.0, 2.0]), "steps": torch.arange(6.0).reshape(2, 3).t() * 2,
         "table": torch.arange(4.0)}


def values(model: nn.Module, seed: int) -> dict[str, Tensor]:
    found = {}
    for name, tensor in (*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if b.is_meta)):
        record = recorded(tensor)
        assert tensor.is_meta and record is not None, name
        found[name] = record.value(tensor, seed)
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
    return found


def test_values_are_what_the_constructor_makes() -> None:
    with empty():
        model = Drawn()
    found = values(model, 0)
    assert all(torch.equal(found[name], value) for name, value in FIXED.items())
    rows = found["up.weight"]
    assert torch.allclose(rows.t() @ rows, torch.eye(8), atol=1e-5), "orthogonal"
    assert torch.allclose(found["whole"] @ found["whole"].t(), torch.eye(4), atol=1e-5)
    assert 0.01 < found["down.weight"].std() < 0.03, "truncated normal"
    assert torch.equal(found["up.bias"][3:5], torch.full((2,), 7.0))
    assert 4 < found["drawn"].mean() < 6 and torch.equal(found["down.bias"], found["drawn"].reshape(-1)[:8])
    assert torch.equal(found["twin.weight"], found["down.weight"]), "a copy is one"
    assert torch.equal(model.get_buffer("counts"), torch.arange(4)) and model.rates == [0.0, 0.5, 1.0]


def test_draws_depend_on_the_seed_and_on_nothing_else() -> None:
    with empty():
        first = Drawn()
    torch.randn(5)
    with empty():
        second = Drawn()
    before = torch.get_rng_state()
    mine, again, other = values(first, 1), values(second, 1), values(first, 2)
    assert torch.equal(torch.get_rng_state(), before), "the caller's draws are its own"
    assert all(torch.equal(mine[name], again[name]) for name in mine)
    assert {n for n in mine if torch.equal(mine[n], other[n])} == set(FIXED)
    assert not torch.equal(mine["up.weight"][:8, :8], mine["down.weight"][:8, :8])


def test_ties_and_attributes_stay() -> None:
    with empty():
        shared = nn.Parameter(torch.randn(4, 4))
        shared.mark = "kept"  # type: ignore[attr-defined]
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        first.weight = second.weight = shared
        with torch.no_grad():
            shared.zero_()
    assert first.weight is second.weight is shared and shared.is_meta and shared.mark == "kept"  # type: ignore[attr-defined]
    assert torch.equal(values(first, 0)["weight"], torch.zeros(4, 4))


def test_a_type_changed_inside_is_recorded() -> None:
    with empty():
        model = nn.Linear(4, 4).to(torch.bfloat16)
    assert values(model, 0)["weight"].dtype == torch.bfloat16


def outside() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(2, 2)


def converted() -> nn.Module:
    with empty():
        model = nn.Linear(2, 2)
    return model.to(torch.bfloat16)


def with_lost_buffer() -> nn.Module:
    with empty():
        model = nn.Linear(2, 2)
    model.register_buffer("shadow", model.weight.detach() * 2)
    return model


@pytest.mark.parametrize(("build", "init", "said"), [
    (outside, "model", "how the model initialises weight and 1 more was not recorded"),
    (converted, "model", "convert or copy"), (with_lost_buffer, "model", "initialises shadow was not recorded"),
    (outside, None, "on meta, without values: weight and 1 more"),
    (outside, 3, "init is 3, of type int"), (outside, "", "init is ''"),
    (outside, "no/such", "no/such is no file and no folder"),
])
def test_what_has_no_values_is_refused(build: Callable[[], nn.Module], init: object, said: str) -> None:
    with pytest.raises(AutoparError, match=said) as error:
        read_material(init, build())
    assert "\n" not in str(error.value)


def test_buffers_made_of_parameters_are_made_with_them() -> None:
    with empty():
        model = parametrizations.spectral_norm(nn.Linear(6, 4), n_power_iterations=100)
    found = values(model, 1)
    left = torch.linalg.svd(found["parametrizations.weight.original"])[0][:, 0]
    assert found["parametrizations.weight.0._u"].dot(left).abs() == pytest.approx(1, abs=1e-3)


def test_buffers_that_are_not_saved_want_values(tmp_path: Path) -> None:
    with empty():
        model = nn.Linear(2, 2)
        model.register_buffer("shadow", model.weight.detach() * 2, persistent=False)
    save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, tmp_path / "model.safetensors")
    assert torch.equal(values(model, 0)["shadow"], 2 * values(model, 0)["weight"])
    with pytest.raises(AutoparError, match="no values for them, as they are not saved: shadow; build"):
        read_material(tmp_path, model)


def test_a_constructor_that_looks_at_values_is_refused() -> None:
    with empty(), pytest.raises(AutoparError, match=r"looks at the values of a tensor at .*test_recording\.py:\d+ in"):
        parametrizations.orthogonal(nn.Linear(4, 4))
    whole = parametrizations.orthogonal(nn.Linear(4, 4))
    with empty():
        model = nn.Sequential(whole, nn.Linear(4, 4))
    assert read_material("model", model).records.keys() == {"1.weight", "1.bias"}  # type: ignore[attr-defined]
