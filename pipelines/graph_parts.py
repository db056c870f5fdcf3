"""A part of an ONNX graph: what lies between some of its values and others."""

from collections.abc import Collection

from onnx import ModelProto, helper


def part_of(model: ModelProto, inputs: Collection[str], outputs: Collection[str]) -> ModelProto:
    """Return the operators that compute `outputs` from `inputs`, as they are.

    Args:
        model: whose graph has no graphs within it.
        inputs: names of its inputs or outputs.
        outputs: names of its outputs.

    Raises:
        ValueError: if the outputs are computed from other inputs as well.
    """
    whole, nodes, wanted = model.graph, [], set(outputs)
    for node in reversed(whole.node):
        if not wanted.isdisjoint(node.output):
            nodes.append(node)
            wanted.update(name for name in node.input if name not in inputs)
    others = [value.name for value in whole.input if value.name in wanted]
    if others:
        raise ValueError(f"{list(outputs)} are computed from {others} as well")
    known = {value.name: value for value in (*whole.input, *whole.output)}
    graph = helper.make_graph(
        nodes[::-1],
        whole.name,
        [known[name] for name in inputs],
        [known[name] for name in outputs],
        [tensor for tensor in whole.initializer if tensor.name in wanted],
        value_info=[value for value in whole.value_info if value.name in wanted],
    )
    return helper.make_model(
        graph,
        ir_version=model.ir_version,
        opset_imports=model.opset_import,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
    )
