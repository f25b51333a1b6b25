"""A lowered program as the text of a Python file that runs under torchrun."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autopar.codegen.executable import Executable
from autopar.codegen.source.constants import constant_text
from autopar.codegen.source.layout import INDENT, statement
from autopar.codegen.source.ops import Text, call, literal
from autopar.codegen.source.resting import resting_spec
from autopar.codegen.source.runs import Run, runs_of
from autopar.codegen.source.steps import Steps, functions_of, shared_names
from autopar.passes.capture import COMPUTE_DTYPE
from autopar.passes.decision import Decision
from autopar.passes.functional import value_of
from autopar.passes.own_ops import LINEAR_CROSS_ENTROPY
from autopar.passes.strategies import gather_dim, storage_dims

aten = torch.ops.aten
LOOKS_UP = {aten.embedding.default: (0, 0), aten.cross_entropy_loss.default: (0, 1), aten.nll_loss_nd.default: (0, 1),
            LINEAR_CROSS_ENTROPY: (2, 0)}
"""Ops whose second operand has numbers of another one's, of which and on which dim."""
MAIN = '''
def main() -> None:
    given = options(__doc__)
    init()
    rank = Rank.on(MESH, device())
    state = State.of(rank, PARAMETERS, BUFFERS, values(given.state, given.seed, PARAMETERS, BUFFERS), GATHERED)
    batch = inputs(given.inputs, given.seed, INPUTS, rank)
    loss = step(rank, state, batch, constants(rank), rank.seeds(given.seed, SEGMENTS))
    if loss.requires_grad:
        loss.backward()
    norm = state.gradient_norm()
    if rank.is_first:
        print(f"loss {float(loss.detach()):.9g}, gradient norm {norm:.9g}")


if __name__ == "__main__":
    main()'''


@dataclass(frozen=True, slots=True)
class Title:
    """What a file says of itself: lines of its docstring, the name of the file."""

    lines: tuple[str, ...]
    file: str


def program_text(executable: Executable, title: Title) -> str:
    """The whole file."""
    decision = executable.decision
    functions = functions_of(executable)
    state = (*_parameters(decision), *_buffers(decision))
    steps = Steps(executable, functions, state, shared_names(executable))
    made = [(f'"{name}"', text) for name, text in _constants(executable).items()]
    sections = [
        _header(decision, title),
        [f"MESH = {literal(decision.mesh.shape)}", f"GATHERED = {_gather_dtype(decision)}",
         f"SEGMENTS = {len(executable.calls)}"],
        _table("PARAMETERS", "dict[str, Resting]", _parameters(decision).items()),
        _table("BUFFERS", "dict[str, Given]", _buffers(decision).items()),
        _table("INPUTS", "dict[str, Given]", _inputs(executable).items()),
        *(["", *function.lines] for function in functions.values()),
        ["", "def constants(rank: Rank) -> dict[str, Tensor]:", *_returned(made)],
        ["", "def step(rank: Rank, state: State, batch: dict[str, Tensor], constant: dict[str, Tensor],",
         "         seeds: tuple[Tensor, ...]) -> Tensor:", *steps.lines()],
        [MAIN],
    ]
    lines = "\n\n".join("\n".join(section) for section in sections) + "\n"
    return lines.replace("from torch import Tensor\n", _imports(lines), 1)


def _header(decision: Decision, title: Title) -> list[str]:
    run = f"torchrun --nproc-per-node {decision.mesh.size} {title.file}"
    return [
        '"""' + title.lines[0], "", *title.lines[1:], "",
        f"    {run} [--state state.safetensors] [--inputs inputs.safetensors]", "",
        "Comments have a value's shape on this rank and how it lies on the mesh: S0 is a dim cut over axis 0, R one",
        "that is whole, (P0) a partial sum over axis 0. `backward` is what a collective does to the gradient. A step",
        "takes this rank's part of each input whose samples are cut in INPUTS; the files have whole ones.",
        '"""', "", "import torch", "from torch import Tensor",
    ]


def _imports(text: str) -> str:
    """The imports that the text needs, behind that of torch."""
    names = ["inputs", "options", "values"]
    given = ", ".join(["Given", *names])
    again = "from autopar.codegen.source.runs import repeated\n" if "**repeated(" in text else ""
    packed = "from autopar.codegen.source.constants import unpacked\n" if "unpacked(" in text else ""
    aten_line = "\naten = torch.ops.aten\n" if "aten." in text.partition("import torch")[2] else ""
    return (f"from torch import Tensor\n\n{packed}from autopar.codegen.source.given import {given}\n"
            f"from autopar.codegen.source.rank import Rank\n{again}"
            "from autopar.codegen.source.state import Resting, State\nfrom autopar.launch import device, init\n"
            f"{aten_line}")


