"""From a name to a model on `meta` with inputs and loss: nothing is downloaded, nothing allocated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import nn

from autopar.core.errors import AutoparError
from autopar.models.built import BuiltModel, images, tokens
from autopar.models.catalog import DEFAULT_BATCH, FAMILIES, IMAGE_SIZE, MODELS, Entry, Family, check_name, is_reference
from autopar.models.factory import build_own
from autopar.models.resnet import resnet


def build(name: str, batch: int | None = None, seq: int | None = None) -> BuiltModel:
    """The model called `name` in MODELS, or the user's own for `path/to/file.py:factory` (see `factory`).

    `batch` counts samples of the global batch (None: DEFAULT_BATCH), `seq` tokens a sample (None: the model's longest).
    Raises UnknownName, and AutoparError for a sequence that the model can't take or when transformers is missing.
    """
    if is_reference(check_name(name)):
        return build_own(name, batch, seq)
    entry, samples = MODELS[name], batch or DEFAULT_BATCH
    length = _length(name, entry, seq)
    if entry.family == "resnet":
        with torch.device("meta"):
            plain = resnet(name).train()
        return BuiltModel(name, plain, images(samples, IMAGE_SIZE), nn.functional.cross_entropy)
    model = _from_transformers(name, FAMILIES[entry.family], entry)
    if length is not None:
        return BuiltModel(name, model, tokens(samples, length))
    return BuiltModel(name, model, dict(zip(("pixel_values", "labels"), images(samples, IMAGE_SIZE), strict=True)))


def _length(name: str, entry: Entry, seq: int | None) -> int | None:
    if entry.longest is None and seq is not None:
        raise AutoparError(f"{name} takes images of {IMAGE_SIZE}x{IMAGE_SIZE}, not sequences of {seq} tokens; leave "
                           "--seq out")
    if entry.longest is not None and seq is not None and seq > entry.longest:
        raise AutoparError(f"{name} takes sequences of at most {entry.longest} tokens, asked for are {seq}; give a "
                           "shorter --seq")
    return seq or entry.longest


def _from_transformers(name: str, family: Family, entry: Entry) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise AutoparError(f"model {name!r} needs transformers, which can't be imported ({error}); run `pip install "
                           "'autopar[models]'`, or take a resnet, which needs nothing more") from error
    with _quiet(transformers), torch.device("meta"):
        config = getattr(transformers, family.config)(**entry.settings)
        model: nn.Module = getattr(transformers, family.model)(config)
    model.loss_type = family.loss_type  # type: ignore[assignment]  # left open, transformers warns and guesses
    return model.train()


@contextlib.contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Only errors are told inside: configs have much to say about their own defaults."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
