"""Steps recorded as CUDA graphs: what a forward and a backward launch is launched again as one, without the host.

A pass is recorded once it has run as it is, so that all that compiles, measures or connects at first use has done so.
What it reads from outside is copied to where the recording reads it; parameters and buffers lie where they lay. What
it makes lies in memory that the next replay writes over, a forward's on that of the gradients too, so outputs and
gradients are handed out as copies.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from autopar.codegen import private
from autopar.codegen.control import exchanged
from autopar.codegen.engine import Engine, Seeds
from autopar.codegen.executable import Values
from autopar.codegen.tape import Pass, Stepping
from autopar.codegen.travel import local_of
from autopar.core.errors import AutoparError
from autopar.passes.functional import written

log = logging.getLogger("autopar")
Launches = Literal["recorded", "each"]
"""How a step's kernels are launched: by graphs that were recorded, or each by the host."""
WARM = 2
"""The passes that run as they are before one is recorded."""
ROOM = 1.2
"""The free memory that a recording needs over what a pass took, beside copies of gradients: steps without gradients
are not recorded, and take theirs beside it."""


@dataclass(eq=False)
class Recording:
    """Two graphs, of a forward and of its backward, and where they read and write."""

    engine: Engine
    given: Values
    seeds: Tensor
    outputs: Values
    grads: Values
    found: dict[str, Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    places: tuple[int, ...]
    current: weakref.ref[Replayed] | None = None

    @property
    def busy(self) -> bool:
        """Whether the last replayed forward still waits for its backward."""
        last = self.current() if self.current else None
        return last is not None and not last.done

    def end(self) -> None:
        """Let the graphs go, and with them NCCL."""
        self.forward.reset()
        self.backward.reset()


_open: weakref.WeakSet[Recording] = weakref.WeakSet()
"""All recordings there are."""


@functools.cache
def _end_with_groups() -> None:
    """From now on recordings end before the process groups do."""
    private.before_groups_end(_end_all)


def _end_all() -> None:
    for recording in _open:
        recording.end()


def places_of(engine: Engine) -> tuple[int, ...]:
    """Where parameters lie, and which are trained: what a recording takes as it is."""
    found = [engine.parameters.parameter(name) for name in engine.parameters.owners]
    return tuple(x for p in found for x in (local_of(p).data_ptr(), p.requires_grad))


def record(engine: Engine, given: Values, seeds: Seeds) -> Recording:
    """Record a pass of `engine`; nothing of it runs."""
    inputs = set(engine.executable.decision.context.segmented.factored.program.placeholders("input"))
    static = {node: x.clone() if node in inputs else x for node, x in given.items()}
    block = torch.zeros(2 * len(seeds), dtype=torch.int64, device=seeds[0][0].device)
    step = Pass(engine, static, tuple((seed,) for seed in block[::2].unbind()))
    pool, graphs = torch.cuda.graph_pool_handle(), (torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph())
    with torch.cuda.graph(graphs[0], pool=pool, capture_error_mode="thread_local"):
        made = step.forward()
    grads = {node: torch.ones_like(x) for node, x in made.items() if x.requires_grad}
    with torch.cuda.graph(graphs[1], pool=pool, capture_error_mode="thread_local"):
        found = step.backward(grads, keep=False)
    outputs = {node: x.detach() for node, x in made.items()}
    read = {node: x for node, x in static.items() if node in inputs}
    recording = Recording(engine, read, block, outputs, grads, found, *graphs, places_of(engine))
    _end_with_groups()
    _open.add(recording)
    return recording


@dataclass(eq=False)
class Replayed:
    """A pass that is replayed."""

    recording: Recording
    given: Values
    seeds: Seeds
    done: bool = False
    _trained: tuple[tuple[int, int], ...] = ()
    _read: tuple[int, ...] = ()
    _plain: Pass | None = None

    def forward(self) -> Values:
        """The outputs, in memory of their own."""
        recording = self.recording
        self._trained, self._read = self._parameter_versions(), self._input_versions()
        private.copy_all(list(recording.given.values()), [self.given[node] for node in recording.given])
        recording.seeds[::2].copy_(torch.stack([seed for seed, *_ in self.seeds]))
        recording.forward.replay()
        recording.current = weakref.ref(self)
        return {node: x.clone().requires_grad_(node in recording.grads) for node, x in recording.outputs.items()}

    def backward(self, grads: Values, keep: bool) -> dict[str, Tensor]:
        """The gradients of parameters; of a recording nothing is left after one backward, so that where there may be
        several the forward is run again. Raises AutoparError where it would not be what it was."""
        recording = self.recording
        if self._parameter_versions() != self._trained:
            raise AutoparError("a parameter was changed between a forward and its backward; call backward before the "
                               "optimizer's step")
        if keep or self.done:
            return self._again().backward(grads, keep)
        self.done = True
        for node, grad in grads.items():
            recording.grads[node].copy_(grad)
        recording.backward.replay()
        copies = {name: torch.empty_like(x) for name, x in recording.found.items()}
        private.copy_all(list(copies.values()), list(recording.found.values()))
        return copies

    def _again(self) -> Pass:
        """The pass as it is launched op by op."""
        if self._plain is None:
            program = self.recording.engine.executable.decision.context.segmented.factored.program
            if written(program):
                raise AutoparError("a second backward of one call is asked for (retain_graph=True), of which a "
                                   "recorded step keeps nothing, and its forward changes buffers, so that it can't be "
                                   "run again; pass compiler=\"inductor-no-cudagraphs\" to autopar.compile")
            if self._input_versions() != self._read:
                raise AutoparError("an input was changed between a forward and a backward with retain_graph=True; "
                                   "leave inputs as they are until then")
            self.done, self._plain = True, Pass(self.recording.engine, self.given, self.seeds)
            self._plain.forward()
        return self._plain

    def _parameter_versions(self) -> tuple[tuple[int, int], ...]:
        parameters = self.recording.engine.parameters
        return tuple(map(parameters.version, parameters.owners))

    def _input_versions(self) -> tuple[int, ...]:
        return tuple(self.given[node]._version for node in self.recording.given)


@dataclass(eq=False)
class Replays:
    """The recordings of a model's engines, and why some have none."""

    passes: dict[int, int] = field(default_factory=dict)
    made: dict[int, Recording] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)

    def step(self, engine: Engine, given: Values, seeds: Seeds) -> Stepping:
        """A pass, replayed where it can be; collective when one is recorded.

        What is recorded is let go where another engine comes for the first time, which may want its memory.
        """
        key = id(engine)
        if key not in self.passes:
            self.made.clear()
        if key in self.refused:
            return Pass(engine, given, seeds)
        recording = self.made.get(key)
        if recording is not None and recording.places != places_of(engine):
            del self.made[key]
            recording = None
        if recording is None and self._seen(key) > WARM:
            recording = self._recorded(engine, given, seeds)
        if recording is None or recording.busy:
            return Pass(engine, given, seeds)
        return Replayed(recording, given, seeds)

    def _seen(self, key: int) -> int:
        self.passes[key] = self.passes.get(key, 0) + 1
        return self.passes[key]

    def _recorded(self, engine: Engine, given: Values, seeds: Seeds) -> Recording | None:
        """A recording if all ranks make one."""
        made, reason = _tried(engine, given, seeds, len(self.passes))
        if all(fine for (fine,) in exchanged((int(made is not None),))):
            assert made is not None
            self.made[id(engine)] = made
            return made
        self.refused.add(id(engine))
        log.info("steps are launched op by op, as %s", reason or "another rank could not record one")
        return None


