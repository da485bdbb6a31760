"""What computes a bundle's graphs: ONNX Runtime, and OpenVINO for pictures where it is installed.

Both read the same files. Everything about threads, memory and the arithmetic of a graph is chosen here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from indexes.runtime import processor_flags
from indexes.vectors import Vectors
from retrieval.errors import MissingExtra, ModelError

RunPrecision: TypeAlias = Literal["auto", "fp32", "bf16"]
IMAGE_BATCH = 4  # built-in tower, ms a picture and peak: 1: 5.4, 104 MB; 4: 5.7, 184; 8: 6.5, 288; 16: 7.2, 502
TEXT_BATCH = 64
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
_INT8 = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


class Session(Protocol):
    """A graph that is ready. Several threads may run it at once."""

    def run(self, batch: NDArray[Any]) -> Vectors:
        """A batch of what the graph takes -> (B, D), not normalised. ModelError when it does not fit the graph."""
        ...


def image_precision(bundle: Path, stored: str, asked: RunPrecision) -> str:
    """The arithmetic of an image graph here: fp32, bf16 or int8.

    Args:
        bundle: for messages.
        stored: the precision of its weights; int8 is computed as it is stored.
        asked: ``auto`` is bf16 where OpenVINO is installed and the processor multiplies in it, else fp32.

    Raises:
        ModelError: it cannot be computed like that, or not on this processor.
        MissingExtra: bf16 without OpenVINO: ONNX Runtime has none on a CPU.
    """
    if stored == "int8":
        if asked != "auto":
            raise ModelError(
                f"{bundle}: the image tower is stored, and computed, in int8: leave out --precision {asked}"
            )
        return "int8"
    if asked == "fp32" or (asked == "auto" and not has_openvino()):
        return "fp32"
    if not has_openvino():
        raise MissingExtra("bf16 arithmetic of a bundle", "'diptych[openvino]'")
    if multiplies_in_bf16():
        return "bf16"
    if asked == "bf16":
        raise ModelError("this processor does not multiply in bf16: leave out --precision bf16")
    return "fp32"


def open_image_session(path: Path, lanes: int, precision: str) -> Session:
    """Open an image graph in what :func:`image_precision` says, for so many runs at a time, each on one thread."""
    return OpenVinoSession(path, lanes, precision) if openvino_wins(precision) else OnnxRuntimeSession(path, 1)


def openvino_wins(precision: str) -> bool:
    """Whether OpenVINO is installed and faster than ONNX Runtime: in bf16, and in int8 where the processor has VNNI.

    In int8 without it (AVX2 alone) it takes twice the time, in fp32 a tenth more: benchmarks/speed.py.
    """
    return has_openvino() and (precision == "bf16" or (precision == "int8" and bool(_INT8 & processor_flags())))


def has_openvino() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("openvino") is not None


class OnnxRuntimeSession:
    """ONNX Runtime on the CPU: graphs as they are stored, what is not in int8 in float32."""

    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads without work sleep: waiting in a loop they take the processor from those that decode. Measured with
        # two on the built-in image tower: 13.0 ms of CPU a picture, against 7.2.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # The arena stays on: without it a picture costs 12.8 ms instead of 6.5, for 60 MB less.
        options.log_severity_level = 3  # errors only: its warnings are about graph optimisation, not about the user
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ModelError(f"{path} cannot be opened by ONNX Runtime: the file is damaged or not a model") from error
        self._path, self._input = path, self._session.get_inputs()[0].name

    def run(self, batch: NDArray[Any]) -> Vectors:
        """A batch through the graph, see :class:`Session`."""
        output: Vectors = self.compute({self._input: batch})[0]
        return output

    def compute(self, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """All outputs of a graph with several inputs, by name. ModelError when they do not fit it."""
        try:
            outputs: list[NDArray[Any]] = self._session.run(None, inputs)
        except Exception as error:
            raise _cannot_run(self._path, error) from error
        return outputs


class OpenVinoSession:
    """OpenVINO on the CPU: int8 graphs as they are, others in float32 or bfloat16."""

    def __init__(self, path: Path, lanes: int, precision: str) -> None:
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": lanes,
            "NUM_STREAMS": lanes,
        }
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        except Exception as error:  # its exceptions are RuntimeError's and the binding's own
            raise ModelError(f"{path} cannot be opened by OpenVINO: the file is damaged or not a model") from error
        self._path = path
        self._requests: SimpleQueue[Any] = SimpleQueue()  # not in use; each can do one thing at a time

    def run(self, batch: NDArray[Any]) -> Vectors:
        """A batch through the graph, see :class:`Session`."""
        try:
            request = self._requests.get_nowait()
        except Empty:
            request = self._model.create_infer_request()
        try:
            return np.array(request.infer([batch])[0])  # a copy: the next result is written into the same memory
        except Exception as error:
            raise _cannot_run(self._path, error) from error
        finally:
            self._requests.put(request)


def multiplies_in_bf16() -> bool:
    """Whether the processor has instructions for bfloat16; without, it is emulated and slower than float32."""
    return not _BF16.isdisjoint(processor_flags())


def _cannot_run(path: Path, error: Exception) -> ModelError:
    return ModelError(f"the model in {path.parent} cannot be run: {(str(error) or repr(error)).splitlines()[0]}")
