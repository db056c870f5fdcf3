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
from hashtab.models.ctr.served import ServedEncoder, ServedScorerWithItems
from hashtab.pipelines.graph_parts import part_of

OPSET = 20
# A loop or a data-dependent shape a call, or 40 times slower than what ScatterND does.
REFUSED_OPERATORS = frozenset({"Loop", "NonZero", "ScatterElements"})
_ALIGNMENT = 4096  # pages, so that a runtime may map each weight
_SMALL = 1024  # bytes that stay within the graph

_USERS, _LENGTH, _RECENT, _CANDIDATES = (
    Dim(name, min=1) for name in ("users", "length", "recent", "candidates")
)
Example = dict[str, tuple[Tensor, dict[int, Dim]]]


def encoder_graph(model: ClickModel) -> ModelProto:
    """Export `ServedEncoder`; users and length are dynamic."""
    columns = _columns("behaviour", model.features.behaviour, {0: _USERS, 1: _LENGTH})
    return export_graph(ServedEncoder(model), columns, ("increments", "codes", "vectors"))


def scorer_graphs(model: ClickModel) -> dict[str, ModelProto]:
    """Export `ServedScorer`; users, candidates and recent behaviours are dynamic.

    Returns:
        `scorer`, and its operators once more in two halves: `items`, of candidates alone, whose
        outputs `item.vector` and, where the encoder looks them up, `item.buckets` are inputs of
        `online` in place of the candidates' features.
    """
    inputs = _scorer_inputs(model)
    items = ("item.vector", "item.buckets")[: 1 + model.encoder.looks_up]
    whole = export_graph(ServedScorerWithItems(model), inputs, ("scores", *items))
    features = [name for name in inputs if name.startswith("candidate.")]
    others = [name for name in inputs if name not in features]
    graphs = {
        "scorer": part_of(whole, list(inputs), ["scores"]),
        "items": part_of(whole, features, items),
    }
    for node in whole.graph.node:
        if node.op_type == "Shape" and node.input[0] in features:
            node.input[0] = "item.vector"  # its first sizes are those of the features
    return graphs | {"online": part_of(whole, [*others, *items], ["scores"])}


def _scorer_inputs(model: ClickModel) -> Example:
    encoder, features, settings = model.encoder, model.features, model.settings
    per_user, per_candidate = {0: _USERS}, {0: _USERS, 1: _CANDIDATES}
    inputs: Example = {}
    if encoder.groups:
        shape = (2, encoder.groups, encoder.buckets, settings.embedding_size)
        inputs["table"] = torch.ones(shape, dtype=torch.int32), per_user
    if encoder.needs_count:
        inputs["behaviours"] = torch.ones(2, dtype=torch.int64), per_user
    if encoder.recent:
        inputs |= _columns("recent", features.behaviour, {0: _USERS, 1: _RECENT})
        inputs["recent_lengths"] = torch.ones(2, dtype=torch.int64), per_user
    inputs |= _columns("candidate", features.candidate, per_candidate)
    inputs |= _columns("context", features.context, per_candidate)
    if settings.counters:
        inputs["counters"] = torch.ones(2, 3, len(features.counters)), per_candidate
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
    return {f"{role}.{f.name}": (torch.ones(2, 3, dtype=dtypes[f.kind]), dynamic) for f in features}


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
