"""Compiles what Newton-Schulz would launch on chips that are not here; a line of JSON for each.

    python -m tests.support.aot_newton_schulz --chips sm_90,sm_80 --dtypes bfloat16 --terms 0,1,2

The last column of a sum's terms names the product: X X^T has none, b A + c A^2 one, Q's own two.
"""

import argparse
import json
import sys
from dataclasses import asdict

import torch

from moonfx.kernels.gpu import newton_schulz as gpu_newton_schulz
from tests.support.aot_capture import Launch, recording
from tests.support.aot_resources import resources

STEPS = [(3.4445, -4.7750, 2.0315)] * 2


def record(chip: str, dtype: torch.dtype, by_columns: bool) -> list[Launch]:
    """Each variant that two steps in one run launch, once."""
    with torch.device("meta"):
        X = torch.empty((4, 1536, 576) if by_columns else (4, 576, 1536), dtype=dtype)
    with recording(chip) as launches:
        gpu_newton_schulz.newton_schulz(X.mT if by_columns else X, STEPS, (2,))
    return list({launch.key: launch for launch in launches}.values())


def terms_of(launch: Launch) -> int:
    names = launch.kernel.arg_names
    return int(launch.constants[(names.index("TERMS"),)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chips", default="sm_90")
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--terms", default="0,1,2")
    parser.add_argument("--columns", action="store_true", help="X lies by columns")
    arguments = parser.parse_args()
    wanted = {int(number) for number in arguments.terms.split(",")}
    for chip in arguments.chips.split(","):
        for dtype in arguments.dtypes.split(","):
            for launch in record(chip, getattr(torch, dtype), arguments.columns):
                if terms_of(launch) not in wanted:
                    continue
                row = {"chip": chip, "dtype": dtype, "terms": terms_of(launch)}
                compiled = launch.compile()
                row |= asdict(resources(compiled))
                # One number at a time, where eight of them lie side by side.
                row["narrow_stores"] = compiled.asm.get("ptx", "").count("st.global.b16")
                sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
