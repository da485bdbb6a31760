"""Pictures a second, from files to an index, beside what people do without it; and the arithmetic under them.

python -m benchmarks.speed DATA [--photos 2000] [--repetitions 5] [--threads 2] [--rclip-python PYTHON]
    [--openvino-python PYTHON] [--work FOLDER]

DATA holds flickr8k/originals; photos of 0.3 and 12 megapixels are made of them. Each side indexes a share of the photos
in a process of its own, each repetition another share, the sides by turns; ratios are medians over the repetitions.
Clocks start when the model is loaded and has seen a picture, and stop when the last vector is on disk. Sides whose
package is missing are left out, and the section says so. rclip is better installed apart: --rclip-python names the
interpreter that has it; --openvino-python one that has everything and OpenVINO.
With --work, photos and models stay there for the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import machine, write_section
from indexes.runtime import processor_flags

ROOT = Path(__file__).parents[1]
BUILTIN_FOLDER = ROOT / "retrieval/models/builtin"
NOT_INSTALLED = 3  # exit status
ARCHITECTURE = "ViT-B-32"
SIZES = {"0.3": (640, 480), "12": (4000, 3000)}  # megapixels
FEWER = 8  # times fewer of the large ones
NAIVE_BATCH, RCLIP_BATCH = 32, 8  # rclip's default
READY_BATCH = 16  # of pictures that need no decoding
PRODUCTS = (1024, 2048)  # rows and columns of the matrix products that show what a core can do
CALIBRATION = 128  # captioned photos for int8, half of them only measured; with random weights that says nothing
ROUNDS = 5  # of a product and an encoding, by turns

Result = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A way from photos to vectors: what it is called, and what a child process is told."""

    title: str
    kind: str  # a key of CHILDREN
    model: str = ""  # below the work folder, or `builtin`
    precision: str = "auto"  # of the arithmetic
    openvino: bool = False  # computed by it, where ONNX Runtime is otherwise


VIT = {
    "naive": Side("open_clip, eager fp32, its own transform, batch 32, into a numpy file", "naive", "vit"),
    "torch fp32": Side("`diptych index`, torch fp32", "library", "vit", "fp32"),
    "torch bf16": Side("`diptych index`, torch bf16", "library", "vit", "bf16"),
    "onnx fp32": Side("`diptych index`, bundle, fp32", "library", "vit-fp32", "fp32"),
    "onnx int8": Side("`diptych index`, bundle, int8", "library", "vit-int8"),
    "openvino fp32": Side("`diptych index`, bundle, fp32, OpenVINO", "library", "vit-fp32", "fp32", True),
    "openvino bf16": Side("`diptych index`, bundle, bf16, OpenVINO", "library", "vit-fp32", "bf16", True),
    "openvino int8": Side("`diptych index`, bundle, int8, OpenVINO", "library", "vit-int8", "auto", True),
}
BUILTIN = {
    "bare": Side("the bare encoder on ready tensors, built-in model", "bare", "builtin"),
    "shared": Side("the same by ONNX Runtime alone, all threads on one batch", "shared", "builtin"),
    "builtin": Side("`diptych index`, built-in model", "library", "builtin"),
    "rclip": Side("rclip's pipeline around the same image.onnx", "rclip", "builtin"),
}
SIDES = {**VIT, **BUILTIN}


# ---- in a process of its own -----------------------------------------------------------------------------------------


class Clock:
    """Wall clock and processor time of a block, and the result for the parent."""

    def __enter__(self) -> Clock:
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

    def result(self, images: int, **more: object) -> Result:
        return {"rate": images / self.wall, "cpu": 1000 * self.cpu / images, "images": images, **more}


def naive(work: Path, side: Side, photos: Path, _: int) -> Result:
    """As open_clip's README does it, a batch at a time."""
    import numpy as np
    import open_clip
    import torch
    import torch.nn.functional as F
    from PIL import Image

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{work / side.model}")
    model.eval()
    files = sorted(photos.iterdir())

    def encode(some: list[Path]) -> np.ndarray:
        batch = torch.stack([preprocess(Image.open(file)) for file in some])
        return F.normalize(model.encode_image(batch), dim=-1).numpy()

    with torch.inference_mode():
        encode(files[:1])
        with Clock() as clock:
            rows = [encode(files[i : i + NAIVE_BATCH]) for i in range(0, len(files), NAIVE_BATCH)]
            np.save(work / "naive.npy", np.concatenate(rows))
    return clock.result(len(files))


