"""Write ONNX files from an exported program, check them, reduce their precision, and run them with ONNX Runtime.

Needs onnx, onnxscript and onnxruntime, which are optional and therefore imported inside functions.
"""

import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from utils.config.errors import UserError

OLDEST_TORCH = "2.8"  # older exporters fail on batch norm or on dynamic sizes
NEEDED = ("onnx", "onnxscript", "onnxruntime")
COMPLEX = ("COMPLEX64", "COMPLEX128")
# These stay float32 in float16 files: sums over all tokens, divisions by them, and the angles of rotary embeddings.
FLOAT32_OPS = ("ReduceMean", "ReduceSum", "Div", "Pow", "Range", "Cos", "Sin")


class MissingPackageError(UserError):
    """A package that ONNX export needs is missing or too old."""


def has_exporter() -> bool:
    return TorchVersion(torch.__version__) >= OLDEST_TORCH


def check_packages() -> None:
    """Raise MissingPackageError if the ONNX packages are missing, or torch is too old."""
    if not has_exporter():
        raise MissingPackageError(f"--to onnx needs torch {OLDEST_TORCH} or later; this is {torch.__version__}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingPackageError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(
    program: torch.export.ExportedProgram, target: Path, *, outputs: Sequence[str], metadata: Mapping[str, Any]
) -> int:
    """Write a program with one input, `images`, and its weights as one ONNX file.

    Args:
        outputs: names of the outputs.
        metadata: stored in the file's metadata as JSON, for example the class names.

    Returns:
        The version of the ONNX operator set.

    Raises:
        ValueError: the graph has operators outside of the ONNX standard, or complex numbers.
    """
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about calls within torch.onnx
        exported = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=list(outputs), optimize=True, verbose=False
        )
    assert exported is not None
    exported.save(str(target), external_data=False)
    model = onnx.load(str(target))
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.checker.check_model(model, full_check=True)
    check_standard(model)
    onnx.save(model, str(target))
    return model.opset_import[0].version


def check_standard(model: Any) -> None:
    """Raise ValueError if a graph has operators outside of the ONNX standard, or complex numbers."""
    import onnx

    graph = model.graph
    custom = {node.op_type for node in graph.node if node.domain not in ("", "ai.onnx")}
    complex_types = {onnx.TensorProto.DataType.Value(name) for name in COMPLEX}
    types = {value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]}
    types |= {weights.data_type for weights in graph.initializer}
    if custom or model.functions or types & complex_types:
        raise ValueError(f"the graph is not standard ONNX: {sorted(custom)}, {len(model.functions)} functions")


def write_reduced(source: Path, target: Path, precision: str) -> None:
    """Write a float32 file in a lower precision.

    Args:
        precision: "float16": weights and computation except `FLOAT32_OPS`, with float32 images and outputs; or "int8":
            weights of linear layers with one scale per column, activations quantized dynamically.
    """
    import onnx

    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        options: dict[str, Any] = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
        logging.disable(logging.WARNING)  # its advice to optimize the graph first, which torch.onnx has done
        try:
            quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8, **options)
        finally:
            logging.disable(logging.NOTSET)
        return
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    blocked = [*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights below the smallest float16 number, which are clamped to it
        model = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True, op_block_list=blocked)
    onnx.save(model, str(target))


def onnx_runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """Return a function from images (B, C, H, W) to outputs; it runs on the CPU with PyTorch's thread count."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]
