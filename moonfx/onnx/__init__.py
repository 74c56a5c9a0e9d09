"""A sparsified model as a file of standard ONNX operators, for stock onnxruntime.

    moonfx.sparsify(model, block=64, topk=4)
    print(moonfx.export_onnx(model, (input_ids,), "model.onnx"))

The packages that this needs (onnx, onnxscript, onnxruntime) are imported when it is called.
"""

from moonfx.onnx.export import export_onnx, onnx_table
from moonfx.onnx.report import OnnxMismatch, OnnxReport

__all__ = ["OnnxMismatch", "OnnxReport", "export_onnx", "onnx_table"]
