"""Models on meta: their first values come from files or from their own constructors, in parts, on any rank count."""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import autopar
from autopar.core.errors import AutoparError
from autopar.material import read_material
from tests.builders import Case, gpt2, mlp, quick, resnet
from tests.pool import Pool

Pools = Callable[[int], Pool]
BUILDERS: dict[str, Callable[[], Case]] = {"gpt2": gpt2, "resnet": lambda: resnet(size=32), "mlp": mlp}


def started(name: str, world_size: int, init: Any, **options: Any) -> tuple[Case, Any]:
    """A case built on meta and compiled."""
    with autopar.empty():
        case = BUILDERS[name]()
    torch.manual_seed(3)
    model = autopar.compile(case.model, quick(world_size), inputs=case.inputs, loss_fn=case.loss_fn, precision="fp32",
                            init=init, **options)
    return case, model


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for n, t in state.items()}


def built(rank: int, world_size: int, name: str, mode: str, mesh: tuple[int, ...] | None) -> dict[str, Tensor]:
    case, model = started(name, world_size, "model", mode=mode, mesh=mesh)
    assert all(p.is_meta for p in case.model.parameters()), "the plain model has no memory still"
    case.call(model).backward()
    return whole(model.state_dict())


WAYS: list[tuple[int, str, tuple[int, ...] | None]] = [(1, "ddp", None), (2, "zero3", None), (4, "auto", (2, 2)),
                                                       (4, "1d", None)]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_own_initialisation_is_the_same_on_any_rank_count(pool: Pools, name: str) -> None:
    found = [pool(ranks).run(built, name, mode, mesh)[0] for ranks, mode, mesh in WAYS]
    plain = BUILDERS[name]().model.state_dict()
    assert all(list(state) == list(plain) for state in found)
    for key, value in plain.items():
        if "running" not in key and "tracked" not in key:
            assert all(torch.equal(found[0][key], other[key]) for other in found[1:]), key
        if value.numel() > 1000:
            assert found[0][key].std() == pytest.approx(float(value.std()), rel=0.2), key


# Files.


def write_single(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path / "weights.safetensors")
    return path / "weights.safetensors"


def write_folder(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path / "model.safetensors")
    return path


def write_indexed(path: Path, state: dict[str, Tensor]) -> Path:
    names = list(state)
    files = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, path / file)
    places = {name: file for file, held in files.items() for name in held}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def write_bf16(path: Path, state: dict[str, Tensor]) -> Path:
    return write_single(path, {n: t.bfloat16() if t.is_floating_point() else t for n, t in state.items()})


def write_base(path: Path, state: dict[str, Tensor]) -> Path:
    """As the model without its head is saved: without its prefix, with the masks that old versions kept."""
    old = {n.removeprefix("transformer."): t for n, t in state.items()}
    return write_single(path, old | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)})


FORMS = {"single": write_single, "folder": write_folder, "indexed": write_indexed, "bf16": write_bf16,
         "base": write_base}


def state_of(name: str) -> dict[str, Tensor]:
    """Values that no initialisation makes, a tied tensor once."""
    torch.manual_seed(7)
    plain = BUILDERS[name]().model.state_dict()
    first = {t.data_ptr() if t.ndim else n: n for n, t in reversed(plain.items())}
    return {n: torch.randn(t.shape) if t.is_floating_point() else t + 5
            for n, t in plain.items() if n in first.values()}


def loaded(rank: int, world_size: int, name: str, init: str, mode: str) -> dict[str, Tensor]:
    return whole(started(name, world_size, init, mode=mode)[1].state_dict())


@pytest.mark.dist
@pytest.mark.parametrize(("form", "name", "mode"), [
    ("single", "gpt2", "1d"), ("indexed", "gpt2", "zero3"), ("bf16", "gpt2", "auto"), ("base", "gpt2", "zero3"),
    ("folder", "resnet", "zero3"),
])
def test_files_are_read_as_they_are(pool: Pools, tmp_path: Path, form: str, name: str, mode: str) -> None:
    state = state_of(name)
    found = pool(2).run(loaded, name, str(FORMS[form](tmp_path, state)), mode)[0]
    for key, value in state.items():
        wanted = value.bfloat16().float() if form == "bf16" and value.is_floating_point() else value
        assert torch.equal(found[key], wanted), key
    if name == "gpt2":
        assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])


def saved(rank: int, world_size: int, folder: str) -> dict[str, Tensor]:
    _, model = started("gpt2", world_size, "model", mode="auto")
    autopar.save_checkpoint(folder, model, torch.optim.AdamW(model.parameters()))
    return whole(model.state_dict())


