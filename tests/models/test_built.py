"""Inputs of built models, as calls."""

from __future__ import annotations

import torch
from torch import nn

from autopar.models.built import BuiltModel, images, tokens


def test_a_dict_is_a_call_by_keyword() -> None:
    inputs = tokens(3, 5)
    assert BuiltModel("m", nn.Identity(), inputs).call == ((), inputs)


def test_a_tuple_is_a_call_by_position() -> None:
    inputs = images(3, 8)
    assert BuiltModel("m", nn.Identity(), inputs).call == (inputs, {})


def test_inputs_have_shapes_and_no_storage() -> None:
    ids, (pixels, classes) = tokens(3, 5), images(3, 8)
    found = [(t.shape, t.dtype, t.device.type) for t in (ids["input_ids"], ids["labels"], pixels, classes)]
    assert found == [((3, 5), torch.long, "meta"), ((3, 5), torch.long, "meta"),
                     ((3, 3, 8, 8), torch.float32, "meta"), ((3,), torch.long, "meta")]
