"""Models by name: as large as published, on meta, quiet, with inputs that make a loss."""

from __future__ import annotations

import sys

import pytest
from torch import nn

from autopar.core.cluster import Cluster
from autopar.core.errors import AutoparError, UnknownName
from autopar.models.built import BuiltModel
from autopar.models.catalog import DEFAULT_BATCH, MODELS
from autopar.models.registry import build
from autopar.passes.capture import capture, keep_loss
from autopar.planner import Request, prepare, solve, verify

# Parameters, shared ones counted once: of the published weights, torchvision's for ResNets; GPT-3 by its formula,
# layers · (12 · width² + 13 · width) + (vocabulary + sequence) · width + 2 · width.
PARAMETERS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 96 * (12 * 12288**2 + 13 * 12288) + (50304 + 2048) * 12288 + 2 * 12288,
    "bert-base": 109_514_298, "bert-large": 335_174_458,
    "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "opt-13b": 12_853_473_280,
    "llama-7b": 6_738_415_616, "llama-8b": 8_030_261_248, "vit-b16": 86_567_656,
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}
PLACES = {"gpt3-175b": ("32x8xA100-80GB", (32, 8))}


def shapes(built: BuiltModel) -> list[tuple[int, ...]]:
    args, kwargs = built.call
    return [tuple(tensor.shape) for tensor in (*args, *kwargs.values())]


def test_every_name_has_a_published_size() -> None:
    assert set(PARAMETERS) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_built_as_published_without_storage(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    built = build(name)
    tensors = [*built.model.parameters(), *built.model.buffers()]
    assert sum(p.numel() for p in built.model.parameters()) == PARAMETERS[name]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert built.model.training and built.name == name
    assert {shape[0] for shape in shapes(built)} == {DEFAULT_BATCH}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "batch", "seq", "wanted"), [
    ("gpt2", 3, 7, [(3, 7), (3, 7)]),
    ("gpt2", 3, None, [(3, 1024), (3, 1024)]),
    ("bert-base", None, None, [(DEFAULT_BATCH, 512), (DEFAULT_BATCH, 512)]),
    ("vit-b16", 5, None, [(5, 3, 224, 224), (5,)]),
    ("resnet18", 5, None, [(5, 3, 224, 224), (5,)]),
])
def test_inputs_have_the_batch_asked_for(name: str, batch: int | None, seq: int | None,
                                         wanted: list[tuple[int, ...]]) -> None:
    assert shapes(build(name, batch, seq)) == wanted


@pytest.mark.parametrize(("name", "seq", "said"), [
    ("gpt2", 1025, "at most 1024 tokens, asked for are 1025"),
    ("bert-base", 600, "at most 512 tokens, asked for are 600"),
    ("resnet50", 128, "images of 224x224, not sequences of 128"),
    ("vit-b16", 128, "images of 224x224, not sequences of 128"),
])
def test_sequences_that_do_not_fit_are_refused(name: str, seq: int, said: str) -> None:
    with pytest.raises(AutoparError, match=said):
        build(name, 8, seq)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownName, match="gpt5"):
        build("gpt5")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AutoparError, match=r"pip install 'autopar\[models\]'") as refusal:
        build("gpt2")
    assert "'gpt2' needs transformers" in str(refusal.value)
    assert isinstance(build("resnet18").model, nn.Module)


def test_loglevel_of_transformers_is_left_as_it_was() -> None:
    logging = pytest.importorskip("transformers").logging
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        build("gpt2")
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize(("name", "seq"), [("gpt2", 8), ("bert-base", 8), ("resnet18", None)])
def test_traced_quietly_to_a_scalar_loss(name: str, seq: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    built = build(name, 2, seq)
    program = keep_loss(capture(built.model, built.call, "bf16-mixed", built.loss_fn))
    loss = next(output for output in program.outputs if output is not None).meta["val"]
    assert loss.shape == () and loss.is_floating_point()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_plans(name: str) -> None:
    preset, mesh = PLACES.get(name, ("8xA100-80GB", (8,)))
    cluster, built = Cluster.preset(preset), build(name, 32, None if MODELS[name].longest is None else 512)
    context = prepare(capture(built.model, built.call, "bf16-mixed", built.loss_fn))
    plan, _ = solve(context, cluster, Request(name, mesh=mesh))
    assert verify(plan, context, cluster) == pytest.approx((plan.seconds.step, plan.memory.total), rel=1e-6)


@pytest.mark.parametrize(("name", "ranks"), [
    ("opt-125m", 4), ("bert-base", 2), pytest.param("llama-8b", 8, marks=pytest.mark.slow),
    pytest.param("gpt3-175b", 8, marks=pytest.mark.slow),
])
def test_1d_cuts_the_classes_of_a_vocabulary_that_divides(name: str, ranks: int) -> None:
    built = build(name, 2, 128)
    context = prepare(capture(built.model, built.call, "bf16-mixed", built.loss_fn))
    plan, _ = solve(context, Cluster.preset(f"{ranks}xA100-80GB"), Request(name, "1d", memory_budget=2.0**60))
    taken = {op.name: op.strategy for op in plan.ops}
    assert taken["cross_entropy_loss"] == "R(P0) = RS0"
