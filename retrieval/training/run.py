"""The folder of a training run: its config, its log, and the checkpoint that it goes on from after a kill.

    config.json              what was asked for
    log.jsonl                one line each time something was measured
    run.html                 curves of it, when the run is done
    checkpoint.safetensors   weights, optimiser, random numbers and step, replaced whole; gone when the run is done
    model.json, …            the trained model: a finished run is a bundle

Nothing here is a pickle: arrays in safetensors, everything else as JSON in its header.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from indexes.manifest import replacing
from retrieval.bundle import MODEL_FILE
from retrieval.errors import DataError, UsageError
from retrieval.training.config import TrainConfig, config_from_json

CONFIG, LOG, PAGE, CHECKPOINT = "config.json", "log.jsonl", "run.html", "checkpoint.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """All that decides how a run goes on.

    Attributes:
        step: steps done.
        tensors: by name.
        random: the state of numpy's generator.
        log: lines of the log at that moment; what was written later is written again.
    """

    step: int
    tensors: Mapping[str, Tensor]
    random: Mapping[str, Any]
    log: int


class RunFolder:
    """One run on the disk. Get one from :meth:`create` or :meth:`open`."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        self.path, self.config = path, config

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> RunFolder:
        """Begin a run in a new folder. UsageError when there is something already, or nothing can be written."""
        try:
            path.mkdir(parents=True)
            with replacing(path / CONFIG) as file:
                file.write((json.dumps(asdict(config), indent=2) + "\n").encode())
        except FileExistsError:
            cls.refuse(path)
        except OSError as error:
            raise UsageError(f"{path} cannot be made: {error.strerror}") from error
        return cls(path, config)

    @staticmethod
    def refuse(path: Path) -> NoReturn:
        """Say that there is something already, and how to go on with it if it is a run."""
        begun = (path / CHECKPOINT).exists()
        hint = f", or go on with  diptych train --resume {path}" if begun else ""
        raise UsageError(f"{path} exists already: choose another --output{hint}")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Go on with a run. UsageError when there is none, or it is done."""
        if (path / MODEL_FILE).exists() and not (path / CHECKPOINT).exists():
            raise UsageError(f"the run in {path} is done: there is nothing to resume")
        try:
            config = config_from_json(path / CONFIG)
        except FileNotFoundError:
            raise UsageError(f"{path} holds no training run: it has no {CONFIG}") from None
        return cls(path, config)

    def log(self, line: Mapping[str, Any]) -> None:
        """Add a line to the log. Raises DataError when the disk is full."""
        with self.writing(), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All lines of the log; one that a kill cut short is left out."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            for text in (self.path / LOG).read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(text))
        return lines

    def save(self, step: int, tensors: Mapping[str, Tensor], random: np.random.Generator) -> None:
        """Replace the checkpoint, whole or not at all. Raises DataError when the disk is full."""
        state = {"step": step, "random": random.bit_generator.state, "log": len(self.read_log())}
        with self.writing():
            write_state(self.path / CHECKPOINT, state, tensors)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While something is written here: a full disk is a DataError that says how to go on."""
        try:
            yield
        except OSError as error:
            begun = (self.path / CHECKPOINT).exists()
            then = f"go on with  diptych train --resume {self.path}" if begun else "begin anew"
            raise DataError(f"{self.path} cannot be written ({error.strerror}): make room, then {then}") from error

    def load(self) -> Checkpoint | None:
        """Read the checkpoint, and cut the log back to that moment; None before the first. DataError when damaged."""
        checkpoint = self.read_checkpoint()
        if checkpoint is None:
            (self.path / LOG).unlink(missing_ok=True)
            return None
        lines = self.read_log()[: checkpoint.log]
        with self.writing(), replacing(self.path / LOG) as log:
            log.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        return checkpoint

    def read_checkpoint(self) -> Checkpoint | None:
        """Read the checkpoint and leave everything as it is; None before the first. DataError when damaged."""
        file = self.path / CHECKPOINT
        if not file.exists():
            return None
        state, tensors = read_state(file)
        return Checkpoint(state["step"], tensors, state["random"], state["log"])

    def finish(self) -> None:
        """Remove what only a run under way needs."""
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def discard_unless_begun(self) -> None:
        """Remove a folder from which nothing could go on."""
        if not (self.path / CHECKPOINT).exists():
            for name in (CONFIG, LOG):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not ours alone
                self.path.rmdir()


def write_state(file: Path, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and what else is known in JSON, into one safetensors file, whole or not at all. Raises OSError."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    data = save(plain, {"format": "pt", "state": json.dumps(state)})
    with replacing(file) as stream:
        stream.write(data)


def read_state(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`write_state` has written. DataError when it is damaged."""
    try:
        with safe_open(str(file), "pt") as stored:
            state: dict[str, Any] = json.loads(stored.metadata()["state"])
            return state, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}): delete it to begin the run anew") from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as tensors by name: ``optimizer.PARAMETER.NAME``, parameters counted through the groups."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{number}.{name}": torch.as_tensor(value)
        for number, values in state.items()
        for name, value in values.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` gave. The groups' settings stay as they are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".", 2)
            state.setdefault(int(number), {})[key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
