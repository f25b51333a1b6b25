"""A script for torchrun that trains a GPT-2 with dropout: `dropping.py OPTIONS TIMELINE`, options of compile as JSON.

Rank 0 prints the losses as JSON; with stages all draw the timeline.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

import autopar
from autopar import launch
from tests.builders import gpt2

STEPS = 4


def main(options: dict[str, Any], timeline: str) -> None:
    autopar.init()
    case = gpt2(dropout=0.1, layers=4)
    torch.manual_seed(5)
    model: Any = autopar.compile(case.model, inputs=case.inputs, precision="fp32", exact_dropout=True, **options)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    inputs = {name: x.to(launch.device()) for name, x in case.inputs.items()}  # type: ignore[union-attr]
    for _ in range(STEPS):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if dist.get_world_size() > 1:
        model.timeline(timeline)
    if dist.get_rank() == 0:
        print(json.dumps(losses))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
