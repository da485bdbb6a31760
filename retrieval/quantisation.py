"""The weights of a bundle in fewer bits: fp16, int8, and back to float32.

fp16 is a matter of storage: ONNX Runtime widens the weights as it opens a graph, and computes in float32.

int8 is computed in int8, each tower in the way that keeps it best and gives the same vectors on every processor:

- Pictures: static quantisation (Jacob et al. 2018, arXiv:1712.05877) by ONNX Runtime's own quantiser. Activations are
  unsigned bytes whose ranges come from real photos; weights have a scale for each channel, and 7 bits: processors
  without VNNI add two products in 16 bits, where 2 × 255 × 64 fits and 2 × 255 × 127 does not. The mean that rounding
  the weights takes from or gives to a channel is put back into its bias (Nagel et al. 2019, arXiv:1906.04721).
- Texts: blocks of 32 weights with a scale each, multiplied with activations that are rounded block by block in their
  own row (`MatMulNBits` of ONNX Runtime), so that a sentence's vector does not depend on what it is encoded with.
  A row of the table of tokens has one scale.

Weights keep their parameters' names, so that :func:`read_weights` finds them again.
"""

from __future__ import annotations

import copy
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import MissingExtra, ModelError

SMALL = 2048  # tensors of fewer numbers (norms, biases) stay fp32: they weigh nothing and are the most sensitive
_BLOCK = 32  # weights that share a scale; measured on the built-in text tower: cosine 0.9997, of 128 weights 0.9993
_FOLDED = "diptych.folded"  # metadata of a graph: each convolution's weights, and the batch norm that is in them
# What is added to a weight's name: in half, transposed, a table that is picked from; integers, their scales.
_HALF, _TURNED, _ROWS, _INT8, _SCALE = ".fp16", ".transposed", ".rows", ".int8", ".int8.scale"
# The first convolutions of a deep network stay in float32. Cosines of the built-in image tower: 0.9953 with none so,
# 0.9970 with one, 0.9976 with two, 0.9976 with three. Two also take the least time: 6.2 ms a picture, 7.3 with none.
_IN_FLOAT = 2
_BATCH = 8

Values: TypeAlias = NDArray[np.float32]


def import_onnx(what: str) -> Any:
    """The package that reads and writes graphs; MissingExtra where it is not installed."""
    try:
        import onnx
        import onnx.numpy_helper
    except ImportError as error:
        raise MissingExtra(what, "'diptych[quantise]'") from error
    return onnx


def load_graph(path: Path, what: str = "converting a model") -> Any:
    """Read a graph as onnx's ModelProto. ModelError when it is damaged."""
    onnx = import_onnx(what)
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's share no public base class with onnx's
        raise ModelError(f"{path} cannot be read as an ONNX graph: the file is damaged or not a model") from error


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, Values]:
    """The weights of a tower under its own parameter names, in float32; of int8, what the integers stand for."""
    model = load_graph(path, "training a model further")
    stored = _arrays(model)
    weights = {name.removesuffix(_HALF): value.astype(np.float32) for name, value in stored.items()}
    for name, scale in stored.items():
        if name.endswith(_SCALE):
            weights[name.removesuffix(_SCALE).removesuffix(_ROWS)] = _from_blocks(
                stored[name.removesuffix(".scale")], scale
            )
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            weights[node.input[0].removesuffix("_quantized")] = _from_channels(*(stored[name] for name in node.input))
    for name in [name for name in weights if name.endswith(_TURNED)]:
        weights[name.removesuffix(_TURNED)] = weights.pop(name).T
    for name, (norm, epsilon) in _folded(model).items():
        factor = _norm_factor(weights, norm, epsilon)
        bias = weights[f"folded.{name}.bias"] + weights[f"{norm}.running_mean"] * factor  # with what was corrected
        weights[f"{norm}.bias"] = bias.astype(np.float32)
        factor = factor.reshape(-1, 1, 1, 1)
        weights[name] = np.divide(weights[name], factor, out=np.zeros_like(weights[name]), where=factor != 0)
    derived = (_INT8, _SCALE, "_quantized", "_scale", "_zero_point")
    return {
        name.removeprefix("tower."): np.ascontiguousarray(value)
        for name, value in weights.items()
        if name.startswith("tower.") and not name.endswith(derived)
    }


def _arrays(model: Any) -> dict[str, NDArray[Any]]:
    to_array = import_onnx("reading a model").numpy_helper.to_array
    return {tensor.name: to_array(tensor) for tensor in model.graph.initializer}


