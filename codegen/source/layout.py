"""Lines of Python no longer than a page is wide, 120 columns."""

from __future__ import annotations

from autopar.codegen.source.ops import Text

WIDTH = 112
"""Of a line; loops and `with` indent some further."""
INDENT = "    "


def statement(target: str, value: Text, comment: str = "", depth: int = 1) -> list[str]:
    """`target = value  # comment`, the arguments of a long call on lines of their own."""
    if len(INDENT * depth + target) > WIDTH // 2:
        first, *rest = statement("", value, comment, depth)
        return [f"{INDENT * depth}(", *filled(tuple(target.split(", ")), depth + 1),
                f"{INDENT * depth}) = {first.strip()}", *rest]
    start = INDENT * depth + (f"{target} = " if target else "")
    note = f"  # {comment}" if comment else ""
    line = f"{start}{value}"
    if len(line) <= WIDTH or value.args is None:
        above = [f"{INDENT * depth}# {comment}"] if comment and len(line) + len(note) > WIDTH else []
        return [*above, line if above else line + note]
    return [f"{start}{value.text}(", *filled(value.args, depth + 1), f"{INDENT * depth}){note}"]


def filled(items: tuple[str, ...], depth: int) -> list[str]:
    """`items` with commas, as many on a line as fit."""
    lines = [INDENT * depth]
    for item in items:
        if len(lines[-1]) + len(item) + 1 > WIDTH and lines[-1].strip():
            lines.append(INDENT * depth)
        lines[-1] += f"{item}, "
    return [line.rstrip() for line in lines]