def library(work: Path, side: Side, photos: Path, threads: int) -> Result:
    """As `diptych index` does it."""
    from PIL import Image

    from retrieval.library import Library

    encoder = encoder_of(work, side, threads)
    encoder.encode_images([Image.new("RGB", (640, 480))])
    with tempfile.TemporaryDirectory(dir=work) as scratch, Clock() as clock:
        report = Library.create(photos, index=Path(scratch) / "store", encoder=encoder).index()
    assert report.embedded == len(list(photos.iterdir())), report
    return clock.result(report.embedded, precision=getattr(encoder, "precision", ""))


def bare(work: Path, side: Side, photos: Path, threads: int) -> Result:
    """The encoder alone: what decoding, scanning and writing are measured against."""
    from retrieval.images import read_photo

    encoder = encoder_of(work, side, threads)
    ready = [encoder.preprocessing.fit(read_photo(file).image) for file in sorted(photos.iterdir())[: 4 * READY_BATCH]]
    encoder.encode_images(ready[:1])
    with Clock() as clock:
        for _ in range(4):
            for i in range(0, len(ready), READY_BATCH):
                encoder.encode_images(ready[i : i + READY_BATCH])
    return clock.result(4 * len(ready), precision=getattr(encoder, "precision", ""))


def shared(_: Path, __: Side, photos: Path, threads: int) -> Result:
    """What ONNX Runtime does when it is told nothing but the number of threads."""
    import numpy as np
    import onnxruntime

    from retrieval.bundle import Bundle
    from retrieval.images import read_photo

    bundle = Bundle.load(BUILTIN_FOLDER)
    files = sorted(photos.iterdir())[: 4 * READY_BATCH]
    ready = bundle.preprocessing.pixels([read_photo(file).image for file in files])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(BUILTIN_FOLDER / "image.onnx"), options)
    name = session.get_inputs()[0].name
    session.run(None, {name: ready[:1]})
    with Clock() as clock:
        for batch in np.split(np.tile(ready, (4, 1, 1, 1)), range(READY_BATCH, 4 * len(ready), READY_BATCH)):
            session.run(None, {name: batch})
    return clock.result(4 * len(ready))


def rclip(work: Path, _: Side, photos: Path, __: int) -> Result:
    """rclip's own walk, hashes, threads, batches and database; the model is ours, and so is what it wants to see."""
    import numpy as np
    from PIL import Image
    from rclip import db, main, model, model_download

    size = json.loads((BUILTIN_FOLDER / "model.json").read_text("utf-8"))["preprocessing"]["size"]
    session = model_download._load_onnx_session(str(BUILTIN_FOLDER / "image.onnx"))

    class Ours(model.Model):
        def compute_preprocessed_image_features(self, images: list[np.ndarray], **_: object) -> np.ndarray:
            rows = session.run(None, {session.get_inputs()[0].name: np.stack(images)})[0]
            return rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def preprocess(image: Image.Image) -> np.ndarray:  # cheaper than its own, which goes on to float32
        return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC))

    main.preprocess = preprocess
    ours = Ours()
    ours.compute_preprocessed_image_features([preprocess(Image.new("RGB", (640, 480)))])
    with tempfile.TemporaryDirectory(dir=work) as scratch, Clock() as clock:
        database = db.DB(Path(scratch) / "db.sqlite3")
        client = main.RClip(ours, database, RCLIP_BATCH, None)
        client.ensure_index(str(photos))
        client.close()
        stored = database._con.execute("SELECT COUNT(*) FROM images").fetchone()[0]
        database.close()
    assert stored == len(list(photos.iterdir())), stored
    return clock.result(stored)


def arithmetic(work: Path, side: Side, photos: Path, _: int) -> Result:
    """Operations a second of one core, in the image tower and in the fastest matrix product at the same precision."""
    from retrieval.images import read_photo

    encoder = encoder_of(work, side, 1)
    size = encoder.preprocessing.size
    files = sorted(photos.iterdir())[:READY_BATCH]
    ready = [encoder.preprocessing.fit(read_photo(file).image) for file in files]
    precision = "int8" if side.model == "vit-int8" else side.precision
    products = {(name, n): run for n in PRODUCTS for name, run in matrix_products(precision, n).items()}

    def seconds(function: Callable[[], object]) -> float:
        before = time.process_time()
        function()
        return time.process_time() - before

    seconds(lambda: encoder.encode_images(ready))
    encoding, peaks = [], {name: [] for name in products}
    for _ in range(ROUNDS):
        encoding.append(seconds(lambda: encoder.encode_images(ready)) / len(ready))
        for (name, n), product in products.items():
            peaks[name, n].append(2 * n**3 / seconds(product))
    per_image = statistics.median(encoding)
    peak, (name, n) = max((statistics.median(values), which) for which, values in peaks.items())
    speed = vit_operations(work / "vit", size) / per_image
    return {"cpu": 1000 * per_image, "speed": speed, "peak": peak, "of": f"{name}, {n} × {n}", "share": speed / peak}


