"""A bundle as an MLflow model: its graph for MLflow's own tools, and beside it the whole bundle.

MLflow's tools check and convert each input, which takes longer than to score it; serving reads the
bundle.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ValueInfoProto

from hashtab.serving.opening import AnyBundle

if TYPE_CHECKING:
    from mlflow.models import Model
    from mlflow.types import Schema

BUNDLE = "bundle"  # folder of the bundle in the model
_REQUIRED = ("onnxruntime", "numpy", "onnx")
_ONE_THREAD = {"intra_op_num_threads": 1, "inter_op_num_threads": 1}


def write_model(bundle: AnyBundle, folder: Path, model: "Model") -> None:
    """Write the files of an MLflow model.

    Args:
        bundle: opened, and so known to be whole.
        folder: to be made.
        model: its identity in MLflow.
    """
    import mlflow.onnx
    from mlflow.models import ModelSignature

    graph = onnx.load(
        bundle.folder / bundle.graph
    )  # with the weights, which lie in a file beside it
    versions = bundle.manifest.versions
    mlflow.onnx.save_model(
        graph,
        folder,
        mlflow_model=model,
        signature=ModelSignature(_schema(graph.graph.input), _schema(graph.graph.output)),
        input_example=bundle.example(),
        pip_requirements=[f"{name}=={versions[name]}" for name in _REQUIRED],
        onnx_execution_providers=["CPUExecutionProvider"],
        onnx_session_options=_ONE_THREAD,
    )
    shutil.copytree(bundle.folder, folder / BUNDLE)


def _schema(tensors: "list[ValueInfoProto]") -> "Schema":
    from mlflow.types import Schema, TensorSpec

    return Schema([TensorSpec(_dtype(t), _shape(t), t.name) for t in tensors])


def _dtype(tensor: ValueInfoProto) -> np.dtype[Any]:
    found: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)
    return found


def _shape(tensor: ValueInfoProto) -> tuple[int, ...]:
    """Sizes; -1 where any will do."""
    sizes = tensor.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else -1 for size in sizes)
