"""Checkpoints: a resumed run is the uninterrupted one, whatever plan and rank count; what is not whole is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

import autopar
from autopar.checkpoint import HEAD, check_whole, latest, load, save
from autopar.core.errors import AutoparError
from tests.builders import CASES, Case, quick
from tests.pool import Pool

pytestmark = pytest.mark.dist

Pools = Callable[[int], Pool]
BREAK, STEPS = 5, 10
TOLERANCE = 1e-5
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=3e-3),
    "sgd": lambda parameters: SGD(parameters, lr=0.05),
    "momentum": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9),
}


@dataclass(frozen=True)
class Way:
    """A plan and a rank count."""

    mode: str
    world_size: int
    mesh: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.mode}-on-{self.world_size}"


@dataclass(frozen=True)
class Job:
    """What is trained, and how."""

    case: str = "gpt2"
    options: tuple[tuple[str, Any], ...] = (("dropout", 0.1),)
    optimizer: str = "adamw"

    def __str__(self) -> str:
        return f"{self.case}-{self.optimizer}"

    def build(self, way: Way, seed: int) -> tuple[Case, nn.Module, Optimizer]:
        """The case, its compiled model with weights of `seed`, an optimizer."""
        case = CASES[self.case](**dict(self.options))
        torch.manual_seed(seed)
        for parameter in case.model.parameters():
            nn.init.normal_(parameter, 0.0, 0.1)
        model = autopar.compile(case.model, quick(way.world_size), inputs=case.inputs, loss_fn=case.loss_fn,
                                precision="fp32", mode=way.mode, mesh=way.mesh)
        return case, model, OPTIMIZERS[self.optimizer](model.parameters())


def decay(step: int) -> float:
    return 1.0 / (1 + step)


def train(case: Case, model: Any, optimizer: Optimizer, steps: int, schedule: LambdaLR | None = None) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = case.call(model)
        loss.backward()
        model.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(float(loss))
    return losses


def first_part(rank: int, world_size: int, job: Job, way: Way, folder: str, at: int = BREAK) -> list[float]:
    """The whole curve of a run that saved at step `at`."""
    case, model, optimizer = job.build(way, 1)
    schedule = LambdaLR(optimizer, decay)
    losses = train(case, model, optimizer, at, schedule)
    save(folder, model, optimizer, step=at, losses=losses, schedule=schedule.state_dict())
    return losses + train(case, model, optimizer, STEPS - at, schedule)


def second_part(rank: int, world_size: int, job: Job, way: Way, folder: str, warm: int = 0) -> list[float]:
    """The curve of the run taken up again, `warm` steps after it began anew with other weights."""
    case, model, optimizer = job.build(way, 2)
    schedule = LambdaLR(optimizer, decay)
    train(case, model, optimizer, warm, schedule)
    progress = load(folder, model, optimizer)
    schedule.load_state_dict(progress["schedule"])
    assert progress["step"] == len(progress["losses"])
    rest: list[float] = progress["losses"]
    return rest + train(case, model, optimizer, STEPS - progress["step"], schedule)


MOVES = [
    (Job(), Way("ddp", 2), Way("zero3", 4)),
    (Job(), Way("zero3", 4), Way("1d", 2)),
    (Job(), Way("1d", 2), Way("auto", 4, (2, 2))),
    (Job(), Way("auto", 4, (2, 2)), Way("ddp", 1)),
    (Job(optimizer="momentum"), Way("1d", 4), Way("zero3", 2)),
    (Job(optimizer="sgd"), Way("zero3", 2), Way("1d", 4)),
    (Job("resnet", (("size", 32),)), Way("ddp", 2), Way("auto", 4)),
    (Job("resnet", (("size", 32),), "momentum"), Way("zero3", 4), Way("1d", 2)),
]


@pytest.mark.parametrize(("job", "before", "after"), [
    pytest.param(*move, marks=[pytest.mark.slow] * (place in (3, 5, 7))) for place, move in enumerate(MOVES)], ids=str)
def test_resumed_run_is_the_uninterrupted_one(pool: Pools, tmp_path: Path, job: Job, before: Way, after: Way) -> None:
    expected = pool(before.world_size).run(first_part, job, before, str(tmp_path))[0]
    for found in pool(after.world_size).run(second_part, job, after, str(tmp_path)):
        assert found == pytest.approx(expected, abs=TOLERANCE)
    assert abs(expected[0] - expected[-1]) > 100 * TOLERANCE


WAYS = (Way("ddp", 1), Way("zero2", 2), Way("1d", 4), Way("zero+1d", 4, (2, 2)), Way("ddp", 2), Way("zero3", 4),
        Way("2d", 4, (2, 2)), Way("1d", 2), Way("zero2", 4), Way("ddp", 4), Way("zero3", 2), Way("auto", 4, (2, 2)))
APART = (1, 4, 5, 6, 9)
"""How far ahead in WAYS those are that a run is resumed under."""


@pytest.mark.slow
@pytest.mark.parametrize("place", range(len(WAYS)), ids=lambda place: str(WAYS[place]))
def test_every_mode_on_every_rank_count(pool: Pools, tmp_path: Path, place: int) -> None:
    before = WAYS[place]
    expected = pool(before.world_size).run(first_part, Job(), before, str(tmp_path))[0]
    for after in (WAYS[(place + apart) % len(WAYS)] for apart in APART):
        for found in pool(after.world_size).run(second_part, Job(), after, str(tmp_path)):
            assert found == pytest.approx(expected, abs=TOLERANCE), str(after)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("at", "warm"), [(0, 0), (0, 2), (BREAK, 2)], ids=str)
def test_optimizer_before_and_after_its_first_step(pool: Pools, tmp_path: Path, optimizer: str, at: int,
                                                   warm: int) -> None:
    job = Job("mlp", (), optimizer)
    expected = pool(2).run(first_part, job, Way("zero3", 2), str(tmp_path), at)[0]
    found = pool(2).run(second_part, job, Way("1d", 2), str(tmp_path), warm)[0]
    assert found == pytest.approx(expected, abs=TOLERANCE)


def uneven(rank: int, world_size: int, folder: str) -> None:
    """Sizes that four ranks don't divide, a checkpoint right after an evaluation, and loading without an optimizer."""
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        plain = nn.Sequential(nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 2))
        return autopar.compile(plain, "cpu:4", inputs=inputs, loss_fn=nn.functional.cross_entropy, mode="zero3",
                               precision="fp32")
    inputs = (torch.ones(4, 5), torch.tensor([0, 1, 0, 1]))
    model = build(1)
    optimizer = AdamW(model.parameters())
    model(*inputs).backward()
    optimizer.step()
    with torch.no_grad():
        model.eval()(*inputs)
    save(folder, model, optimizer)
    other = build(2)
    load(folder, other)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(mine.full_tensor(), theirs.full_tensor()), name
    assert other.random_state() == model.random_state()


