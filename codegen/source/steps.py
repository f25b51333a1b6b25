"""The function `step` of a written program: its segments in order, runs of equal ones as loops."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import fx

from autopar.codegen.executable import Call, Executable
from autopar.codegen.source.layout import INDENT, statement
from autopar.codegen.source.names import Scope, word
from autopar.codegen.source.ops import Text, literal
from autopar.codegen.source.segment import Function, written
from autopar.passes.decision import Decision
from autopar.passes.ops import block_of

_NUMBERED = re.compile(r"(?P<before>.*\.)?(?P<number>\d+)")


@dataclass(frozen=True, slots=True)
class Turn:
    """One call as lines of `step`, in which `path` stands for the block's path and `seed` for its seed's number."""

    path: str
    number: int
    lines: tuple[str, ...]


PATH, SEED = "\0path\0", "\0seed\0"
"""What stands in the lines of a turn until it is known whether they are those of a loop."""


def functions_of(executable: Executable) -> dict[int, Function]:
    """A function for every distinct lowered segment, by the identity of it, named after the segments it is of."""
    scope = Scope()
    scope.used |= {"State", "Rank", "step", "main", "constants"}
    found: dict[int, Function] = {}
    for call in executable.calls:
        if id(call.lowered) not in found:
            name = scope.new(re.sub(r"(?<=[a-z])_\d+$", "", call.segment.name) if block(call, executable.decision)
                             else call.segment.name)
            found[id(call.lowered)] = written(call, name, words(call, executable.decision), executable.target)
    return found


def block(call: Call, decision: Decision) -> str:
    """The module path of the block that a segment is, empty for what is between blocks."""
    return block_of(decision.context.segmented.ops[call.segment.first].main)


def held_names(call: Call, decision: Decision) -> tuple[str, ...]:
    """For each external its name if it is a parameter or a buffer, else an empty text."""
    sources = decision.context.segmented.factored.program.sources
    held = ("parameter", "buffer")
    return tuple(sources[n.name].name if n.op == "placeholder" and sources[n.name].kind in held else ""
                 for n in call.segment.externals)


def words(call: Call, decision: Decision) -> tuple[str, ...]:
    """What a function calls its externals: parts of the state by their paths in the block, what comes from other
    segments `x`, or by what made it."""
    program, producer = decision.context.segmented.factored.program, decision.context.producer
    path, found = block(call, decision), []
    for node, name in zip(call.segment.externals, held_names(call, decision), strict=True):
        if name:
            found.append(word(name.removeprefix(f"{path}.")))
        elif node.op == "placeholder":
            found.append(word(program.sources[node.name].name.removeprefix("constant_")))
        else:
            base = decision.context.segmented.factored.base(node)[0]
            made = decision.context.segmented.ops[producer[base]].name
            found.append("x" if "x" not in found else word(made))
    return tuple(found)


@dataclass(eq=False)
class Steps:
    """Writes `step`. `state` are the names of all parameters and buffers, `shared` those of gathered parameters that
    several segments use."""

    executable: Executable
    functions: dict[int, Function]
    state: tuple[str, ...]
    shared: tuple[str, ...]
    scope: Scope = field(default_factory=Scope)
    known: dict[fx.Node, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The whole function."""
        decision = self.executable.decision
        factored = decision.context.segmented.factored
        self.scope.used |= {"x", "p", "i", "seeds", "shared", "constant", *(f.name for f in self.functions.values())}
        for node in factored.program.graph.nodes:
            if node.op == "placeholder":
                source = factored.program.sources[node.name]
                kind = {"input": "batch", "constant": "constant"}.get(source.kind, "")
                self.known[node] = f"{kind}[{literal(source.name)}]"
        turns = [self._turn(i, call) for i, call in enumerate(self.executable.calls)]
        body = [line for run in _runs(turns) for line in _looped(run)]
        outputs = [self.known[factored.base(o)[0]] for o in factored.program.whole_outputs()]
        last = f"return {', '.join(outputs)}"
        names = {word(name): name for name in self.shared}
        if names:
            opened = statement("", Text("with state.use", tuple(f"{w}={literal(n)}" for w, n in names.items())))
            opened[-1] += " as shared:"
            body = [*opened, *(INDENT + line for line in [*body, INDENT + last])]
        else:
            body.append(INDENT + last)
        return body

    def _turn(self, number: int, call: Call) -> Turn:
        function, path = self.functions[id(call.lowered)], block(call, self.executable.decision)
        names = held_names(call, self.executable.decision)
        own = {w: n for w, n in zip(function.words, names, strict=True) if n and n not in self.shared}
        given = [f"{w}={self.known[node]}" for w, n, node in
                 zip(function.words, names, call.segment.externals, strict=True) if not n]
        given += [f"{w}=shared[{literal(word(n))}]" for w, n in zip(function.words, names, strict=True)
                  if n in self.shared]
        seeded = [f"seed=seeds[{SEED}]"] if function.seeded else []
        arguments = ("rank", *given, *(["**p"] if own else []), *seeded)
        target = ", ".join(self._exported(number, call))
        depth = 2 if own else 1
        lines = statement(target, Text(function.name, arguments), "", depth)
        return Turn(path, number, tuple([*self._opened(path, own), *lines] if own else lines))

    def _opened(self, path: str, own: dict[str, str]) -> list[str]:
        """The line that opens the parameters of a segment."""
        inside = {word(n.removeprefix(f"{path}.")): n for n in self.state if path and n.startswith(f"{path}.")}
        if inside == own and len(own) > 1:
            return [f"{INDENT}with state.use(**state.block({PATH})) as p:"]
        opened = statement("", Text("with state.use", tuple(f"{w}={literal(n)}" for w, n in own.items())))
        opened[-1] += " as p:"
        return opened

    def _exported(self, number: int, call: Call) -> Iterable[str]:
        """Names for what a call returns: `x` for what the next call alone reads."""
        readers = [{i for i, each in enumerate(self.executable.calls) if node in each.segment.externals}
                   for node in call.exports]
        lasting = set(self.executable.outputs)
        factored, context = self.executable.decision.context.segmented.factored, self.executable.decision.context
        for node, reading in zip(call.exports, readers, strict=True):
            passing = reading == {number + 1} and node not in lasting
            first = passing and all(self.known.get(n) != "x" for n in call.exports)
            made = context.segmented.ops[context.producer[factored.base(node)[0]]].name
            self.known[node] = "x" if first else self.scope.new(made)
        return [self.known[node] for node in call.exports]


