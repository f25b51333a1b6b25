"""Where two plans differ."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2.0**30


@dataclass(frozen=True, slots=True)
class Changed:
    """What each of two plans says of one thing; None where one does not have it."""

    name: str
    left: str | None
    right: str | None

    def __str__(self) -> str:
        return f"{self.name}: {self.left or 'none'} | {self.right or 'none'}"


@dataclass(frozen=True, slots=True)
class Difference:
    """The words, ops and parameters that two plans decide differently; seconds a step and bytes a device of each."""

    words: tuple[Changed, ...]
    ops: tuple[Changed, ...]
    parameters: tuple[Changed, ...]
    seconds: tuple[float, float]
    nbytes: tuple[float, float]

    def __str__(self) -> str:
        (first, second), (held, holds) = self.seconds, self.nbytes
        lines = [*map(str, self.words)]
        for what, changed in (("ops", self.ops), ("parameters", self.parameters)):
            lines += [f"{len(changed)} {what} differ:" if changed else f"no {what} differ"]
            lines += [f"  {change}" for change in changed]
        return "\n".join([*lines, f"step: {1e3 * first:.3f} ms | {1e3 * second:.3f} ms, "
                                  f"{1e3 * (second - first):+.3f} ms",
                          f"memory per device: {held / GIB:.3f} GiB | {holds / GIB:.3f} GiB, "
                          f"{(holds - held) / GIB:+.3f} GiB"])


def changes(left: dict[str, tuple[str, ...]], right: dict[str, tuple[str, ...]]) -> tuple[Changed, ...]:
    """The names whose values differ; told by the first parts of the values that do."""
    found = []
    for name in dict.fromkeys([*left, *right]):
        mine, other = left.get(name), right.get(name)
        if mine is None or other is None:
            found.append(Changed(name, mine[0] if mine else None, other[0] if other else None))
        elif mine != other:
            found.append(Changed(name, *next((a, b) for a, b in zip(mine, other, strict=True) if a != b)))
    return tuple(found)