def test_uneven_parts(pool: Pools, tmp_path: Path) -> None:
    pool(4).run(uneven, str(tmp_path))


def save_twice(rank: int, world_size: int, folder: str) -> None:
    _, model, optimizer = Job("mlp", ()).build(Way("zero3", 2), 1)
    for step in range(2):
        save(folder, model, optimizer, step=step)


@pytest.fixture(scope="module")
def two_checkpoints(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("run")
    pool(2).run(save_twice, str(folder))
    return folder


def try_load(rank: int, world_size: int, folder: str, job: Job, parameters: str = "all") -> Any:
    """The step that was loaded, or what was said; the model must not have changed then."""
    _, model, optimizer = job.build(Way("1d", 2), 2)
    if parameters == "half":
        optimizer = AdamW(list(model.parameters())[:2])
    before = [p.full_tensor().clone() for p in model.parameters()]
    try:
        return load(folder, model, optimizer)["step"]
    except AutoparError as error:
        assert all(torch.equal(b, p.full_tensor()) for b, p in zip(before, model.parameters(), strict=True))
        return str(error)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def reword(path: Path) -> None:
    head = json.loads(path.read_text())
    head["contents"]["random"]["steps"] = 77
    path.write_text(json.dumps(head))


def age(path: Path) -> None:
    path.write_text(path.read_text().replace("autopar checkpoint 1", "autopar checkpoint 0"))


SHARD = "rank-00001.safetensors"
DAMAGES = {
    "head-missing": (HEAD, Path.unlink, "cannot read"),
    "head-cut": (HEAD, cut, "is not JSON"),
    "head-edited": (HEAD, reword, "checksum"),
    "other-format": (HEAD, age, "needed is 'autopar checkpoint 1'"),
    "shard-missing": (SHARD, Path.unlink, "is missing"),
    "shard-cut": (SHARD, cut, "cut short"),
    "shard-damaged": (SHARD, flip, "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_refused_on_all_ranks(pool: Pools, tmp_path: Path, two_checkpoints: Path,
                                                   damage: str) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint-000002"
    name, act, said = DAMAGES[damage]
    act(newest / name)
    first, second = pool(2).run(try_load, str(newest), Job("mlp", ()))
    assert first == second
    assert said in first
    if damage != "shard-damaged":  # which only reading it all can tell
        assert latest(tmp_path / "run") == tmp_path / "run" / "checkpoint-000001"
        assert pool(2).run(try_load, str(tmp_path / "run"), Job("mlp", ())) == [0, 0]


MISFITS = {
    "another-model": (Job("gpt2", ()), "all", "of another model"),
    "other-optimizer": (Job("mlp", (), "sgd"), "all", "the state of AdamW, this is SGD"),
    "other-groups": (Job("mlp", ()), "half", "groups"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused(pool: Pools, two_checkpoints: Path, misfit: str) -> None:
    job, parameters, said = MISFITS[misfit]
    first, second = pool(2).run(try_load, str(two_checkpoints), job, parameters)
    assert first == second
    assert said in first


def test_no_checkpoint_at_all(pool: Pools, tmp_path: Path) -> None:
    assert "no whole checkpoint (found: none at all)" in pool(2).run(try_load, str(tmp_path), Job("mlp", ()))[0]


def compiled_at_first_call(rank: int, world_size: int, folder: str) -> None:
    """A model that is traced at its first call, with an optimizer made before."""
    def build() -> tuple[Case, nn.Module, Optimizer]:
        case = CASES["mlp"]()
        model = autopar.compile(case.model, "cpu:2", loss_fn=case.loss_fn, mode="zero3", precision="fp32")
        return case, model, AdamW(model.parameters(), lr=3e-3)
    case, model, optimizer = build()
    with pytest.raises(AutoparError, match="call the model once"):
        save(folder, model, optimizer)
    losses = train(case, model, optimizer, 2)
    save(folder, model, optimizer, losses=losses)
    expected = train(case, model, optimizer, 2)
    case, model, optimizer = build()
    train(case, model, optimizer, 1)
    assert load(folder, model, optimizer) == {"losses": losses}
    assert train(case, model, optimizer, 2) == pytest.approx(expected, abs=TOLERANCE)


def test_compiled_at_the_first_call(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(compiled_at_first_call, str(tmp_path))


def failing_saves(rank: int, world_size: int, folder: str) -> list[str]:
    """What is said on saves that can't be."""
    _, model, optimizer = Job("mlp", ()).build(Way("zero3", 2), 1)
    said = []
    for where, arguments, progress in [
        (folder, (model, AdamW([nn.Parameter(torch.zeros(2))])), {}),
        (folder, (model, optimizer), {"log": object()}),
        (f"{folder}/{HEAD}/inside", (model, optimizer), {}),
        (folder, (nn.Linear(2, 2), optimizer), {}),
    ]:
        with pytest.raises(AutoparError) as error:
            save(where, *arguments, **progress)
        said.append(str(error.value))
    return said


def test_saves_that_cannot_be(pool: Pools, tmp_path: Path) -> None:
    (tmp_path / HEAD).write_text("a file, no folder")
    first, second = pool(2).run(failing_saves, str(tmp_path))
    assert first == second
    for text, said in zip(["not the compiled model's", "progress.log holds a object", "cannot write", "no plan yet"],
                          first, strict=True):
        assert text in said
    assert [p.name for p in tmp_path.iterdir()] == [HEAD]


def break_off(rank: int, world_size: int, folder: str) -> str:
    """A save in which rank 1 finds the disk full."""
    _, model, optimizer = Job("mlp", ()).build(Way("zero3", 2), 1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("os.fsync", full)
        with pytest.raises(AutoparError) as error:
            save(folder, model, optimizer, step=1)
    return str(error.value)


def full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")


def test_broken_off_save_leaves_the_earlier_ones(pool: Pools, tmp_path: Path, two_checkpoints: Path) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "run")
    said = pool(2).run(break_off, str(tmp_path / "run"))
    assert said[0] == said[1]
    assert "No space left" in said[0]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-000001", "checkpoint-000002"]
    check_whole(tmp_path / "run" / "checkpoint-000002")


def save_more(rank: int, world_size: int, folder: str) -> str:
    _, model, optimizer = Job("mlp", ()).build(Way("ddp", 2), 1)
    counter = MultiStepLR(optimizer, [3, 3, 7])
    path = save(folder, model, optimizer, schedule=counter.state_dict(), pair=(1, 2.5), inf=float("inf"))
    progress = load(folder, model, optimizer)
    assert progress == {"schedule": counter.state_dict(), "pair": (1, 2.5), "inf": float("inf")}
    return str(path)


def test_only_the_newest_stay_and_progress_is_as_given(pool: Pools, tmp_path: Path, two_checkpoints: Path) -> None:
    shutil.copytree(two_checkpoints, tmp_path / "run")
    (tmp_path / "run" / ".checkpoint-1").mkdir()
    path = pool(2).run(save_more, str(tmp_path / "run"))[0]
    assert path == str(tmp_path / "run" / "checkpoint-000003")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint-000002", "checkpoint-000003"]
    tensors = load_file(f"{path}/rank-00000.safetensors")
    assert tensors["0.0.weight"].shape == (32, 16)