def vit_operations(model: Path, size: tuple[int, int]) -> float:
    """Multiplications and additions of a ViT's matrix products for one picture.

    With n tokens of width w, a layer has 2·n·w·3w (q, k, v) + 2·2·n²·w (scores, weighted sum) + 2·n·w² (out) +
    2·2·n·w·4w (MLP) = 24·n·w² + 4·n²·w. Patches: 2·(n-1)·3p²·w; projection: 2·w·d. Nothing else is counted.
    """
    described = json.loads((model / "open_clip_config.json").read_text("utf-8"))["model_cfg"]
    vision, d = described["vision_cfg"], described["embed_dim"]
    w, p = vision["width"], vision["patch_size"]
    n = (size[0] // p) * (size[1] // p) + 1
    return vision["layers"] * (24 * n * w**2 + 4 * n**2 * w) + 2 * (n - 1) * 3 * p**2 * w + 2 * w * d


def matrix_products(precision: str, n: int) -> Mapping[str, Callable[[], object]]:
    """A matrix of n × n by another, on one thread, by every library here that has a kernel for it."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    if precision == "int8":
        u, s = (random.integers(low, 127, (n, n)).astype(kind) for low, kind in ((0, "u1"), (-127, "i1")))
        a = torch.from_numpy(s)
        return {"torch": lambda: torch._int_mm(a, a), "ONNX Runtime": onnx_product("MatMulInteger", u, s)}
    b = random.standard_normal((n, n), np.float32)
    c = torch.from_numpy(b)
    if precision == "bf16":
        d = c.bfloat16()
        return {"torch": lambda: torch.nn.functional.linear(d, d)}
    return {"torch": lambda: c @ c, "ONNX Runtime": onnx_product("MatMul", b, b)}


def onnx_product(operator: str, a: Any, b: Any) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    kind = TensorProto.FLOAT if operator == "MatMul" else TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)],
        [helper.make_tensor_value_info("c", kind, None)],
        [numpy_helper.from_array(b, "b")],  # a constant, as weights are: it is packed once
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"a": a})


def encoder_of(work: Path, side: Side, threads: int) -> Any:
    from retrieval.encoders import load_encoder

    folder = work / side.model
    spec = "builtin" if side.model == "builtin" else f"local-dir:{folder}"
    from retrieval import sessions

    if side.openvino and not sessions.has_openvino():
        missing("No module named 'openvino'")
    if side.precision == "bf16" and not sessions.multiplies_in_bf16():
        missing("this processor does not multiply in bf16")
    sessions.openvino_wins = lambda _: side.openvino
    return load_encoder(spec, threads=threads, precision=side.precision)


def missing(reason: str) -> None:
    print(reason, file=sys.stderr)
    sys.exit(NOT_INSTALLED)


CHILDREN: Mapping[str, Callable[[Path, Side, Path, int], Result]] = {
    "naive": naive,
    "library": library,
    "bare": bare,
    "shared": shared,
    "rclip": rclip,
    "arithmetic": arithmetic,
}


def run_child(kind: str, name: str, work: str, photos: str, threads: str) -> None:
    """Do it and print the result as JSON, on so many processors as there are threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(threads)])
    try:
        print(json.dumps(CHILDREN[kind](Path(work), SIDES[name], Path(photos), int(threads))))
    except ImportError as error:
        missing(str(error))


# ---- what they work on -----------------------------------------------------------------------------------------------