def _runs(turns: list[Turn]) -> list[list[Turn]]:
    """Turns that make a loop together: equal lines, the block's number and the seed's growing by one."""
    runs: list[list[Turn]] = []
    for turn in turns:
        before = runs[-1][-1] if runs else None
        if before is not None and before.lines == turn.lines and PATH in "".join(turn.lines) and _follows(before, turn):
            runs[-1].append(turn)
        else:
            runs.append([turn])
    return runs


def _follows(before: Turn, turn: Turn) -> bool:
    first, second = _NUMBERED.fullmatch(before.path), _NUMBERED.fullmatch(turn.path)
    return bool(first and second and first["before"] == second["before"]
                and int(second["number"]) == int(first["number"]) + 1)


def _looped(run: list[Turn]) -> list[str]:
    """The lines of a run, in a loop where there are several turns."""
    first = run[0]
    if len(run) == 1:
        return [_filled(line, str(literal(first.path)), str(first.number)) for line in first.lines]
    found = _NUMBERED.fullmatch(first.path)
    assert found
    start = int(found["number"])
    shift = first.number - start
    seed = f"i + {shift}" if shift > 0 else f"i - {-shift}" if shift else "i"
    head = f"{INDENT}for i in range({start}, {start + len(run)}):" if start else f"{INDENT}for i in range({len(run)}):"
    path = 'f"' + (found["before"] or "") + '{i}"'
    return [head, *(INDENT + _filled(line, path, seed) for line in first.lines)]


def _filled(line: str, path: str, seed: str) -> str:
    return line.replace(PATH, path).replace(SEED, seed)


def shared_names(executable: Executable) -> tuple[str, ...]:
    """The parameters that are gathered and that several segments use."""
    decision = executable.decision
    sources = decision.context.segmented.factored.program.sources
    gathered = {sources[n.name].name for n, storage in decision.storage.items() if storage.gathered}
    users = Counter(itertools.chain.from_iterable(set(held_names(c, decision)) for c in executable.calls))
    return tuple(name for name in users if users[name] > 1 and name in gathered)
