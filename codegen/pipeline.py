"""A step of a pipeline: the whole schedule inside of one call, its gradients kept for the loss's backward.

    a call            every action of the schedule in order, what comes from other stages received meanwhile; at the end
                      the sums of gradients that are made once a step, and those of parameters that several stages read
    loss.backward()   what was kept, times the gradient of the loss, goes to `.grad` as that of any loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from autopar.codegen.channels import Message, Post
from autopar.codegen.communicator import Axes, Communicator, Group
from autopar.codegen.control import alarm
from autopar.codegen.engine import Engine, Parameters
from autopar.codegen.executable import Executable, Turn, Values, seeds_for
from autopar.codegen.primitives import all_gather, all_reduce
from autopar.codegen.stages import Port, Stage
from autopar.codegen.stopwatch import Stopwatch
from autopar.codegen.tape import Pass, Sums, at_rest, rest_of
from autopar.codegen.travel import local_of
from autopar.core.errors import AutoparError, RankLost
from autopar.core.schedules import PHASES, Action, Phase, Pipe, Schedule, actions, arrivals
from autopar.passes.decision import Decision
from autopar.passes.micro import Count


@dataclass(frozen=True, eq=False)
class Staged:
    """One rank's part of a pipelined program: its stages, how a batch becomes micro-batches, what a loss counts.

    `cut` are the axes over which ranks of a stage have different samples, `spread` says whether the stages' ranks have
    different ones too.
    """

    decision: Decision
    stages: tuple[Stage, ...]
    pipe: Pipe
    schedule: Schedule
    counts: dict[str, Count]
    cut: Axes
    spread: bool
    batched: frozenset[fx.Node]

    def compiled(self, compiler: Callable[[Executable], Executable]) -> Staged:
        """The same with its stages' calls compiled."""
        return replace(self, stages=tuple(replace(stage, executable=compiler(stage.executable))
                                          for stage in self.stages))

    @property
    def training(self) -> bool:
        """Whether it has a backward."""
        return self.decision.context.segmented.factored.program.training


@dataclass(frozen=True, eq=False)
class Line:
    """Where a rank stands in the pipeline: its place, its column (one rank a place, joined by `group`), its stage's
    ranks, its links."""

    place: int
    group: Group
    inside: Communicator
    post: Post


@dataclass(eq=False)
class _Flight:
    """A micro-batch in a stage, between forward and backward."""

    running: Pass
    came: Values
    made: Values


@dataclass(eq=False)
class Step:
    """The run of one schedule."""

    staged: Staged
    line: Line
    engines: dict[int, Engine]
    sums: dict[int, Sums]
    given: list[Values]
    turn: Turn
    scale: float
    flights: dict[tuple[int, int], _Flight] = field(default_factory=dict)
    coming: dict[Action, Message] = field(default_factory=dict)
    watch: Stopwatch | None = None
    losses: list[Values] = field(default_factory=list)

    def play(self, *phases: Phase) -> None:
        """Run all actions of `phases`."""
        place, pipe = self.line.place, self.staged.pipe
        order = [action for action in actions(self.staged.schedule, pipe, place) if action.phase in phases]
        coming = arrivals(self.staged.schedule, pipe, phases)[place]
        last = {action.stage: action for action in order if action.phase == "backward"}
        self._expect(coming[0])
        self._begin(coming[0])
        for number, (action, following) in enumerate(zip(order, [*coming[1:], ()], strict=True)):
            self._expect(following)
            came = self.coming.pop(action).wait() if action in self.coming else []
            with nullcontext() if self.watch is None else self.watch.over(number, action.phase):
                if action.phase == "forward":
                    self._forward(action, came)
                else:
                    self._backward(action, came, action is last[action.stage])
            self._begin(following)
        self.line.post.finish()

    def _stage(self, action: Action) -> Stage:
        return next(stage for stage in self.staged.stages if stage.index == action.stage)

    def _expect(self, following: Sequence[Action]) -> None:
        """Have room for what actions need from other stages."""
        for action in following:
            stage, forward = self._stage(action), action.phase == "forward"
            ports = list(stage.received) if forward else _differentiable(stage.sent)
            self.coming[action] = self.line.post.receive(action.stage - forward, action.phase, ports)

    def _begin(self, following: Sequence[Action]) -> None:
        """Start to receive it."""
        for action in following:
            self.coming[action].begin()

    def _forward(self, action: Action, arrived: list[Tensor]) -> None:
        stage = self._stage(action)
        came = dict(zip((port.node for port in stage.received), arrived, strict=True))
        if self.staged.training:
            for port in _differentiable(stage.received):
                came[port.node].requires_grad_()
        engine = self.engines[stage.index]
        running = Pass(engine, {**self.given[action.micro], **came},
                       seeds_for(stage.executable, replace(self.turn, micro=action.micro), self.line.post.device))
        live = self.staged.training and torch.is_grad_enabled()
        values = {**came, **(running.forward() if live else engine.run(running.given, running.seeds, None))}
        if action.stage < self.staged.pipe.stages - 1:
            self.line.post.send(action.stage, "forward", [values[port.node].detach() for port in stage.sent])
        else:
            self.losses.append({port.node: values[port.node].detach() for port in stage.sent})
        if live:
            self.flights[action.stage, action.micro] = _Flight(running, came, values)

    def _backward(self, action: Action, grads: list[Tensor], last: bool) -> None:
        stage, flight = self._stage(action), self.flights.pop((action.stage, action.micro))
        sent, came = _differentiable(stage.sent), _differentiable(stage.received)
        if action.stage == self.staged.pipe.stages - 1:
            grads = [torch.full_like(flight.made[port.node], self.scale) for port in sent]
        passed = {port.node: grad for port, grad in zip(sent, grads, strict=True) if port.node in flight.came}
        roots = {port.node: grad for port, grad in zip(sent, grads, strict=True)
                 if port.node not in flight.came and flight.made[port.node].requires_grad}
        found = flight.running.tape.part(roots, self.sums[action.stage], last)
        if action.stage > 0:
            self.line.post.send(action.stage - 1, "backward", [
                _gradient(flight.came[port.node], found.get(port.node), passed.get(port.node)) for port in came])


