"""How far predictions are from what was measured: a table, the claims, and a scatter plot, from rows in files.

    python benchmarks/errors.py benchmarks/results/prediction-*.jsonl --plot prediction.png

Rows are what benchmarks/prediction.py writes. Those whose `use` is `fit` shaped the costs and count for no claim. The
claims: time at most 3 % off in the median and 8 % at worst, memory at most 1 % in the median and never more than 2 %
under, and the plan predicted best within 2 % of the one measured best in every group of one work, links and ranks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2.0**30
MEDIAN_TIME, WORST_TIME, MEDIAN_BYTES, WORST_UNDER, REGRET, FEWEST = 0.03, 0.08, 0.01, 0.02, 0.02, 30


@dataclass(frozen=True, slots=True)
class Row:
    """One plan: seconds a step and peak bytes of a device, both ways. Groups are compared within `group`."""

    group: tuple[str, str, int]
    mode: str
    mesh: str
    use: str
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: float

    @property
    def time_error(self) -> float:
        """Predicted over measured seconds, less 1."""
        return self.predicted_s / self.measured_s - 1.0

    @property
    def bytes_error(self) -> float:
        """Predicted over measured bytes, less 1."""
        return self.predicted_bytes / self.measured_bytes - 1.0


def row_of(told: dict[str, Any], costs: str) -> Row:
    """A row as it was written, by the prediction that is called `costs`."""
    predicted, measured = told[costs], told["measured"]
    return Row((told["work"], told["links"], told["ranks"]), told["mode"], told["mesh"], told["use"],
               predicted["step_s"], statistics.median(measured["steps_s"]), predicted["peak_bytes"],
               max(measured["peak_bytes"]))


def read(paths: Iterable[Path], costs: str = "predicted") -> list[Row]:
    """The rows of all files that did not fail; of one that was run again the last."""
    found: dict[Any, Row] = {}
    for line in (line for path in paths for line in path.read_text().splitlines() if line.strip()):
        told = json.loads(line)
        if "measured" in told and told.get(costs):
            row = row_of(told, costs)
            found[row.group, row.mode] = row
    return list(found.values())


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in order, equal ones sharing the mean of theirs."""
    return [sum(other < value for other in values) + 0.5 * (sum(other == value for other in values) - 1)
            for value in values]


def rank_correlation(rows: Sequence[Row]) -> float | None:
    """Spearman's, of predicted and measured seconds; None where all of one side are equal or rows are few."""
    sides = [ranks([row.predicted_s for row in rows]), ranks([row.measured_s for row in rows])]
    if len(rows) < 3 or any(len(set(side)) == 1 for side in sides):
        return None
    return statistics.correlation(*sides)


def regret(rows: Sequence[Row]) -> float:
    """How much longer the plan predicted best takes than the one measured best, as a fraction."""
    trusted = min(rows, key=lambda row: row.predicted_s)
    return trusted.measured_s / min(row.measured_s for row in rows) - 1.0


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Rows of the same work on the same links and ranks."""
    found: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        found[row.group].append(row)
    return dict(found)


def table(rows: Sequence[Row]) -> str:
    """A line a plan, for Markdown."""
    lines = ["| work | links | ranks | mode | mesh | predicted ms | measured ms | error | predicted GiB | measured GiB "
             "| error | use |", "| --- " * 12 + "|"]
    for row in sorted(rows, key=lambda row: (row.group, row.measured_s)):
        work, links, count = row.group
        lines.append(f"| {work} | {links} | {count} | {row.mode} | {row.mesh} | {1e3 * row.predicted_s:.1f} | "
                     f"{1e3 * row.measured_s:.1f} | {row.time_error:+.1%} | {row.predicted_bytes / GIB:.2f} | "
                     f"{row.measured_bytes / GIB:.2f} | {row.bytes_error:+.1%} | {row.use} |")
    return "\n".join(lines)


def claims(rows: Sequence[Row]) -> str:
    """What holds of the rows that were not used to fit, and of every group."""
    held_out = [row for row in rows if row.use != "fit"]
    if not held_out:
        return f"no plan that was not used to fit, of {len(rows)}"
    times, sizes = ([abs(error) for error in side] for side in (
        [row.time_error for row in held_out], [row.bytes_error for row in held_out]))
    under = max(0.0, -min(row.bytes_error for row in held_out))
    lines = [f"{len(held_out)} plans not used to fit, of {len(rows)}; needed are {FEWEST}"]
    for what, found, most in (("time, median error", statistics.median(times), MEDIAN_TIME),
                              ("time, worst error", max(times), WORST_TIME),
                              ("memory, median error", statistics.median(sizes), MEDIAN_BYTES),
                              ("memory, worst under", under, WORST_UNDER)):
        lines.append(f"{what}: {found:.1%}, goal {most:.0%}, {'met' if found <= most else 'NOT met'}")
    for (work, links, count), group in grouped(rows).items():
        if len(group) > 1:
            told = rank_correlation(group)
            lines.append(f"{work}, {links}, {count} ranks: {len(group)} plans, rank correlation "
                         f"{'-' if told is None else f'{told:.2f}'}, regret {regret(group):.1%}, "
                         f"{'met' if regret(group) <= REGRET else 'NOT met'}")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Predicted over measured seconds and bytes, a colour a work; rings were used to fit."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 5), layout="constrained")
    sides = (("ms a step", 1e3, "predicted_s", "measured_s"), ("GiB", 1 / GIB, "predicted_bytes", "measured_bytes"))
    for axes, (unit, scale, predicted, measured) in zip(figure.subplots(1, 2), sides, strict=True):
        works = sorted({row.group[0] for row in rows})
        for number, work in enumerate(works):
            for use, face in (("claim", f"C{number}"), ("fit", "none")):
                of = [row for row in rows if row.group[0] == work and (row.use == "fit") is (use == "fit")]
                axes.scatter([scale * getattr(row, measured) for row in of],
                             [scale * getattr(row, predicted) for row in of], edgecolors=f"C{number}", facecolors=face,
                             label=work if use == "claim" else None)
        every = [scale * getattr(row, side) for row in rows for side in (predicted, measured)]
        axes.plot([min(every), max(every)], [min(every), max(every)], color="grey", linewidth=1)
        axes.set(xscale="log", yscale="log", xlabel=f"measured {unit}", ylabel=f"predicted {unit}")
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Print the table and the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--costs", choices=("predicted", "roofline"), default="predicted",
                        help="which prediction: as it was planned, or as if nothing had been measured")
    parser.add_argument("--plot", type=Path, help="where to draw predicted over measured")
    arguments = parser.parse_args()
    rows = read(arguments.files, arguments.costs)
    print(table(rows), claims(rows), sep="\n\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
