"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from autopar.plan_cache import FOLDER
from tests.pool import Pool

os.environ[FOLDER] = "off"  # of workers and commands too
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no processes that import torch to wait for kernels


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped, and said to be, where there is none."""
    missing = pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(missing)


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(world_size).run(function, *args)` on worker processes that are launched at the first use and kept."""
    pools: dict[int, Pool] = {}

    def get(world_size: int) -> Pool:
        return pools.setdefault(world_size, Pool(world_size))

    yield get
    for started in pools.values():
        started.close()
