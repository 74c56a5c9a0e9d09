"""A bar for each contender in each group: what `--plot` of the optimizers' benchmarks draws."""

from collections.abc import Mapping, Sequence


def draw(
    title: str,
    groups: Sequence[str],
    heights: Mapping[str, Sequence[float | None]],
    label: str,
    path: str,
) -> None:
    """Writes a PNG.

    Args:
        groups: names along the axis.
        heights: contender -> a height for each group, None for none; a line is drawn at 1.
        label: of the upright axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 1.2 * len(groups) + 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / max(1, len(heights))
    for i, (name, values) in enumerate(heights.items()):
        places = [at + (i - (len(heights) - 1) / 2) * width for at in range(len(groups))]
        known = [(at, value) for at, value in zip(places, values, strict=True) if value is not None]
        axes.bar([at for at, _ in known], [value for _, value in known], width, label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, rotation=30, ha="right")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
