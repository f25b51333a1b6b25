"""Timelines as a picture, by matplotlib."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autopar.core.errors import AutoparError
from autopar.core.files import save_figure
from autopar.timeline import Box, Row, Timeline, gib
from autopar.timeline_page import COLOURS, PALER

BAR, BENEATH, HOLDS = 0.44, 0.08, 0.34
"""Of the height of a row: its boxes, what is sent, its memory."""
LABEL = 0.009
"""The share of the width that a letter takes."""


def picture(timelines: Sequence[Timeline], summary: str, path: Path) -> None:
    """Write the picture. Raises AutoparError where matplotlib is not installed or can't write there."""
    try:
        figures: Any = importlib.import_module("matplotlib.figure")
        patches: Any = importlib.import_module("matplotlib.patches")
    except ImportError as error:
        raise AutoparError("drawing needs matplotlib, which is not installed: pip install 'autopar[plot]', or choose a "
                           "name that ends in .html") from error
    counts = [len(timeline.rows) * _pitch(timeline) for timeline in timelines]
    figure = figures.Figure(figsize=(14.0, 1.6 + 0.62 * sum(counts) + 0.5 * len(counts)), layout="constrained")
    every = figure.subplots(len(timelines), 1, squeeze=False, sharex=True, height_ratios=counts)[:, 0]
    longest = max(timeline.end_s for timeline in timelines)
    for timeline, axes in zip(timelines, every, strict=True):
        _draw(timeline, axes, longest)
    every[-1].set_xlabel("ms")
    keys = [patches.Patch(color=colour, label=name) for colour, name in COLOURS.values()]
    figure.legend(handles=[*keys, patches.Patch(color="#9bbb59", label="memory")], loc="outside upper center", ncols=7,
                  fontsize=8, frameon=False)
    save_figure(figure, path, "choose a folder that can be written")


def _pitch(timeline: Timeline) -> float:
    """The height of a row with what is free behind it; most have 1."""
    return 1.0 if timeline.fullest else 1.0 - HOLDS


def _draw(timeline: Timeline, axes: Any, longest: float) -> None:
    pitch, most = _pitch(timeline), timeline.fullest
    for number, row in enumerate(timeline.rows):
        for box in row.boxes:
            _box(box, axes, number * pitch, longest)
        if row.memory:
            _memory(row, axes, number * pitch, most, timeline.step_s)
    axes.set_title(timeline.title, fontsize=10, loc="left")
    axes.set(xlim=(0.0, 1e3 * longest), ylim=(pitch * len(timeline.rows), 0.0))
    places = [number * pitch + BAR / 2 for number in range(len(timeline.rows))]
    axes.set_yticks(places, [row.title for row in timeline.rows], fontsize=8)
    axes.tick_params(left=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _box(box: Box, axes: Any, place: float, longest: float) -> None:
    top, height = (place + BAR, BENEATH) if box.kind == "sending" else (place, BAR)
    edge = {"edgecolor": "white", "linewidth": 0.4} if box.kind in ("forward", "backward") else {}
    axes.broken_barh([(1e3 * box.start_s, 1e3 * (box.end_s - box.start_s))], (top, height),
                     facecolor=COLOURS[box.kind][0], alpha=max(0.4, 1 - PALER * box.chunk), **edge)
    if box.label and (box.end_s - box.start_s) / longest > LABEL * (len(box.label) + 0.5):
        axes.text(5e2 * (box.start_s + box.end_s), place + BAR / 2, box.label, ha="center", va="center",
                  color="white", fontsize=7)


def _memory(row: Row, axes: Any, place: float, most: float, end: float) -> None:
    """The bytes as a hill, of the height that its share of the fullest device's is."""
    bottom, moments = place + BAR + BENEATH + HOLDS, [*(at for at, _ in row.memory), end]
    tops = [bottom - HOLDS * nbytes / most for _, nbytes in row.memory]
    for (start, until), top in zip(itertools.pairwise(moments), tops, strict=True):
        axes.fill_between([1e3 * start, 1e3 * until], top, bottom, color="#9bbb59", alpha=0.55, linewidth=0)
    axes.annotate(gib(row.peak), (1e3 * end, bottom - 0.06), xytext=(4, 0), textcoords="offset points", fontsize=7,
                  color="#55702a", annotation_clip=False)
