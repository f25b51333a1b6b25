"""Timelines as one page that needs nothing else: pictures in SVG, what each box is under the pointer."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from autopar.core.files import write_whole
from autopar.timeline import Box, Kind, Row, Timeline, gib

COLOURS: dict[Kind, tuple[str, str]] = {
    "forward": ("#4f81bd", "forward"), "backward": ("#e3963e", "backward"),
    "communication": ("#c0504d", "communication waited for"), "sending": ("#d99694", "sending to another stage"),
    "optimizer": ("#8064a2", "optimizer"), "bubble": ("#e4e4e4", "waiting")}
"""By kind its colour and what it is called."""
PALER = 0.3
"""How much paler each further stage of one device is."""
LEFT, WIDTH, RIGHT = 120.0, 1100.0, 90.0
BAR, BENEATH, HOLDS, GAP = 22.0, 4.0, 22.0, 8.0
"""Heights of a row's boxes, of what is sent, of its memory, and what is free behind."""
LETTER = 6.6
STYLE = """body{font:13px system-ui,sans-serif;margin:24px;color:#222}h2{font-size:15px;margin:18px 0 6px}
pre{font-size:12px;line-height:1.4;color:#444;white-space:pre-wrap}text{font:11px system-ui,sans-serif}
.key{display:inline-block;width:12px;height:12px;margin:0 5px 0 14px;vertical-align:-1px}rect:hover{opacity:.7}"""


def page(timelines: Sequence[Timeline], summary: str, path: Path) -> None:
    """Write the page, whole or not at all."""
    longest = max(timeline.end_s for timeline in timelines)
    keys = "".join(f'<span class="key" style="background:{colour}"></span>{name}' for colour, name in COLOURS.values())
    drawn = "\n".join(line for timeline in timelines for line in _drawn(timeline, longest))
    write_whole(path, f"<!DOCTYPE html>\n<html><head><meta charset='utf-8'><title>a step</title><style>{STYLE}</style>"
                      f"</head><body>\n<div>{keys}<span class='key' style='background:#9bbb59'></span>memory</div>\n"
                      f"{drawn}\n<pre>{html.escape(summary)}</pre>\n</body></html>\n")


def _drawn(timeline: Timeline, longest: float) -> Iterator[str]:
    """A heading and a picture, on the scale of the longest step."""
    most = timeline.fullest
    each = BAR + BENEATH + GAP + (HOLDS if most else 0.0)
    height = len(timeline.rows) * each + 24
    yield f"<h2>{html.escape(timeline.title)}</h2>"
    yield f'<svg width="{LEFT + WIDTH + RIGHT:g}" height="{height:g}">'
    yield from _grid(longest, height - 20)
    for number, row in enumerate(timeline.rows):
        top = number * each
        yield f'<text x="{LEFT - 8:g}" y="{top + 15:g}" text-anchor="end">{html.escape(row.title)}</text>'
        for box in row.boxes:
            yield from _box(box, top, WIDTH / longest)
        if row.memory:
            yield from _memory(row, top + BAR + BENEATH + HOLDS, most, timeline.step_s, WIDTH / longest)
    yield "</svg>"


def ticks(longest: float) -> list[float]:
    """Round moments on an axis of so many seconds, about eight."""
    step = 1e-9
    while longest / step > 8:
        step *= 2.5 if f"{step:e}"[0] == "2" else 2.0
    return [i * step for i in range(int(longest / step) + 1)]


def _grid(longest: float, height: float) -> Iterator[str]:
    for at in ticks(longest):
        x = LEFT + at / longest * WIDTH
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:g}" stroke="#eee"/>'
        yield f'<text x="{x:.1f}" y="{height + 14:g}" text-anchor="middle" fill="#888">{1e3 * at:g} ms</text>'


def _box(box: Box, top: float, scale: float) -> Iterator[str]:
    x, width = LEFT + box.start_s * scale, (box.end_s - box.start_s) * scale
    beneath = box.kind == "sending"
    y, height = (top + BAR, BENEATH) if beneath else (top, BAR)
    opacity = f' fill-opacity="{max(0.4, 1 - PALER * box.chunk):g}"' if box.chunk else ""
    told = f"{box.told}: {1e3 * box.start_s:.3f} to {1e3 * box.end_s:.3f} ms, {1e3 * (box.end_s - box.start_s):.3f} ms"
    edge = ' stroke="#fff" stroke-width=".5"' if box.kind in ("forward", "backward") else ""
    yield (f'<rect x="{x:.2f}" y="{y:g}" width="{max(width, 0.2):.2f}" height="{height:g}" '
           f'fill="{COLOURS[box.kind][0]}"{opacity}{edge}><title>{html.escape(told)}</title></rect>')
    if box.label and width > LETTER * len(box.label) + 4:
        yield (f'<text x="{x + width / 2:.1f}" y="{y + 15:g}" text-anchor="middle" fill="#fff" pointer-events="none">'
               f"{html.escape(box.label)}</text>")


def _memory(row: Row, bottom: float, most: float, end: float, scale: float) -> Iterator[str]:
    """The bytes as a hill, of the height that its share of the fullest device's is."""
    points, level = [f"{LEFT:g},{bottom:g}"], 0.0
    for at, nbytes in row.memory:
        x = LEFT + at * scale
        points += [f"{x:.2f},{bottom - level:.2f}", f"{x:.2f},{bottom - (HOLDS - 3) * nbytes / most:.2f}"]
        level = (HOLDS - 3) * nbytes / most
    last = LEFT + end * scale
    points += [f"{last:.2f},{bottom - level:.2f}", f"{last:.2f},{bottom:g}"]
    yield (f'<polygon points="{" ".join(points)}" fill="#9bbb59" fill-opacity=".55"><title>memory of a device, at most '
           f"{gib(row.peak)}</title></polygon>")
    yield f'<text x="{last + 6:.1f}" y="{bottom - 3:g}" fill="#55702a">{gib(row.peak)}</text>'
