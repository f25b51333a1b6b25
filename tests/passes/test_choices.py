"""What ways to do ops and to keep parameters cost, against each priced alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autopar.core.cluster import Cluster
from autopar.core.device import Device, Flops
from autopar.core.mesh import Mesh
from autopar.passes.choices import op_choices, op_work, storage_choices
from autopar.passes.costs import OPTIMIZERS
from autopar.passes.decision import Context
from autopar.passes.layout import local_bytes
from autopar.passes.modes import MODES
from autopar.passes.problem import Setting, build
from autopar.passes.strategies import assignments, storages
from tests.programs import annotated, model_context

DEVICE = Device("test", Flops(1e12, 4e12, 2e12), 0.5, 1e10, 1e11, 1e-5)


def check_ops(ctx: Context, mesh: Mesh) -> None:
    """Every choice is priced as its own assignment, whatever was priced before it."""
    for op in ctx.segmented.ops:
        options = assignments(op, mesh, MODES["auto"], ctx.through(op))
        for assignment, choice in zip(options, op_choices(ctx, op, options, mesh, DEVICE), strict=True):
            work = op_work(ctx, op, assignment, mesh)
            kept = sum(local_bytes(ctx.segmented.factored, r.node, ctx.emitted(op, r, assignment), mesh)
                       for r in op.results if r.node in ctx.gradients)
            backward = work.backward_seconds(DEVICE) if ctx.through(op) else 0.0
            told = (choice.name, choice.forward, choice.backward, choice.saved, choice.working)
            assert told == (",".join(assignment), work.forward_seconds(DEVICE), backward, kept, work.nbytes)


@pytest.mark.parametrize("mesh", [(2,), (4, 2), (2, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "gpt2", "resnet"])
def test_assignments_of_equal_parts_are_priced_as_each_alone(name: str, mesh: tuple[int, ...]) -> None:
    check_ops(model_context(name), Mesh(mesh))


@pytest.mark.parametrize("mesh", [(2, 2), (1, 2)], ids=str)
def test_a_value_read_twice_counts_once_where_both_want_it_alike(mesh: tuple[int, ...]) -> None:
    check_ops(annotated(lambda x: x @ x.t(), torch.randn(8, 8)), Mesh(mesh))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_storages_hold_less_the_more_parts_they_are_cut_into(name: str) -> None:
    ctx, mesh, optimizer = model_context("mlp"), Mesh((2, 2)), OPTIMIZERS[name]
    for node, users in ctx.parameters().items():
        options = storages(ctx.segmented.factored, node, users, mesh, MODES["auto"])
        whole = node.meta["val"].numel()
        for storage, choice in zip(options, storage_choices(ctx, node, options, mesh, optimizer, DEVICE), strict=True):
            elements = whole / storage.resting_parts(mesh)
            used = whole / 2 ** sum(isinstance(state, int) for state in storage.states)
            again = bool(storage.gathered) and not storage.kept
            assert choice.optimizer == pytest.approx(elements * optimizer.step_bytes / DEVICE.memory_bytes_per_s)
            assert choice.nbytes == pytest.approx(elements * (4 + optimizer.state_bytes))
            assert choice.gradient == pytest.approx(elements * 4)
            assert choice.saved == (4 * used if storage.kept else 0.0)
            assert choice.working == (8 * used if again else 0.0) + (4 * used if storage.gathered else 0.0)


def test_unequal_devices_are_priced_by_the_slowest_in_each_respect() -> None:
    """A matmul that its FLOP bound and a sum that its bytes do."""
    pair, mesh, one = Cluster.preset("2xA100-80GB"), Mesh((2,)), replace(DEVICE, peak=Flops(1e10, 1e10, 1e10))
    ctx = annotated(lambda x, w: (x @ w).sum(), torch.randn(64, 64), torch.nn.Parameter(torch.randn(64, 64)))
    slow = replace(one, peak=Flops(*(flops / 3 for flops in one.peak.table().values())))
    narrow = replace(one, memory_bytes_per_s=one.memory_bytes_per_s / 5, launch_s=2 * one.launch_s)
    both = replace(slow, memory_bytes_per_s=narrow.memory_bytes_per_s, launch_s=narrow.launch_s)

    def nodes(*devices: Device) -> tuple[object, ...]:
        cluster = replace(pair, devices=devices)
        return build(ctx, Setting(mesh, cluster, MODES["auto"], OPTIMIZERS["adamw"])).instance.nodes

    assert nodes(slow, narrow) == nodes(narrow, slow) == nodes(both, both)
    assert nodes(slow, narrow) != nodes(slow, slow) != nodes(one, one)
    assert nodes(one, slow) == nodes(slow, slow)