@pytest.mark.dist
def test_a_checkpoint_is_one_more_form(pool: Pools, tmp_path: Path) -> None:
    wanted = pool(4).run(saved, str(tmp_path))[0]
    found = pool(2).run(loaded, "gpt2", str(tmp_path), "zero3")[0]
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    shard = next(tmp_path.glob("*/rank-00001.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    said = pool(2).run(refusal, "gpt2", str(tmp_path))
    assert said[0] == said[1] and "checksum" in said[0]


def refusal(rank: int, world_size: int, name: str, init: str) -> str:
    with pytest.raises(AutoparError) as error:
        started(name, world_size, init.format(rank=rank))
    return str(error.value)


@pytest.mark.dist
def test_files_that_one_rank_lacks_or_has_otherwise(pool: Pools, tmp_path: Path) -> None:
    state = state_of("mlp")
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        kind = torch.float16 if rank else torch.bfloat16
        save_file({n: t.to(kind) for n, t in state.items()}, tmp_path / str(rank) / "model.safetensors")
    said = pool(2).run(refusal, "mlp", f"{tmp_path}/{{rank}}")
    assert all("the ranks see different files" in text for text in said)
    (tmp_path / "1" / "model.safetensors").unlink()
    said = pool(2).run(refusal, "mlp", f"{tmp_path}/{{rank}}")
    assert said[0] == said[1] and "has no model.safetensors" in said[0]


def first_call(rank: int, world_size: int) -> list[float]:
    """A model on meta that is compiled at its first call, with an optimizer made before."""
    with autopar.empty():
        case = mlp()
    torch.manual_seed(3)
    model = autopar.compile(case.model, quick(world_size), loss_fn=case.loss_fn, precision="fp32", mode="zero3",
                            init="model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = case.call(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.dist
def test_compiled_at_the_first_call(pool: Pools) -> None:
    one, two = pool(1).run(first_call)[0], pool(2).run(first_call)[0]
    assert one == pytest.approx(two, abs=1e-5) and one[-1] < one[0]


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(itertools.islice(state.items(), 1, None))


MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (without, "it lacks ['0.0.weight']"), "more": (lambda s: s | {"z": torch.ones(1)}, "has ['z'] besides"),
    "shape": (lambda s: s | {"0.0.weight": torch.ones(3, 4)}, "0.0.weight has shape [3, 4]"),
    "transposed": (lambda s: s | {"0.0.weight": torch.ones(16, 32)}, "needs [32, 16]"),
    "type": (lambda s: s | {"0.0.bias": torch.ones(32, dtype=torch.long)}, "0.0.bias is of torch.int64"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_files_of_another_model_are_refused(tmp_path: Path, misfit: str) -> None:
    change, said = MISFITS[misfit]
    with pytest.raises(AutoparError) as error:
        read_material(write_single(tmp_path, change(state_of("mlp"))), mlp().model)
    assert said in str(error.value) and "\n" not in str(error.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garbled(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"shape"', b'"shade"'))


def lying(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"[32,16]", b"[32,15]"))


def foreign(path: Path) -> None:
    path.write_bytes(b"\x80\x02}q\x00." * 10)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut": (cut, "cut short"), "garbled": (garbled, "not a whole safetensors file"), "gone": (Path.unlink, "lacks"),
    "lying": (lying, "not a whole safetensors file"), "pickle": (foreign, "not a whole safetensors file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_not_whole_are_refused(tmp_path: Path, damage: str) -> None:
    act, said = DAMAGES[damage]
    folder = write_indexed(tmp_path, state_of("mlp"))
    act(folder / "model-1-of-2.safetensors")
    with pytest.raises(AutoparError) as error:
        read_material(folder, mlp().model)
    assert (said in str(error.value) or "cannot read" in str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(("index", "said"), [
    ({"weight_map": {"0.0.weight": "../other.safetensors"}}, "needed is the name of a file beside it"),
    ({"weight_map": {"nowhere": "model-1-of-2.safetensors"}}, "lacks nowhere"), ({"map": {}}, "weight_map"),
])
def test_an_index_that_is_off(tmp_path: Path, index: Any, said: str) -> None:
    folder = write_indexed(tmp_path, state_of("mlp"))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(AutoparError, match=said):
        read_material(folder, mlp().model)


# Memory.

LAYERS, WIDTH, RANKS = 80, 1024, 4
LAYER_BYTES = WIDTH * WIDTH * 4


class Deep(nn.Module):
    """Layers of four MiB each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).relu()
        return F.mse_loss(x, y)


def status(field: str) -> int:
    """Bytes of this process that Linux tells of."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(field))
    return int(line.split()[1]) * 1024


def grown(rank: int, world_size: int, init: str) -> int:
    """By how many bytes a rank's memory grows at most while it gets its part of the model."""
    inputs = (torch.randn(world_size, WIDTH), torch.randn(world_size, WIDTH))
    with autopar.empty():
        warm = nn.Sequential(nn.Linear(8, 8))
    autopar.compile(warm, quick(world_size), inputs=(torch.randn(4, 8), torch.randn(4, 8)), loss_fn=F.mse_loss,
                    precision="fp32", init="model")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present
    before = status("VmRSS")
    with autopar.empty():
        plain = Deep()
    model = autopar.compile(plain, quick(world_size), inputs=inputs, mode="zero3", precision="fp32", init=init)
    peak = status("VmHWM") - before
    held = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[operator]
    assert held == LAYERS * LAYER_BYTES // world_size
    return peak


@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's figures")
@pytest.mark.parametrize("form", ["model", "file"])
def test_no_rank_holds_more_than_its_part_and_a_parameter(pool: Pools, tmp_path: Path, form: str) -> None:
    state = {f"layers.{i}.weight": torch.zeros(WIDTH, WIDTH) for i in range(LAYERS)} if form == "file" else {}
    init = str(write_single(tmp_path, state)) if state else form
    whole = LAYERS * LAYER_BYTES
    for peak in pool(RANKS).run(grown, init):
        print(f"{peak / 2**20:.0f} MiB at most, {whole / RANKS / 2**20:.0f} are a rank's, {whole / 2**20:.0f} all")
        assert whole / RANKS <= peak < whole / 2
