"""The verbs on a torch.export.ExportedProgram: the same passes, at once, into a new program.

    before  program: ExportedProgram with dense attention
    after   sparsify(program): one of the same state, inputs, dynamic shapes and signature, in which
            moonfx::moba_attention stands for each attention that the policy makes sparse

The new program runs through `.module()`, is saved, loaded, decomposed, compiled and packaged like
any other, wherever moonfx is imported first: its operator lives there.
"""

from torch.export import ExportedProgram

from moonfx.backend.on_miss import ON_MISS, check_choice, miss
from moonfx.backend.rewriter import Backend
from moonfx.capture.exported_program import exported_modules
from moonfx.capture.inductor import COMPILERS
from moonfx.policy import Policies
from moonfx.report.report import Report

_REPORT = "_moonfx_report"


def sparsify_exported(
    program: ExportedProgram, policies: Policies, on_miss: str, compiler: str
) -> ExportedProgram:
    """A new program; `on_miss` as for `moonfx.sparsify`, but now and not at the first call."""
    check_choice("on_miss", on_miss, ON_MISS)
    check_choice("compiler", compiler, COMPILERS)
    if compiler != "inductor":
        raise ValueError(
            f"compiler={compiler!r} is not for an ExportedProgram, which is rewritten and not "
            "compiled: call its module() as it is, or give that to torch.compile"
        )
    backend = _backend(program, policies)
    sparse = backend.rewrite_exported(program)
    report = backend.report
    what = "the ExportedProgram"
    if not report.rewritten:
        miss(on_miss, report, what)
    elif unused := backend.unused():
        miss(on_miss, report, what, f"no attention of {what} fits layers[{', '.join(unused)}]")
    sparse.__dict__[_REPORT] = report
    return sparse


def explain_exported(program: ExportedProgram, policies: Policies) -> Report:
    backend = _backend(program, policies)
    backend.rewrite_exported(program)
    return backend.report


def report_exported(program: ExportedProgram) -> Report:
    """What `sparsify` did to make this program.

    Raises:
        ValueError: if it did not; a program read from a file has no report either.
    """
    found = program.__dict__.get(_REPORT)
    if not isinstance(found, Report):
        raise ValueError(
            "program must come from moonfx.sparsify in this process: a report is not saved with it"
        )
    return found


def _backend(program: ExportedProgram, policies: Policies) -> Backend:
    policies.check_names({name: name for name in exported_modules(program)})
    return Backend(policies)
