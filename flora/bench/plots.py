"""Pictures of saved results: speed over what was varied, with the limit drawn in."""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import StatisticsError, median
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flora.errors import UsageError

Record = Mapping[str, Any]

PANEL_INCHES = (4.6, 3.4)
COLUMNS = 3
NAME_WIDTH = 36
LINE_INCHES = 0.17

ONE_PICTURE = ("machine", "model", "dtype", "backend")
"""Columns in which a study's records must be the same: medians are taken over the others."""

STYLE: Any = {  # the names of its keys are matplotlib's to check
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "grid.alpha": 0.3,
    "lines.marker": "o",
    "lines.markersize": 4,
    "svg.hashsalt": "flora",  # the same records make the same file
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Speed over one column of a study: a panel a batch, a line a system with its kind.

    study:  whose records are shown.
    x:      the column along the axis. A record that has none there is drawn all along it.
    panels: the columns that set panels apart.
    lines:  the columns that set lines apart.
    most:   a column of which a panel shows each system's largest value only.
    y:      the figure; where records differ in other columns (layers), their median is shown.
    title:  what y is.
    """

    study: str
    x: str
    panels: tuple[str, ...]
    lines: tuple[str, ...] = ("system", "kind")
    most: str | None = None
    y: str = "ratio_to_base"
    title: str = "of the base's speed"


CHARTS = {
    "op-rank": Chart(study="op", x="rank", panels=("rows",), most="distinct"),
    "op-distinct": Chart(
        study="op", x="distinct", panels=("rows",), lines=("system", "kind", "rank")
    ),
    "generate-rank": Chart(
        study="generate", x="rank", panels=("prompt_tokens", "new_tokens", "rows"), most="distinct"
    ),
    "generate-distinct": Chart(
        study="generate",
        x="distinct",
        panels=("prompt_tokens", "new_tokens", "rows"),
        lines=("system", "kind", "rank"),
    ),
    "train-rank": Chart(study="train", x="rank", panels=("rows", "tokens")),
    "train-memory": Chart(
        study="train",
        x="rank",
        panels=("rows", "tokens"),
        y="added_bytes",
        title="bytes that a step adds",
    ),
}
"""By the name of the picture's file."""


def plot(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw every picture that there are records for, as SVG; the files' paths.

    records: of one or several of `flora bench`'s studies, as they were written.

    Raises UsageError where they are something else, were taken on different machines, or nothing
    in them was varied.
    """
    with mpl.rc_context(STYLE):
        try:
            _check_alike(records)
            figures = {name: _draw(chart, records) for name, chart in CHARTS.items()}
            figures["op-crossover"] = _draw_crossovers(crossovers(records))
        except KeyError as error:
            raise UsageError(f"a record has no {error}: give results of flora bench") from error
        except (TypeError, StatisticsError) as error:
            raise UsageError(f"these are no whole results of flora bench: {error}") from error
        drawn = {name: figure for name, figure in figures.items() if figure}
        if not drawn:
            raise UsageError("nothing to show: give results of flora bench that vary something")
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return [folder / f"{name}.svg" for name in drawn]


def _check_alike(records: Iterable[Record]) -> None:
    found: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for column in ONE_PICTURE:
            value = json.dumps(record.get(column), sort_keys=True)
            found.setdefault((record["study"], column), set()).add(value)
    for (study, column), values in found.items():
        if len(values) > 1:
            raise UsageError(
                f"results of {study} with different {column}s cannot share a picture: "
                f"{', '.join(sorted(values))}"
            )


def crossovers(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The rank at which LoRA by bmm overtakes FLoRA, for each layer and number of rows.

    Each has `layer`, `rows`, `predicted` and `measured`: infinity where FLoRA wins at every rank.
    FLoRA's is the activation side, as in the paper, and each row has its own adapter.

    Predicted by equation (7) of the paper, 2 c1 / (d c2) + 1/r ≥ 1, which is FLoRA's time (r
    products of the base's) against bmm's (one, and r times the two thin ones'): c1 is taken from
    bmm at the largest rank.
    """
    groups: dict[tuple[str, int], list[Record]] = {}
    for record in records:
        if record["study"] == "op" and record["distinct"] == record["rows"]:
            groups.setdefault((record["layer"], record["rows"]), []).append(record)
    found = []
    for (layer, rows), own in groups.items():
        base = median(r["seconds"] for r in own if r["system"] == "base")
        flora, bmm = (
            {r["rank"]: r["seconds"] for r in own if r["system"] == system}
            for system in ("flora-activation", "bmm")
        )
        both = sorted(flora.keys() & bmm.keys())
        if both:
            added = (bmm[both[-1]] - base) / (both[-1] * base)
            leads = [(rank, flora[rank] - bmm[rank]) for rank in both]
            predicted = 1 / (1 - added) if added < 1 else float("inf")
            found.append(
                {"layer": layer, "rows": rows, "predicted": predicted, "measured": _crossing(leads)}
            )
    return found


def _crossing(points: Sequence[tuple[int, float]]) -> float:
    """Where the line through the points first rises above 0; infinity where it does not."""
    before: tuple[int, float] | None = None
    for x, y in points:
        if y > 0:
            return x if before is None else x - y * (x - before[0]) / (y - before[1])
        before = x, y
    return float("inf")


def _draw(chart: Chart, records: Sequence[Record]) -> Figure | None:
    """None where the study has no such figure, or did not vary what is along the axis."""
    shown = [r for r in records if r["study"] == chart.study and r.get(chart.y) is not None]
    ticks = sorted({r[chart.x] for r in shown} - {None})
    if len(ticks) < 2:
        return None
    panels: dict[tuple[Any, ...], list[Record]] = {}
    for record in shown:
        panels.setdefault(tuple(record[column] for column in chart.panels), []).append(record)
    names = sorted({_line_name(chart, record) for record in shown})
    colors = {name: f"C{number % 10}" for number, name in enumerate(names)}
    figure, axes = _panels(len(panels))
    for of_panel, (values, own) in zip(axes, sorted(panels.items()), strict=False):
        if chart.most:
            most: dict[str, int] = {}
            for record in own:
                system = record["system"]
                most[system] = max(record[chart.most], most.get(system, 0))
            own = [record for record in own if record[chart.most] == most[record["system"]]]
        lines: dict[str, list[Record]] = {}
        for record in own:
            lines.setdefault(_line_name(chart, record), []).append(record)
        for name, of_line in lines.items():
            _draw_line(of_panel, chart, of_line, name, colors[name])
        named = (f"{v} {c.replace('_', ' ')}" for c, v in zip(chart.panels, values, strict=True))
        of_panel.set(title=", ".join(named), xlabel=chart.x, ylabel=chart.title)
        of_panel.set_xscale("log", base=2)
        of_panel.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        of_panel.set_ylim(bottom=0)
    _draw_legend(figure)
    return figure


def _line_name(chart: Chart, record: Record) -> str:
    own = dict(record) | ({"kind": mix} if (mix := record.get("mix")) else {})
    name = " ".join(str(own[column]) for column in chart.lines if own[column] is not None)
    return textwrap.fill(name.replace("+", " + "), NAME_WIDTH)


def _draw_line(axes: Axes, chart: Chart, records: Sequence[Record], name: str, color: str) -> None:
    """What was measured, and dotted in the same colour what the machine allows."""
    points: dict[int | None, list[Record]] = {}
    for record in records:
        points.setdefault(record[chart.x], []).append(record)
    heights = {x: median(r[chart.y] for r in of_x) for x, of_x in points.items()}
    limits = {
        x: median(known)
        for x, of_x in points.items()
        if (known := [limit for r in of_x if (limit := _limit(chart, r))])
    }
    for line, label, style in ((heights, name, "-"), (limits, f"{name}: limit", ":")):
        if None in line:
            axes.axhline(line[None], color=color, linestyle=style, marker="", label=label)
        elif line:
            xs = sorted(x for x in line if x is not None)
            marker = "o" if style == "-" else ""
            axes.plot(xs, [line[x] for x in xs], style, color=color, marker=marker, label=label)


def _limit(chart: Chart, record: Record) -> float | None:
    """What a record's system could reach at best, where that is known."""
    if chart.y != "ratio_to_base" or record["system"] == "base":
        return None
    if record["study"] == "op":
        return float(record["ratio_to_base"] * record["times_limit"])
    ratio = record.get("ratio_to_limit")
    return record["ratio_to_base"] / ratio if ratio else None


def _draw_crossovers(found: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Predicted against measured, what never happened at the far end of its axis."""
    ends = [point[name] for point in found for name in ("predicted", "measured")]
    finite = [end for end in ends if end < float("inf")]
    if not finite:
        return None
    most = 2 * max(finite)
    figure, (axes,) = _panels(1)
    axes.plot([1, most], [1, most], "k:", marker="", label="as predicted")
    for number, rows in enumerate(sorted({point["rows"] for point in found})):
        own = [point for point in found if point["rows"] == rows]
        x, y = ([min(p[name], most) for p in own] for name in ("predicted", "measured"))
        axes.plot(x, y, "o", color=f"C{number % 10}", label=f"{rows} rows")
    axes.set(title="Where LoRA by bmm overtakes FLoRA")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="rank predicted by equation (7)", ylabel="rank measured")
    _draw_legend(figure)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * columns, height * rows))
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _draw_legend(figure: Figure) -> None:
    """One for all panels, in room of its own below them, no wider than they are."""
    columns = 1 + min(len(figure.axes), COLUMNS)
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    height_in_lines = 1 + sum(1 + name.count("\n") for name in handles) // columns
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LINE_INCHES * height_in_lines)
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=columns)