def _from_channels(values: NDArray[Any], scale: Values, zero: NDArray[Any]) -> Values:
    """Of what ONNX's DequantizeLinear reads; a scale for each row, or for the rest of the tensor."""
    shape = (-1, *[1] * (values.ndim - 1)) if scale.ndim and len(scale) == len(values) else ()
    if shape:
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    elif scale.ndim and values.ndim and len(scale) == values.shape[-1]:
        pass  # a scale for each column: a matrix that is multiplied from the right
    result: Values = ((values.astype(np.float32) - zero.astype(np.float32)) * scale).astype(np.float32)
    return result


# ---- float16 and float32 ---------------------------------------------------------------------------------------------


def store_as_fp16(model: Any) -> None:
    """Keep large weights as float16 and cast them back as the graph starts; ONNX Runtime folds the casts once."""
    onnx = import_onnx("storing a model in fp16")
    graph, casts = model.graph, []
    for index, tensor in enumerate(graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.data_type != onnx.TensorProto.FLOAT or values.size < SMALL:
            continue
        name, stored = tensor.name, tensor.name + _HALF
        graph.initializer[index].CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    for position, node in enumerate(casts):
        graph.node.insert(position, node)


def widen(model: Any) -> None:
    """Undo :func:`store_as_fp16`, but for what it rounded away."""
    onnx = import_onnx("converting a model")
    halves = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.endswith(_HALF)}
    for node in [node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in halves]:
        tensor = halves[node.input[0]]
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, node.output[0]))
        model.graph.node.remove(node)


# ---- int8 ------------------------------------------------------------------------------------------------------------


