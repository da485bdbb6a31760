"""What storing the built-in model's weights in fewer bits costs: size and scores of fp16 against int8.

    .venv/bin/python -m benchmarks.precision DATA      # the data folder of the recipe builtin.toml

int8 is weight-only: each row of a matrix (each channel of a kernel) has its own scale, arithmetic stays float32. The
shipped bundle is fp16; float32 with the same values is what ONNX Runtime computes with.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.table import write_section
from retrieval.bundle import FILES, IMAGE_FILE, MODEL_FILE, TEXT_FILE, Bundle
from retrieval.encoders import find_bundle
from retrieval.evaluation import classify, evaluate
from retrieval.onnx_encoder import OnnxEncoder
from retrieval.pairs import read_pairs


def to_int8(path: Path) -> None:
    """Rewrite a graph's float16 weights as int8 with a scale for each row."""
    model = onnx.load(str(path))
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT16}
    nodes = []
    for node in graph.node:
        tensor = stored.get(node.input[0]) if node.op_type == "Cast" else None
        values = numpy_helper.to_array(tensor).astype(np.float32) if tensor is not None else None
        if values is None or values.ndim < 2:
            nodes.append(node)
            continue
        scale = np.abs(values).reshape(len(values), -1).max(1) / 127 + 1e-12
        rounded = np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        name = tensor.name
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(rounded, name))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), name + ".scale"))
        nodes.append(helper.make_node("DequantizeLinear", [name, name + ".scale"], [node.output[0]], axis=0))
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(model, str(path))


def scores(bundle: Bundle, data: Path) -> list[str]:
    """hit@1 / hit@10 on Flickr8k test and COCO val, top-1 on Caltech-101."""
    encoder = OnnxEncoder(bundle)
    cells = []
    for file, split in (("flickr8k/captions.jsonl", "test"), ("coco/captions.jsonl", "val")):
        metrics = evaluate(encoder, read_pairs(data / file, split)).metrics
        cells += [" / ".join(f"{100 * metrics[f'{way}_hit@{k}']:.1f}" for k in (1, 10)) for way in ("t2i", "i2t")]
    top1 = classify(encoder, read_pairs(data / "labelled/caltech101.jsonl")).metrics["top1"]
    return [*cells, f"{100 * top1:.1f}"]


def main(data: Path) -> None:
    source = find_bundle("builtin")
    assert source is not None
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, towers in (
            ("fp16 (shipped)", ()),
            ("int8 text tower", (TEXT_FILE,)),
            ("int8 both", (TEXT_FILE, IMAGE_FILE)),
        ):
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            for file in FILES:
                shutil.copyfile(source / file, folder / file)
            for tower in towers:
                to_int8(folder / tower)
            bundle = Bundle.load(folder)
            size = sum(file.stat().st_size for file in folder.iterdir() if file.name != MODEL_FILE)
            rows.append((name, f"{size / 1e6:.1f}", *scores(bundle, data)))
    write_section(
        "Precision of the stored weights",
        "`python -m benchmarks.precision DATA`: hit@1 / hit@10 in percent; zero-shot top-1 on Caltech-101.",
        ("weights", "MB", "Flickr8k t2i", "Flickr8k i2t", "COCO t2i", "COCO i2t", "Caltech-101"),
        rows,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
