"""`moonfx bench attention --plot out.png`: speedup over length, beside what the FLOPs allow."""

from moonfx.bench.attention.cases import PASSES
from moonfx.bench.attention.results import Result, Run


def draw(run: Run, path: str) -> None:
    """A panel for each pass; a line for each dtype, head dim and policy, its ideal dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    works = [work for work in PASSES if any(r.case.work == work for r in run.results)]
    figure = Figure(figsize=(6.5 * len(works), 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"moonfx against dense attention, {run.where['hardware']}", fontsize=10)
    for axes, work in zip(figure.subplots(1, len(works), squeeze=False)[0], works):
        lines: dict[str, list[Result]] = {}
        for result in run.results:
            if result.case.work == work and result.speedup is not None:
                lines.setdefault(label(result), []).append(result)
        for name, results in lines.items():
            lengths = [r.case.length for r in results]
            (drawn,) = axes.plot(lengths, [r.speedup for r in results], "o-", label=name)
            ideal = [r.case.flop_ideal for r in results]
            axes.plot(lengths, ideal, "--", color=drawn.get_color(), linewidth=0.8)
        axes.set(title=work, xlabel="tokens", ylabel="times as fast (dashed: FLOP-ideal)")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def label(result: Result) -> str:
    case = result.case
    return f"{case.block}/{case.topk}/{case.sinks}, D {case.dim}, {case.dtype}"
