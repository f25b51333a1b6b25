"""The sampler that suits a plan: every sample once, the same ones where the plan wants the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import autopar
from tests.builders import gpt2, quick

pytestmark = pytest.mark.dist
SAMPLES, BATCH = 20, 8


class Texts(Dataset[dict[str, torch.Tensor]]):
    """Sentences of random tokens that tell which one each is."""

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, 96, (SAMPLES, 16), generator=drawn)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i], "place": torch.tensor(i)}


def epochs(rank: int, world_size: int, mode: str, mesh: Any, options: dict[str, Any]) -> tuple[int, Any, list[float]]:
    """Parts of the batch, the samples of two epochs batch by batch, and the losses."""
    case = gpt2()
    model = autopar.compile(case.model, quick(world_size), mode=mode, mesh=mesh, precision="fp32",
                            **{"inputs": case.inputs, **options})
    sampler = model.sampler(Texts(), seed=3)
    loader = DataLoader(Texts(), batch_size=BATCH // sampler.num_replicas, sampler=sampler)
    places, losses = [], []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for batch in loader:
            places.append(batch.pop("place").tolist())
            losses.append(float(model(**batch).loss.detach()))
    return sampler.num_replicas, places, losses


@pytest.mark.parametrize(("mode", "mesh", "options", "parts"), [
    ("ddp", None, {}, 4), ("1d", None, {}, 1), ("zero+1d", (2, 2), {}, 2), ("zero+1d", (2, 2), {"batch": "local"}, 2),
    ("1d", None, {"batch": "local"}, 4), ("ddp", None, {"batch": "global"}, 1),
    ("zero+1d", (2, 2), {"inputs": None}, 4),
])
def test_every_sample_comes_once_and_where_it_is_wanted(pool: Any, mode: str, mesh: Any, options: dict[str, Any],
                                                        parts: int) -> None:
    found = pool(4).run(epochs, mode, mesh, options)
    assert [replicas for replicas, _, _ in found] == [parts] * 4
    groups = [found[start][1] for start in range(0, 4, 4 // parts)]
    assert [places for _, places, _ in found] == [group for group in groups for _ in range(4 // parts)]
    batches = [[i for group in groups for i in group[step]] for step in range(len(groups[0]))]
    half = len(batches) // 2
    first, second = (sorted(i for batch in run for i in batch) for run in (batches[:half], batches[half:]))
    assert first == second == list(range(SAMPLES)) and batches[:half] != batches[half:], "set_epoch shuffles anew"
    plain, texts = copy.deepcopy(gpt2().model), Texts().tokens
    with torch.no_grad():
        wanted = [float(plain(input_ids=texts[batch], labels=texts[batch]).loss) for batch in batches]
    for _, _, losses in found:
        assert losses == pytest.approx(wanted, abs=1e-5)