def _tried(engine: Engine, given: Values, seeds: Seeds, engines: int) -> tuple[Recording | None, str]:
    reason = obstacle(engine, engines)
    if reason:
        return None, reason
    try:
        return record(engine, given, seeds), ""
    except (RuntimeError, torch.AcceleratorError) as error:
        return None, f"one could not be recorded ({str(error).strip().partition(chr(10))[0]})"


def obstacle(engine: Engine, engines: int) -> str:
    """Why a pass of `engine` can't be recorded, empty if it can; memory that is cached is given back for it.

    Others of the `engines` need memory beside what a recording keeps for itself.
    """
    executable = engine.executable
    if any(call.lowered.host_seeded for call in executable.calls):
        return "dropout inside of attention is seeded by the host"
    gradients = executable.decision.context.gradients
    if len([node for node in executable.outputs if node in gradients]) != 1:
        return "other outputs than a loss are kept"
    engine.release()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    grads = sum(local_of(engine.parameters.parameter(name)).nbytes for name in engine.parameters.owners)
    took = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    free, needed = torch.cuda.mem_get_info()[0], grads + ROOM * took * min(engines, 2)
    if free < needed:
        return f"{free / 2**30:.1f} GiB are free, a recording takes up to {needed / 2**30:.1f}"
    return ""

