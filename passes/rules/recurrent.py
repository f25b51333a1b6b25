"""The rule of recurrent layers: samples are independent, all else is whole."""

from __future__ import annotations

import operator

from torch import fx

from autopar.passes.rules.nodes import call_of, joined, named, shape
from autopar.passes.rules.notation import Rule, letters, rule


def recurrent(node: fx.Node) -> Rule | None:
    """LSTM, GRU and plain layers; result 0 is the sequence, the others are last states (layer, sample, feature)."""
    call = call_of(node)
    if len(shape(call.args[0])) != 3 or node.target is not operator.getitem:
        return None
    def sequence(feature: str) -> str:
        return f"b s {feature}" if named(node, "batch_first") else f"s b {feature}"
    states = named(node, "hx")
    states = [states] if isinstance(states, fx.Node) else states
    held = [f"l b {feature}" for feature in letters("h", len(states))]
    parameters = [letters(f"p{'abcdefghij'[k // 26]}{chr(97 + k % 26)}", len(shape(p)))
                  for k, p in enumerate(named(node, "params"))]
    result = sequence("o") if node.args[1] == 0 else f"l b r{node.args[1]}"
    operands = [sequence("i"), *held, *map(joined, parameters)]
    letters_used = {letter for text in (*operands, result) for letter in text.split()}
    return rule(f"{', '.join(operands)} -> {result}", whole=joined(sorted(letters_used - {"b"})))
