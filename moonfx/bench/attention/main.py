"""`moonfx bench attention`: block-sparse attention against dense, side by side in one run.

Dense is F.scaled_dot_product_attention, with the key and value heads expanded beforehand or with
enable_gqa=True, whichever is the faster at a quarter of the length. All are timed in turns, and the
best of the turns counts. The FLOP-ideal is what the skipped products alone would give: key tokens
that dense attends over those that the policy attends (routing counts as nothing). The byte-ideal
is what a call would give that took as long as a copy of the bytes that it must move. A share is how
much of that is reached. "predicted" is the roofline: FLOPs and bytes of the kernels' own tiles,
with ceilings measured in the same run. Peak memory is what one call needs beyond its inputs
(results, saved tensors, gradients, scratch), from the high-water mark of the process's resident
memory, on a GPU of the allocator; "peak" compares it to dense, inputs included.
"""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from moonfx.bench.attention import ceilings, plot, table
from moonfx.bench.attention.measure import Limits, does_not_fit, measure, predicted, predicted_anew
from moonfx.bench.attention.options import cases, parse
from moonfx.bench.attention.results import Run
from moonfx.bench.harness import into_page, machine


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 0, or 2 for a wrong argument."""
    options = parse(argv, __doc__)
    if options.predict:
        roof = ceilings.PUBLISHED[options.predict]
        run = Run({"source": roof.source}, [predicted(c, roof) for c in cases(options)], [])
        print(run.to_json() if options.json else table.prediction(run, roof.source))
        return 0
    run = options.run or measured(options)
    if options.plot:
        plot.draw(run, options.plot)
    if options.into:
        into_page.place(Path(options.into), options.read[0], table.markdown(run))
    elif options.json:
        print(run.to_json())
    else:
        print(table.markdown(run) if options.markdown else table.text(run))
    return 0


def measured(options: argparse.Namespace) -> Run:
    device = torch.device(options.device)
    wanted = list(cases(options))
    where = machine.describe(device)
    where["date"] = datetime.date.today().isoformat()
    dtypes = {case.dtype for case in wanted}
    roof = ceilings.measure(device, dtypes)
    limits = Limits(options.repeats, tuple(options.also), options.reference_up_to, options.patience)
    results, left_out = [], []
    with tqdm(wanted, unit="case", leave=False, disable=None) as progress:
        for case in progress:
            progress.set_description(f"N={case.length} D={case.dim} {case.dtype} {case.work}")
            reason = does_not_fit(case, machine.free_bytes(device))
            if reason is None:
                results.append(measure(case, device, roof, limits))
            else:
                left_out.append(reason)
    # Other work may have slowed the first measurement of the ceilings, or this one.
    roof = ceilings.higher(roof, ceilings.measure(device, dtypes))
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in roof.flops.items())
    where["ceilings"] = f"{rates} TFLOP/s, copy {roof.copy / 1e9:.0f} GB/s"
    where["turns"] = f"best of {options.repeats}"
    if options.dense != "auto":
        where["dense"] = f"{options.dense} backend"
    return Run(where, [predicted_anew(result, roof) for result in results], left_out)


if __name__ == "__main__":
    raise SystemExit(main())
