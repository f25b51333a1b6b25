"""A sharding problem as a pipeline of so many stages and micro-batches sees it, were the stages alike.

    step ≈ Σ (compute + inline) · (M + S − 1) / S + Σ (parameters' communication, optimizer) / S
    bytes ≈ Σ (parameters, gradients, state) / S + min(M, S) / S · Σ saved by ops + working

All of a stage's gradients are there when its last micro-batch ends, and what is gathered is kept by the stage. The
stages are cut by `solver.assembly` afterwards, which knows how unlike they are.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.core.sharding import Choice, Flow, Instance, Node
from autopar.passes.problem import Problem

Table = tuple[tuple[float, ...], ...]


def as_staged(problem: Problem) -> Instance:
    """The instance of a problem whose setting has stages."""
    stages, parts = problem.setting.stages, problem.setting.micro_batches
    instance, parameters = problem.instance, set(problem.parameter_nodes.values())
    each, once, flight = (parts + stages - 1) / stages, 1.0 / stages, min(parts, stages) / stages
    nodes = tuple(_node(node, each, once, once if n in parameters else flight) for n, node in enumerate(instance.nodes))
    segments = tuple(replace(segment, flows=tuple(_flow(flow, once if flow.parameter else each)
                                                  for flow in segment.flows)) for segment in instance.segments)
    every = tuple(node.count for node in instance.nodes)
    return Instance(nodes, segments, instance.budget,
                    tuple(replace(moment, saved=every, gradients=every) for moment in instance.moments))


def without_results(instance: Instance) -> Instance:
    """The same problem where results take no memory until the backward: less than any that makes some of them again."""
    return replace(instance, nodes=tuple(replace(node, choices=tuple(replace(c, saved=0.0) for c in node.choices))
                                         for node in instance.nodes))


def _node(node: Node, each: float, once: float, saved: float) -> Node:
    def choice(c: Choice) -> Choice:
        return replace(c, forward=c.forward * each, backward=c.backward * each, optimizer=c.optimizer * once,
                       nbytes=c.nbytes * once, gradient=c.gradient * once, saved=c.saved * saved)
    return replace(node, choices=tuple(map(choice, node.choices)))


def _flow(flow: Flow, share: float) -> Flow:
    def table(seconds: Table) -> Table:
        return tuple(tuple(value * share for value in row) for row in seconds)
    return replace(flow, forward=table(flow.forward), backward=table(flow.backward), parameter=False)
