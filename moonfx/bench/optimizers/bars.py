"""What `--plot` of the optimizers' benchmarks draws: contenders side by side in each group.

A few groups are bars with their heights written on them; many, as those of a sweep, are a row of
points each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Heights = Mapping[str, Sequence[float | None]]
FEW = 10
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.3}


def draw(
    title: str,
    groups: Sequence[str],
    heights: Heights,
    label: str,
    path: str,
    ideals: Heights | None = None,
) -> None:
    """Writes a PNG.

    Args:
        groups: names along the axis.
        heights: contender -> a height for each group, None for none; a line is drawn at 1.
        label: of the axis of heights.
        ideals: contender -> what each height could be, drawn as a line across it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    few = len(groups) <= FEW
    size = (max(6.0, 0.5 * len(groups) * max(3, len(heights)) + 2), 4.5)
    figure = Figure(figsize=size if few else (7.5, 0.2 * len(groups) + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    (upright if few else rows)(axes, groups, heights, ideals or {})
    (axes.set_ylabel if few else axes.set_xlabel)(label)
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=120)


def upright(axes: Any, groups: Sequence[str], heights: Heights, ideals: Heights) -> None:
    width = 0.8 / max(2, len(heights))
    for i, (name, values) in enumerate(heights.items()):
        places = [at + (i - (len(heights) - 1) / 2) * width for at in range(len(groups))]
        drawn = axes.bar(*known(places, values), width, label=name)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=1, bbox=PAPER)
        at, ideal = known(places, ideals.get(name, ()))
        axes.hlines(ideal, [x - 0.45 * width for x in at], [x + 0.45 * width for x in at], "black")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.margins(y=0.1)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def rows(axes: Any, groups: Sequence[str], heights: Heights, ideals: Heights) -> None:
    for i, (name, values) in enumerate(heights.items()):
        places, found = known(range(len(groups)), values)
        axes.plot(found, places, "o", markersize=4, label=name, color=f"C{i}")
        places, found = known(range(len(groups)), ideals.get(name, ()))
        axes.plot(found, places, "|", markersize=8, color=f"C{i}")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def known(
    places: Sequence[float], values: Sequence[float | None]
) -> tuple[list[float], list[float]]:
    """Without the groups that have no value."""
    both = [(at, value) for at, value in zip(places, values, strict=False) if value is not None]
    return [at for at, _ in both], [value for _, value in both]