def make_photos(originals: Path, folder: Path, size: tuple[int, int], shares: int, each: int) -> None:
    """JPEG files of a size, quality 90, no two alike, so many in each of so many folders.

    Small ones are crops, a little enlarged. Large ones are put together of 16 crops enlarged twice: one photo blown up
    to 12 megapixels would be smooth, and decode faster than a camera's.
    """
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    sources = [Image.open(file).convert("RGB") for file in sorted(originals.glob("*.jpg"))]
    tiles = 1 if size == SIZES["0.3"] else 4
    width, height = size[0] // tiles, size[1] // tiles

    def crop() -> Image.Image:
        source = sources[random.integers(len(sources))]
        scale = random.uniform(0.85, 1) * min(source.width / width, source.height / height)
        across, down = scale * width, scale * height
        left, top = random.uniform(0, source.width - across), random.uniform(0, source.height - down)
        return source.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + across, top + down))

    for number in range(shares * each):
        photo = Image.new("RGB", size)
        for tile in range(tiles * tiles):
            photo.paste(crop(), (tile % tiles * width, tile // tiles * height))
        place = folder / str(number // each) / f"IMG_{number:05}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        photo.save(place, quality=90)


def make_models(data: Path, work: Path) -> None:
    """ViT-B-32 with random weights as open_clip keeps it, and what `diptych models export` makes of it."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    from retrieval.encoders import export_bundle
    from retrieval.pairs import read_pairs

    folder = work / "vit"
    folder.mkdir()
    described = {"model_cfg": open_clip.get_model_config(ARCHITECTURE), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described), "utf-8")
    torch.manual_seed(0)
    model = open_clip.create_model(ARCHITECTURE)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    export_bundle(f"local-dir:{folder}", work / "vit-fp32")
    records = read_pairs(data / "flickr8k/captions.jsonl", "val")[:CALIBRATION]
    export_bundle(str(work / "vit-fp32"), work / "vit-int8", "int8/fp32", calibrate=records)


def prepare(data: Path, work: Path, photos: int, shares: int) -> None:
    if not (work / "vit").is_dir():
        make_models(data, work)
    for name, size in SIZES.items():
        each = max(1, photos // shares // (FEWER if name == "12" else 1))
        if not (work / name).is_dir():
            make_photos(data / "flickr8k/originals", work / name, size, shares, each)


# ---- all of them -----------------------------------------------------------------------------------------------------


def start(kind: str, name: str, work: Path, photos: Path, threads: int, python: str) -> Result | None:
    """Run one side once; None if it cannot run here."""
    command = [python, "-W", "ignore", "-m", "benchmarks.speed", "--child", kind, name, work, photos, threads]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if done.returncode == NOT_INSTALLED:
        print(f"{kind} {name} is left out: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return None
    if done.returncode:
        sys.exit(f"{kind} {name} failed:\n{done.stderr}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    print(kind, name, photos.parent.name, photos.name, result, flush=True)
    return result


def measure(options: argparse.Namespace, work: Path) -> dict[tuple[str, ...], list[Result]]:
    """Results by (kind or megapixels, side), a list over the repetitions; nothing under a side that is left out."""
    turns = [(size, name, side.kind) for size in SIZES for name, side in SIDES.items()]
    turns = [turn for turn in turns if turn[0] == "0.3" or turn[2] not in ("bare", "shared")]  # which decode nothing
    turns += [("arithmetic", side, "arithmetic") for side in VIT if side != "naive"]
    runs: dict[tuple[str, ...], list[Result]] = {}
    left_out = set()
    for repetition in range(options.repetitions):
        for group, side, kind in turns:
            if (group, side) in left_out:
                continue
            share = work / ("0.3" if group == "arithmetic" else group) / str(repetition)
            python = options.rclip_python if kind == "rclip" else sys.executable
            if SIDES[side].openvino:
                python = options.openvino_python
            threads = 1 if kind == "arithmetic" else options.threads
            result = start(kind, side, work, share, threads, python)
            if result is None:
                left_out.add((group, side))
            else:
                runs.setdefault((group, side), []).append(result)
    return runs


def median(some: list[Result], key: str) -> float:
    return statistics.median(one[key] for one in some)


def compared(some: list[Result], others: list[Result]) -> tuple[float, str]:
    """How many times as fast: the median ratio by wall clock; and in words, with the range and the ratio of CPU."""
    ratios = sorted(one["rate"] / other["rate"] for one, other in zip(some, others, strict=True))
    cpu = statistics.median(other["cpu"] / one["cpu"] for one, other in zip(some, others, strict=True))
    value = statistics.median(ratios)
    return value, f"{value:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); CPU {cpu:.2f}"


def judged(name: str, value: float | None, said: str, bar: float) -> str:
    if value is None:
        return f"{name}: not measured, what it needs is missing."
    return f"{name}: {said} (bar {bar:g}: {'met' if value >= bar else 'MISSED'})."


def bars(runs: Mapping[tuple[str, ...], list[Result]]) -> list[str]:
    """The bars of the project, each in a sentence."""
    fast = {"avx512_bf16", "avx512_vnni"} <= processor_flags()
    vit = {
        "bf16": ("torch bf16", "openvino bf16"),
        "int8": ("onnx int8", "openvino int8"),
        "fp32": ("torch fp32", "onnx fp32", "openvino fp32"),
    }
    lines = []

    def against(name: str, group: str, sides: tuple[str, ...], other: tuple[str, str], bar: float) -> None:
        there = [side for side in sides if (group, side) in runs]
        if not there or other not in runs:
            lines.append(judged(name, None, "", bar))
            return
        (value, said), side = max((compared(runs[group, side], runs[other]), side) for side in there)
        lines.append(judged(f"{name}, {side}", value, said, bar))

    naive_small, naive_large = ("0.3", "naive"), ("12", "naive")
    if fast:
        against("ViT-B-32, 0.3 MP, bf16 by naive", "0.3", vit["bf16"], naive_small, 3.5)
        against("ViT-B-32, 0.3 MP, int8 by naive", "0.3", vit["int8"], naive_small, 5)
    else:
        against("ViT-B-32, 0.3 MP, fp32 by naive", "0.3", vit["fp32"], naive_small, 1.8)
    every = tuple(side for side in VIT if side != "naive")
    against("ViT-B-32, 12 MP by naive", "12", every, naive_large, 4 if fast else 2.5)
    against("built-in model, 0.3 MP by the bare encoder", "0.3", ("builtin",), ("0.3", "bare"), 0.85)
    for group in SIZES:
        against(f"built-in model, {group} MP by rclip", group, ("builtin",), (group, "rclip"), 2)
    for side in every:
        some = runs.get(("arithmetic", side))
        if some:
            share = median(some, "share")
            said = f"{share:.0%} of the largest product of {some[0]['of']}"
            lines.append(judged(f"arithmetic of ViT-B-32, {side}", share, said, 0.7))
    return lines


def main(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.speed", "--prepare", options.data, work, options.photos]
        subprocess.run([*map(str, command), str(options.repetitions)], cwd=ROOT, check=True)
        counts = {name: len(list((work / name / "0").iterdir())) for name in SIZES}
        weights = {name: sum(file.stat().st_size for file in (work / name).rglob("*.jpg")) for name in SIZES}
        runs = measure(options, work)
    rows = []
    for (group, side), some in runs.items():
        ratio = ""
        if group in SIZES and (group, "naive") in runs and side in VIT and side != "naive":
            ratio = compared(some, runs[group, "naive"])[1]
        if group == "arithmetic":
            speed, peak = (f"{median(some, key) / 1e9:.0f}" for key in ("speed", "peak"))
            title = f"the image tower alone, one thread, {side}: {speed} of {peak} billion operations a second"
            rows.append(("", title, "", f"{median(some, 'cpu'):.1f}", ""))
        else:
            rows.append((group, SIDES[side].title, f"{median(some, 'rate'):.1f}", f"{median(some, 'cpu'):.1f}", ratio))
    absent = [side for side in SIDES if ("0.3", side) not in runs]
    mean = {name: weights[name] / counts[name] / options.repetitions / 1e6 for name in SIZES}
    write_section(
        "Speed of indexing",
        f"`python -m benchmarks.speed DATA --photos {options.photos}` on {machine()}, {options.threads} threads: "
        f"{ARCHITECTURE} with random weights and the built-in model; {counts['0.3']} photos of 0.3 MP "
        f"({mean['0.3']:.2f} MB each), or {counts['12']} of 12 MP ({mean['12']:.1f} MB), others in each of "
        f"{options.repetitions} interleaved repetitions; medians, ratios with their range; a process each; loading "
        "the model does not count. Arithmetic: operations of the image tower's matrix products a second of processor "
        f"time, beside the fastest product of two matrices of {' or '.join(map(str, PRODUCTS))} rows in that.\n\n"
        + "\n".join(f"- {line}" for line in bars(runs))
        + (
            f"\n\nLeft out, because what they need is not installed, or not in this processor: {', '.join(absent)}."
            if absent
            else ""
        ),
        ("MP", "what", "images/s", "CPU ms an image", "times naive"),
        rows,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(*sys.argv[2:])
    elif sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("data", type=Path)
        parser.add_argument("--photos", type=int, default=2000, help="of 0.3 megapixels, over all repetitions")
        parser.add_argument("--repetitions", type=int, default=5)
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--rclip-python", default=sys.executable)
        parser.add_argument("--openvino-python", default=sys.executable)
        parser.add_argument("--work", type=Path, help="keep photos and models there")
        main(parser.parse_args())