def quantise_text(model: Any) -> Any:
    """A text graph in float32 -> one that multiplies in int8 by blocks. ModelError when no matrix of it can be."""
    onnx = import_onnx("storing a model in int8")
    _turn_weights(model)
    model = _simplified(model)
    graph, weights = model.graph, _arrays(model)
    stored: dict[str, NDArray[Any]] = {}
    nodes = []
    for node in graph.node:
        matrix, table = _right_matrix(node, weights), _table(node, weights)
        if matrix is not None:
            name, rows = matrix
            values, scale = _to_blocks(rows, rows.shape[1] // _BLOCK)
            stored |= {name + _INT8: (values + 128).astype(np.uint8), name + _SCALE: scale}  # 128 stands for 0
            nodes.append(
                onnx.helper.make_node(
                    "MatMulNBits",
                    [node.input[0], name + _INT8, name + _SCALE, *(["", "", node.input[2]] if node.input[2:] else [])],
                    list(node.output),
                    domain="com.microsoft",
                    bits=8,
                    block_size=_BLOCK,
                    K=rows.shape[1],
                    N=rows.shape[0],
                    accuracy_level=4,  # activations in int8 as well
                )
            )
        elif table is not None:
            name, output = node.input[0] + _ROWS, node.output[0]
            values, scale = _to_blocks(table, 1)
            stored |= {name + _INT8: values.reshape(table.shape).astype(np.int8), name + _SCALE: scale}
            picked, wide, scales = output + "/int8", output + "/rows", output + "/scale"
            nodes += [
                onnx.helper.make_node("Gather", [name + _INT8, node.input[1]], [picked], axis=0),
                onnx.helper.make_node("Cast", [picked], [wide], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Gather", [name + _SCALE, node.input[1]], [scales], axis=0),
                onnx.helper.make_node("Mul", [wide, scales], [output]),
            ]
        else:
            nodes.append(node)
    if not stored:
        raise ModelError(f"its text tower has nothing that int8 can store: widths must be multiples of {_BLOCK}")
    nodes = [copy.deepcopy(node) for node in nodes]  # the graph's own are gone once it is emptied
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in stored.items())
    _drop_unused(graph)
    if not any(opset.domain == "com.microsoft" for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    return model


def _right_matrix(node: Any, weights: Mapping[str, NDArray[Any]]) -> tuple[str, Values] | None:
    """The (N, K) weights of a product with a constant matrix, a row for each output; and what to call them."""
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in weights:
        return None
    name, values = node.input[1], weights[node.input[1]]
    options = {attribute.name: attribute.f or attribute.i for attribute in node.attribute}
    plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA")
    if values.ndim != 2 or values.dtype != np.float32 or values.size < SMALL or not plain:
        return None
    if not options.get("transB"):
        name, values = name.removesuffix(_TURNED) if name.endswith(_TURNED) else name + _TURNED, values.T
    return (name, values) if values.shape[1] % _BLOCK == 0 else None


def _table(node: Any, weights: Mapping[str, NDArray[Any]]) -> Values | None:
    """The (V, D) rows that a node picks from."""
    if node.op_type != "Gather" or node.input[0] not in weights or any(attribute.i for attribute in node.attribute):
        return None
    values = weights[node.input[0]]
    return values if values.ndim == 2 and values.dtype == np.float32 and values.size >= SMALL else None


def _to_blocks(rows: Values, blocks: int) -> tuple[Values, Values]:
    """(N, K) -> integers of -127 to 127, (N, blocks, K / blocks), and their scales (N, blocks)."""
    parts = rows.reshape(len(rows), blocks, -1)
    scale = (np.abs(parts).max(2) / 127 + 1e-12).astype(np.float32)
    return np.rint(parts / scale[:, :, None]), scale


def _from_blocks(values: NDArray[Any], scale: Values) -> Values:
    parts = values.reshape(*scale.shape, -1).astype(np.float32) - (128 if values.dtype == np.uint8 else 0)
    result: Values = (parts * scale[:, :, None]).reshape(len(values), -1)
    return result


def quantise_image(model: Any, pixels: Sequence[NDArray[np.uint8]]) -> Any:
    """An image graph in float32 -> one in int8, calibrated on pictures (N, H, W, 3)."""
    onnx = import_onnx("storing a model in int8")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    norms = _fold_norms(model)
    _turn_weights(model)
    model = _simplified(model)
    name = model.graph.input[0].name
    batches = [{name: np.stack(pixels[i : i + _BATCH])} for i in range(0, len(pixels), _BATCH)]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> Any:
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as scratch, _quiet():
        plain, file = Path(scratch) / "fp32.onnx", Path(scratch) / "int8.onnx"
        chosen = _quantisable(model.graph)
        onnx.save(model, str(plain))  # of a model in memory the quantiser empties the weights
        quantize_static(
            str(plain),
            str(file),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7 bits, see above
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=chosen,
        )
        result = onnx.load(str(file))
    _correct_biases(model, result, batches)
    kept = set(_arrays(result))
    result.graph.initializer.extend(tensor for tensor in norms.values() if tensor.name not in kept)
    _trim_opsets(result)
    return result


def _quantisable(graph: Any) -> list[str]:
    """Names of the nodes to compute in int8: products with weights, and what maps of features go through between them.

    Sums too, where both sides are such maps; the sums of a transformer's residual stream stay in float32. So do the
    first convolutions of a deep network, whose rounding goes through all that follows.
    """
    constants = {tensor.name for tensor in graph.initializer}
    convs = [node.output[0] for node in graph.node if node.op_type == "Conv"]
    in_float = convs[:_IN_FLOAT] if len(convs) > 8 * _IN_FLOAT else []
    maps: set[str] = set()
    chosen = []
    for index, node in enumerate(graph.node):
        node.name = node.name or f"node.{index}"
        if node.output[0] in in_float:
            continue
        weighted = node.op_type in ("Conv", "MatMul", "Gemm") and node.input[1] in constants
        inputs = node.input if node.op_type == "Add" else node.input[:1]
        through = node.op_type in ("Add", "Clip", "Relu", "Pad", "MaxPool") and maps.issuperset(inputs)
        if node.op_type == "Conv" or through:
            maps.update(node.output)
        if weighted or through:
            chosen.append(node.name)
    return chosen


def _fold_norms(model: Any) -> dict[str, Any]:
    """Put batch norms into the convolutions before them. Returns their tensors, from which it can be undone."""
    onnx = import_onnx("storing a model in int8")
    graph, weights, norms, folded = model.graph, _arrays(model), {}, {}
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    maker = {output: node for node in graph.node for output in node.output}
    uses = [name for node in graph.node for name in node.input]
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        conv = maker.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or len(conv.input) > 2 or uses.count(conv.output[0]) > 1:
            continue
        weight, prefix = conv.input[1], norm.input[1].rpartition(".")[0]
        names = [f"{prefix}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if list(norm.input[1:]) != names or weight not in weights or not weights.keys() >= {*names}:
            continue
        epsilon = next((attribute.f for attribute in norm.attribute if attribute.name == "epsilon"), 1e-5)
        factor = _norm_factor(weights, prefix, epsilon)
        bias = (weights[names[1]] - weights[names[2]] * factor).astype(np.float32)
        values = (weights[weight] * factor.reshape(-1, 1, 1, 1)).astype(np.float32)
        tensors[weight].CopyFrom(onnx.numpy_helper.from_array(values, weight))
        graph.initializer.append(onnx.numpy_helper.from_array(bias, f"folded.{weight}.bias"))
        conv.input.append(f"folded.{weight}.bias")
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
        folded[weight] = (prefix, epsilon)
        norms.update({name: onnx.numpy_helper.from_array(weights[name], name) for name in names})
    onnx.helper.set_model_props(model, {_FOLDED: json.dumps(folded)})
    return norms


def _folded(model: Any) -> dict[str, tuple[str, float]]:
    for entry in model.metadata_props:
        if entry.key == _FOLDED:
            return dict(json.loads(entry.value))
    return {}


def _norm_factor(weights: Mapping[str, NDArray[Any]], norm: str, epsilon: float) -> NDArray[np.float64]:
    """(C,) what a batch norm multiplies each channel with."""
    variance = weights[f"{norm}.running_var"].astype(np.float64)
    factor: NDArray[np.float64] = weights[f"{norm}.weight"] / np.sqrt(variance + epsilon)
    return factor


def _correct_biases(model: Any, quantised: Any, batches: Sequence[Mapping[str, Any]]) -> None:
    """Give each convolution's bias what rounding its weights took from the mean of its output.

    Of the built-in image tower this brought the cosine to float32 from 0.982 to 0.996.
    """
    onnx = import_onnx("storing a model in int8")
    weights, stored = _arrays(model), _arrays(quantised)
    tensors = {tensor.name: tensor for tensor in quantised.graph.initializer}
    made_by = {output: node for node in quantised.graph.node for output in node.output}
    # By name: where a clip follows, the quantiser drops it and gives its output to the convolution.
    convs = {node.name: node for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 2}
    means = _channel_means(model, sorted({node.input[0] for node in convs.values()}), batches)
    for node in quantised.graph.node:
        if node.name not in convs or node.input[1] not in made_by:  # the latter where the quantiser left it alone
            continue
        plain = convs[node.name]
        weight, bias = (made_by[name] for name in node.input[1:3])
        lost = (weights[plain.input[1]] - _from_channels(*(stored[name] for name in weight.input))).sum((2, 3))
        inputs = means[plain.input[0]]  # lost is (outputs, inputs of the group)
        group = np.arange(len(lost)) * (len(inputs) // lost.shape[1]) // len(lost)
        change = (lost * inputs.reshape(-1, lost.shape[1])[group]).sum(1)
        values, scale = (stored[name] for name in bias.input[:2])
        corrected = np.rint(values + change / scale).astype(np.int32)
        tensors[bias.input[0]].CopyFrom(onnx.numpy_helper.from_array(corrected, bias.input[0]))


def _channel_means(model: Any, names: Sequence[str], batches: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """The mean of each channel of maps (B, C, H, W) over batches of pictures."""
    onnx = import_onnx("storing a model in int8")
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    watched.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 2, 3]), "watched.axes"))
    for name in names:
        outputs = [f"watched.{name}"]
        watched.graph.node.append(onnx.helper.make_node("ReduceMean", [name, "watched.axes"], outputs, keepdims=0))
        watched.graph.output.append(onnx.helper.make_tensor_value_info(outputs[0], onnx.TensorProto.FLOAT, None))
    session = _session(watched)
    sums = [session.run([f"watched.{name}" for name in names], batch) for batch in batches] if names else []
    counts = [len(next(iter(batch.values()))) for batch in batches]
    return {
        name: np.average(np.stack([found[i] for found in sums]), axis=0, weights=counts) for i, name in enumerate(names)
    }


# ---- graphs ----------------------------------------------------------------------------------------------------------


def _turn_weights(model: Any) -> None:
    """Transpose weights once instead of in the graph, under a name that says so."""
    onnx = import_onnx("converting a model")
    graph, weights = model.graph, _arrays(model)
    turned: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]:
        values = weights[node.input[0]]
        if values.ndim != 2:
            continue
        name = node.input[0] + _TURNED
        if name not in turned.values():
            graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values.T), name))
        turned[node.output[0]] = name
        graph.node.remove(node)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = turned.get(name, name)
    _drop_unused(graph)


def _simplified(model: Any) -> Any:
    """The graph with what is constant computed, by ONNX Runtime."""
    onnx = import_onnx("converting a model")
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "simple.onnx"
        _session(model, file)
        result = onnx.load(str(file))
    del result.metadata_props[:]
    result.metadata_props.extend(model.metadata_props)
    _trim_opsets(result)
    return result


def _session(model: Any, simplified: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if simplified is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(simplified)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _drop_unused(graph: Any) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _trim_opsets(model: Any) -> None:
    """Leave the operator sets that a graph uses; ONNX Runtime writes all it knows, and others refuse some."""
    used = {node.domain for node in model.graph.node}
    for opset in [opset for opset in model.opset_import if opset.domain and opset.domain not in used]:
        model.opset_import.remove(opset)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice, which it logs as the root logger, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