def _differentiable(ports: Sequence[Port]) -> list[Port]:
    return [port for port in ports if port.differentiable]


def _gradient(value: Tensor, *parts: Tensor | None) -> Tensor:
    """The gradient of a value that came: of its uses here, and of what it was handed on to."""
    found = [grad for grad in parts if grad is not None]
    return sum(found[1:], found[0]) if found else torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Runs steps on one rank. `parameters` are those it holds, by name; `shared` the groups of ranks of other stages
    that hold the same part of one, for those that several stages read."""

    line: Line
    bringing: Parameters
    parameters: Callable[[], dict[str, nn.Parameter]]
    shared: dict[str, Group]
    engines: dict[int, Engine] = field(default_factory=dict)
    scales: list[float] = field(default_factory=lambda: [1.0])

    def __call__(self, staged: Staged, given: Values, turn: Turn, watch: Stopwatch | None = None) -> Values:
        """The program's outputs; the loss brings the gradients along when its backward is called. A `watch` is held
        over each action.

        Other ranks wait for what this one sends: where it fails all are told. Raises RankLost where another is gone.
        """
        try:
            return self._stepped(staged, given, turn, watch)
        except RankLost:
            raise
        except BaseException:
            alarm()
            raise

    def _stepped(self, staged: Staged, given: Values, turn: Turn, watch: Stopwatch | None) -> Values:
        scale = self.scales[0]
        engines = {stage.index: self._engine(stage) for stage in staged.stages}
        sums = {index: Sums(self.bringing, staged.pipe.micro_batches > 1) for index in engines}
        step = Step(staged, self.line, engines, sums, self._parts(staged, given), turn, scale, watch=watch)
        try:
            for engine in engines.values():
                engine.release()
            if not (staged.training and torch.is_grad_enabled()):
                with torch.no_grad():
                    step.play("forward")
                return self._told(staged, step)
            step.play(*PHASES)
            held = {name: p for name, p in self.parameters().items() if p.requires_grad}
            kept = self._finished(sums, held)
        finally:
            for engine in engines.values():
                engine.release()
        half = staged.decision.context.segmented.factored.program.precision == "fp16-mixed"
        if half:
            self._spread(kept)
        return {node: _with_gradients(value, _Stash(kept, scale, self.scales if half else []), list(held.values()))
                for node, value in self._told(staged, step).items()}

    def _engine(self, stage: Stage) -> Engine:
        """What runs a stage, its parameters gathered once a step."""
        return self.engines.setdefault(id(stage), Engine(stage.executable, self.bringing, "for a step"))

    def _parts(self, staged: Staged, given: Values) -> list[Values]:
        """What each micro-batch is given: its samples, the counts of the whole batch, and all else as it is."""
        mine = {node: all_gather(value, self.line.group, 0) if staged.spread and node in staged.batched else value
                for node, value in given.items()}
        mine |= self._counted(staged, mine)
        parts = staged.pipe.micro_batches
        cut = {node: value.chunk(parts) for node, value in mine.items() if node in staged.batched}
        return [{**mine, **{node: chunks[m] for node, chunks in cut.items()}} for m in range(parts)]

    def _counted(self, staged: Staged, mine: Values) -> Values:
        """What losses divide by, of the samples of all ranks of a stage."""
        program = staged.decision.context.segmented.factored.program
        nodes = {node.name: node for node in program.placeholders("input")}
        group = self.line.inside.group(staged.cut)
        found: Values = {}
        for name, count in staged.counts.items():
            whole = {each: all_gather(mine[nodes[each]], group, 0) if group.size > 1 and nodes[each] in staged.batched
                     else mine[nodes[each]] for each in count.inputs}
            found[program.node(name)] = count.of(whole)
        return found

    def _told(self, staged: Staged, step: Step) -> Values:
        """The outputs, summed over micro-batches and told to all stages by the last."""
        outputs = [factored_base(staged.decision, o) for o in
                   staged.decision.context.segmented.factored.program.whole_outputs()]
        found: Values = {}
        for node in dict.fromkeys(outputs):
            parts = [values[node] for values in step.losses]
            mine = torch.stack(parts).float().sum(0) if parts else torch.zeros((), device=self.line.post.device)
            found[node] = all_reduce(mine, self.line.group).to(node.meta["val"].dtype)
        return found

    def _finished(self, sums: dict[int, Sums], held: dict[str, nn.Parameter]) -> list[Tensor | None]:
        """The gradients, summed over the ranks of the stage and over the stages that read a parameter."""
        grads: dict[str, Tensor] = {}
        for each in sums.values():
            for name, grad in each.finish().items():
                grads[name] = grads[name] + grad if name in grads else grad
        for name, group in self.shared.items():  # in one order on all ranks
            if name in held:
                mine = grads[name] if name in grads else torch.zeros_like(local_of(held[name]))
                grads[name] = all_reduce(mine.contiguous(), group)
        return [at_rest(grads.get(name), rest_of(p)) for name, p in held.items()]


    def _spread(self, kept: list[Tensor | None]) -> None:
        """Spoil a gradient on every rank where one is spoilt on any: a GradScaler looks at those of its own stage."""
        locals_ = [local_of(grad) for grad in kept if grad is not None]
        most = [local.abs().amax().float() for local in locals_ if local.numel()]
        spoilt = (~torch.isfinite(torch.stack(most)).all()).float() if most else torch.zeros(
            (), device=self.line.post.device)
        for group in (self.line.group, self.line.inside.group(tuple(self.line.inside.mesh.axes))):
            spoilt = all_reduce(spoilt, group)
        for local in [local for local in locals_ if local.numel()][:1]:
            local.mul_(torch.where(spoilt > 0, torch.nan, 1.0))


def factored_base(decision: Decision, node: fx.Node) -> fx.Node:
    """The value that an output renames."""
    return decision.context.segmented.factored.base(node)[0]


@dataclass(eq=False)
class _Stash:
    """Gradients of a loss times `scale`. Where there are `scales` the next step's is that of the loss that is asked
    for: half precision loses gradients that a GradScaler means to keep."""

    kept: list[Tensor | None] | None
    scale: float
    scales: list[float]


class _Kept(torch.autograd.Function):
    """The loss as it is; its backward hands out gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, stash: _Stash, *_: nn.Parameter) -> Tensor:
        ctx.stash = stash
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        stash = ctx.stash
        if stash.kept is None:
            raise AutoparError("backward is called a second time on the loss of a pipeline, whose gradients are handed "
                               "out once; call the model again for another")
        kept, stash.kept = stash.kept, None
        for each in kept:
            if each is not None:
                local = local_of(each)
                local.mul_((grad.float() / stash.scale).to(local.dtype))
        if stash.scales:
            stash.scales[0] = float(grad) or 1.0
        return None, None, *kept


def _with_gradients(loss: Tensor, stash: _Stash, parameters: list[nn.Parameter]) -> Tensor:
    found: Tensor = _Kept.apply(loss, stash, *parameters)  # type: ignore[no-untyped-call]
    return found
