"""ONNX graphs of a click model's served parts, with one file of weights that they share."""

import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn
from torch.export import Dim

from hashtab.models.ctr import ClickModel, Feature
from hashtab.models.ctr.served import ServedEncoder, ServedItems, ServedOnline, ServedScorer

OPSET = 20
# A loop or a data-dependent shape a call, or 40 times slower than what ScatterND does.
REFUSED_OPERATORS = frozenset({"Loop", "NonZero", "ScatterElements"})
_ALIGNMENT = 4096  # pages, so that a runtime may map each weight
_SMALL = 1024  # bytes that stay within the graph

_USERS, _LENGTH, _RECENT, _CANDIDATES, _ITEMS = (
    Dim(name, min=1) for name in ("users", "length", "recent", "candidates", "items")
)
_OF_CANDIDATES = {0: _USERS, 1: _CANDIDATES}
Example = dict[str, tuple[Tensor, dict[int, Dim]]]


def encoder_graph(model: ClickModel) -> ModelProto:
    """Export `ServedEncoder`; users and length are dynamic."""
    columns = _columns("behaviour", model.features.behaviour, {0: _USERS, 1: _LENGTH})
    return export_graph(ServedEncoder(model), columns, ("increments", "codes", "vectors"))


def scorer_graph(model: ClickModel) -> ModelProto:
    """Export `ServedScorer`; users, candidates and recent behaviours are dynamic."""
    inputs = _kept(model) | _columns("candidate", model.features.candidate, _OF_CANDIDATES)
    return export_graph(ServedScorer(model), inputs | _request(model), ("scores",))


def items_graph(model: ClickModel) -> ModelProto:
    """Export `ServedItems`; its outputs are named as the inputs of the online graph."""
    columns = _columns("candidate", model.features.candidate, {0: _ITEMS})
    return export_graph(ServedItems(model), columns, tuple(_of_items(model)))


def online_graph(model: ClickModel) -> ModelProto:
    """Export `ServedOnline`; users, candidates and recent behaviours are dynamic."""
    inputs = _kept(model) | _of_items(model) | _request(model)
    return export_graph(ServedOnline(model), inputs, ("scores",))


def _kept(model: ClickModel) -> Example:
    """What is kept of a user."""
    encoder, per_user = model.encoder, {0: _USERS}
    inputs: Example = {}
    if encoder.groups:
        shape = (2, encoder.groups, encoder.buckets, model.settings.embedding_size)
        inputs["table"] = torch.ones(shape, dtype=torch.int32), per_user
    if encoder.needs_count:
        inputs["behaviours"] = torch.ones(2, dtype=torch.int64), per_user
    if encoder.recent:
        inputs |= _columns("recent", model.features.behaviour, {0: _USERS, 1: _RECENT})
        inputs["recent_lengths"] = torch.ones(2, dtype=torch.int64), per_user
    return inputs


def _of_items(model: ClickModel) -> Example:
    """What is computed of an item once."""
    size, groups = model.settings.embedding_size, model.encoder.groups
    inputs: Example = {"item.vector": (torch.ones(2, 3, size), _OF_CANDIDATES)}
    if model.encoder.looks_up:
        inputs["item.codes"] = torch.ones(2, 3, groups, dtype=torch.int32), _OF_CANDIDATES
    return inputs


def _request(model: ClickModel) -> Example:
    """What is of a user and a candidate, or of the moment."""
    inputs = _columns("context", model.features.context, _OF_CANDIDATES)
    if model.settings.counters:
        counters = torch.ones(2, 3, len(model.features.counters))
        inputs["counters"] = counters, _OF_CANDIDATES
    return inputs


def write_graphs(graphs: Mapping[str, ModelProto], folder: Path) -> None:
    """Write `<name>.onnx` of each graph and `weights.bin`, which holds equal weights once.

    The graphs given are changed: their weights lie outside of them afterwards.
    """
    offsets: dict[str, int] = {}
    with (folder / "weights.bin").open("wb") as weights:
        for graph in graphs.values():
            for tensor in graph.graph.initializer:
                data = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(data) < _SMALL:
                    continue
                digest = hashlib.sha256(data).hexdigest()
                if digest not in offsets:
                    weights.write(bytes(-weights.tell() % _ALIGNMENT))
                    offsets[digest] = weights.tell()
                    weights.write(data)
                _move_out(tensor, offsets[digest], len(data))
    for name, graph in graphs.items():
        (folder / f"{name}.onnx").write_bytes(graph.SerializeToString(deterministic=True))


def _move_out(tensor: TensorProto, offset: int, length: int) -> None:
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    if not tensor.HasField("raw_data"):
        tensor.raw_data = b""
    set_external_data(tensor, "weights.bin", offset, length)
    tensor.ClearField("raw_data")


def _columns(role: str, features: tuple[Feature, ...], dynamic: dict[int, Dim]) -> Example:
    dtypes = {"categorical": torch.int32, "numeric": torch.float32}
    shape = (2, 3)[: len(dynamic)]
    return {
        f"{role}.{f.name}": (torch.ones(shape, dtype=dtypes[f.kind]), dynamic) for f in features
    }


def export_graph(module: nn.Module, inputs: Example, outputs: tuple[str, ...]) -> ModelProto:
    """Export a module that takes `inputs` by name.

    Args:
        module: its `forward` has one argument, `inputs`.
        inputs: name -> an example and its dynamic sizes.
        outputs: their names.
    """
    example = {name: tensor for name, (tensor, _) in inputs.items()}
    shapes = {name: dynamic for name, (_, dynamic) in inputs.items()}
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of torchvision, which nothing here needs
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (),
                dynamo=True,
                kwargs={"inputs": example},
                dynamic_shapes={"inputs": shapes},
                input_names=list(example),
                output_names=list(outputs),
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
    assert program is not None  # it is None only where a file was asked for
    graph = program.model_proto
    refused = REFUSED_OPERATORS & {node.op_type for node in graph.graph.node}
    assert not refused, f"the graph holds {sorted(refused)}"
    _forget_origin(graph)
    return graph


def _forget_origin(graph: ModelProto) -> None:
    """Remove what torch notes of each operator: its stack trace with the paths of this machine."""
    main = graph.graph
    named = (main.node, main.initializer, main.input, main.output, main.value_info)
    for part in (graph, main, *(element for elements in named for element in elements)):
        part.ClearField("metadata_props")