def _table(name: str, kind: str, rows: Iterable[tuple[str, Text]]) -> list[str]:
    """A dict of calls, one a line."""
    lines = [line for run in runs_of(dict(rows)) for line in _run_lines(run)]
    return [f"{name}: {kind} = {{", *lines, "}"] if lines else [f"{name}: {kind} = {{}}"]


def _run_lines(run: Run[Text]) -> list[str]:
    """The rows of blocks that are alike, once."""
    rows = [f"{literal(key)}: {value}," for key, value in run.rows.items()]
    if len(run.numbers) == 1:
        return [f"{INDENT}{row}" for row in rows]
    numbers = f"range({run.numbers.start}, {run.numbers.stop})" if run.numbers.start else f"range({run.numbers.stop})"
    head = f"{INDENT}**repeated({literal(run.path)}, {numbers}, {{"
    return [head, *(f"{INDENT * 2}{row}" for row in rows), f"{INDENT}}}),"]


def _returned(rows: list[tuple[str, Text]]) -> list[str]:
    lines = [line for key, value in rows for line in _entry(key, value)]
    return [f"{INDENT}return {{", *lines, f"{INDENT}}}"] if lines else [f"{INDENT}return {{}}"]


def _entry(key: str, value: Text) -> list[str]:
    first, *rest = statement("", value, "", 2)
    lines = [f"{INDENT * 2}{key}: {first.strip()}", *rest]
    return [*lines[:-1], f"{lines[-1]},"]


def _gather_dtype(decision: Decision) -> str:
    precision = decision.context.segmented.factored.program.precision
    return str(COMPUTE_DTYPE[precision]) if precision.endswith("-mixed") else "None"


def _parameters(decision: Decision) -> dict[str, Text]:
    """By name, how each parameter rests."""
    factored = decision.context.segmented.factored
    return {factored.program.sources[node.name].name: _resting(decision, node) for node in decision.storage}


def _resting(decision: Decision, node: fx.Node) -> Text:
    factored, storage = decision.context.segmented.factored, decision.storage[node]
    shape, dims, sizes = tuple(node.meta["val"].shape), storage_dims(factored, node), factored.refined(node)
    stored = tuple(torch.Size(sizes[i] for i in dim).numel() for dim in dims)
    told: dict[str, object] = {} if stored == shape else {"stored": stored}
    if storage.gathered:
        dim = gather_dim(dims, sizes, storage, decision.mesh)
        assert dim is not None
        told |= {"gathered": storage.gathered, "dim": dim} | ({"kept": True} if storage.kept else {})
    if node not in decision.context.gradients:
        told["trained"] = False
    return call("Resting", (shape, resting_spec(decision, node)), told)


def _buffers(decision: Decision) -> dict[str, Text]:
    program = decision.context.segmented.factored.program
    used = {n for s in decision.context.segmented.segments for n in s.externals}
    return {program.sources[n.name].name: call("Given", (tuple(n.meta["val"].shape), n.meta["val"].dtype), {})
            for n in program.placeholders("buffer") if n in used}


def _inputs(executable: Executable) -> dict[str, Text]:
    program, specs = executable.decision.context.segmented.factored.program, executable.target.inputs
    found = {}
    for node in program.placeholders("input"):
        value = value_of(node)
        if value is not None:
            told: dict[str, object] = {} if value.is_floating_point() else {"below": _below(node)}
            told |= {"samples": specs[node].dims[0]} if node in specs else {}
            found[program.sources[node.name].name] = call("Given", (tuple(value.shape), value.dtype), told)
    return found


def _below(node: fx.Node) -> int:
    """What whole numbers have to be less than to be rows of all tables that they are looked up in, and classes of all
    losses that they come to; 2 where there are none."""
    seen = [node]
    for each in seen:  # grows on the way
        seen += [user for user in each.users if user not in seen and _is_whole(user)]
    limits = (_limit(user, seen) for each in seen for user in each.users)
    return min((limit for limit in limits if limit), default=2)


def _is_whole(node: fx.Node) -> bool:
    value = value_of(node)
    return value is None or not value.is_floating_point()


def _limit(node: fx.Node, numbers: list[fx.Node]) -> int:
    """The size of the dim that `node` looks `numbers` up in, 0 where it does not."""
    if node.target not in LOOKS_UP or node.args[1] not in numbers:
        return 0
    place, dim = LOOKS_UP[node.target]
    table = value_of(node.args[place])
    assert table is not None
    return int(table.shape[dim])


def _constants(executable: Executable) -> dict[str, Text]:
    program = executable.decision.context.segmented.factored.program
    used = {n for c in executable.calls for n in c.segment.externals}
    held: dict[str, Tensor] = {program.sources[n.name].name: program.constants[n.name]
                               for n in program.placeholders("constant") if n in used}
    return {name: constant_text(value) for name, value in held.items()}
