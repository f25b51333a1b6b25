"""What workers of a pool import, once in the process that they are forked from; and that imports by its first use."""

from __future__ import annotations

import gc

import networkx  # noqa: F401
import torch._dynamo
import torch.distributed

import autopar.api
import autopar.passes.private
import autopar.pipelines  # noqa: F401
from tests.families import SEEN, as_written

torch.set_num_threads(1)  # no threads, which forks would not have
for name in SEEN:
    as_written(name)
gc.freeze()  # what all share is copied where a collection writes to it
