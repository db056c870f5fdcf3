"""The ONNX graph of an estimator of tables: raw columns in, probabilities or values out."""

from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor, nn
from torch.export import Dim

from hashtab.pipelines.onnx_graphs import export_graph
from hashtab.serving.table_columns import CATEGORICAL, NUMERIC

_ROWS = Dim("rows", min=1)
_CODES = "codes"  # input of what torch exports; categories as text take its place
_ML = "ai.onnx.ml"
_ML_OPSET = 4  # the first whose LabelEncoder has no other form of its attributes since
_UNSEEN, _MISSING, _FIRST_CODE = 0, 1, 2

Estimator = Any  # TabNSAClassifier or TabNSARegressor; their fitted attributes have no types here


class _Inputs(nn.Module):
    """The served module with inputs by name; a kind of column that the table lacks is not one."""

    def __init__(self, estimator: Estimator) -> None:
        super().__init__()
        self.served = estimator.served().for_export()

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        rows = next(iter(inputs.values())).shape[0]
        numeric = inputs.get(NUMERIC, torch.empty(rows, 0, dtype=torch.float64))
        codes = inputs.get(_CODES, torch.empty(rows, 0, dtype=torch.int64))
        outputs: Tensor = self.served(numeric, codes)
        return outputs


def table_graph(estimator: Estimator, properties: dict[str, str]) -> ModelProto:
    """Export a fitted estimator; the number of rows is dynamic, none included.

    Inputs are `numeric` double `[N, Fn]`, NaN where a value is missing, and `categorical` string
    `[N, Fc]`, empty where one is; the output is `probabilities` `[N, K]` or `prediction`.

    Args:
        estimator: fitted.
        properties: what the graph says of itself, for readers that have the graph alone.
    """
    table = estimator.table_
    inputs: dict[str, tuple[Tensor, dict[int, Dim]]] = {}
    if table.numeric:
        inputs[NUMERIC] = torch.zeros(2, len(table.numeric), dtype=torch.float64), {0: _ROWS}
    if table.categorical:
        inputs[_CODES] = torch.ones(2, len(table.categorical), dtype=torch.int64), {0: _ROWS}
    output = "probabilities" if hasattr(estimator, "classes_") else "prediction"
    model = export_graph(_Inputs(estimator), inputs, (output,))
    if table.categorical:
        _read_text(model, table.categories)
    helper.set_model_props(model, properties)
    onnx.checker.check_model(model)
    return model


def _read_text(model: ModelProto, categories: tuple[tuple[str, ...], ...]) -> None:
    """Put text in the place of codes: one encoder a column, since equal text differs by column."""
    graph, count = model.graph, len(categories)
    (codes,) = (tensor for tensor in graph.input if tensor.name == _CODES)
    rows = codes.type.tensor_type.shape.dim[0].dim_param
    text = helper.make_tensor_value_info(CATEGORICAL, TensorProto.STRING, [rows, count])
    graph.input.insert(list(graph.input).index(codes), text)
    graph.input.remove(codes)
    columns = [f"{CATEGORICAL}.{i}" for i in range(count)]
    encoded = [f"{_CODES}.{i}" for i in range(count)]
    nodes = [helper.make_node("Split", [CATEGORICAL], columns, axis=1, num_outputs=count)]
    nodes += map(_encoder, columns, encoded, categories)
    nodes.append(helper.make_node("Concat", encoded, [_CODES], axis=1))
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    model.opset_import.append(helper.make_opsetid(_ML, _ML_OPSET))


def _encoder(column: str, encoded: str, known: tuple[str, ...]) -> onnx.NodeProto:
    return helper.make_node(
        "LabelEncoder",
        [column],
        [encoded],
        domain=_ML,
        keys_strings=["", *known],
        values_int64s=[_MISSING, *range(_FIRST_CODE, _FIRST_CODE + len(known))],
        default_int64=_UNSEEN,
    )


def torch_outputs(
    estimator: Estimator, numeric: np.ndarray[Any, Any], categories: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Run the served module on numbers and categories as `table_.values` gives them."""
    codes = torch.from_numpy(estimator.table_.codes(categories))
    with torch.inference_mode():
        outputs: np.ndarray[Any, Any] = estimator.served()(torch.from_numpy(numeric), codes).numpy()
    return outputs
