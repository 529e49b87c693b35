"""ONNX files: written from an exported program, checked, made smaller, and run by ONNX Runtime.

Needs onnx, onnxscript and onnxruntime, which nothing else here does; they are imported where they are used.
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

OLDEST_TORCH = "2.8"  # the translators of those before fail on batch norm or on sizes
NEEDED = ("onnx", "onnxscript", "onnxruntime")
COMPLEX = ("COMPLEX64", "COMPLEX128")
# Of the float16 form these stay float32: sums over all tokens and divisions by them, and the angles of the rotation.
FLOAT32_OPS = ("ReduceMean", "ReduceSum", "Div", "Pow", "Range", "Cos", "Sin")


class MissingPackageError(ValueError):
    """A package that is needed for this form alone is not installed."""


def has_translator() -> bool:
    return TorchVersion(torch.__version__) >= OLDEST_TORCH


def check_packages() -> None:
    """Raise MissingPackageError with the remedy where ONNX's packages are missing, or torch is too old for them."""
    if not has_translator():
        raise MissingPackageError(f"--to onnx needs torch {OLDEST_TORCH} or later; this is {torch.__version__}")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingPackageError(f"--to onnx needs {', '.join(missing)}: pip install {' '.join(missing)}")


def write_onnx(
    program: torch.export.ExportedProgram, target: Path, *, outputs: Sequence[str], facts: Mapping[str, Any]
) -> int:
    """Translate a program whose one input is `images`, and write it with its weights in one file.

    Args:
        outputs: names of what it gives.
        facts: kept in the file's metadata as JSON, such as the names of classes.

    Returns:
        The version of ONNX's operator set.

    Raises:
        ValueError: the graph is not of plain ONNX operators and real numbers.
    """
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the translation's own calls
        translated = torch.onnx.export(
            program, (), dynamo=True, input_names=["images"], output_names=list(outputs), optimize=True, verbose=False
        )
    assert translated is not None
    translated.save(str(target), external_data=False)
    model = onnx.load(str(target))
    for name, value in facts.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.checker.check_model(model, full_check=True)
    check_plain(model)
    onnx.save(model, str(target))
    return model.opset_import[0].version


def check_plain(model: Any) -> None:
    """Raise ValueError where a graph has operators of no standard or complex numbers."""
    import onnx

    graph = model.graph
    custom = {node.op_type for node in graph.node if node.domain not in ("", "ai.onnx")}
    complex_types = {onnx.TensorProto.DataType.Value(name) for name in COMPLEX}
    types = {value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]}
    types |= {weights.data_type for weights in graph.initializer}
    if custom or model.functions or types & complex_types:
        raise ValueError(f"the graph is not plain ONNX: operators {sorted(custom)}, {len(model.functions)} functions")


def write_smaller(source: Path, target: Path, precision: str) -> None:
    """A smaller form of a float32 file.

    Args:
        precision: "float16": weights and computation but for `FLOAT32_OPS`, with float32 images and outputs; or "int8":
            the weights of linear layers, one scale a column; activations are quantized as they come.
    """
    import onnx

    if precision == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        options: dict[str, Any] = {"op_types_to_quantize": ["MatMul", "Gemm"], "per_channel": True}
        logging.disable(logging.WARNING)  # its advice to optimize the graph first, which the translation has done
        try:
            quantize_dynamic(str(source), str(target), weight_type=QuantType.QInt8, **options)
        finally:
            logging.disable(logging.NOTSET)
        return
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    blocked = [*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights below float16's smallest number, which become that
        model = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True, op_block_list=blocked)
    onnx.save(model, str(target))


def onnx_runner(path: Path) -> Callable[[Tensor], list[Tensor]]:
    """A function from images (B, C, H, W) to the outputs, by ONNX Runtime on the CPU with PyTorch's thread count."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {"images": images.numpy()})]
