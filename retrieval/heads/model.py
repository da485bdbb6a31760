"""A fitted classifier as it is used and kept: ``classifier.json`` and ``classifier.npz`` in a folder of its own."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from indexes.manifest import replacing
from retrieval.bundle import Bundle
from retrieval.errors import ModelError, UsageError
from retrieval.heads import Modalities, check_fingerprint
from retrieval.heads.graph import load_graph
from retrieval.heads.late import load_late
from retrieval.heads.linear import load_linear
from retrieval.heads.modalities import IMAGE, TEXT, Column, Inputs, Scaling
from retrieval.heads.networks import load_network
from retrieval.heads.problem import Arrays, Fitted
from retrieval.heads.scores import Outputs
from retrieval.heads.targets import Target

FORMAT = 1
SETTINGS, ARRAYS, PAGE, RESULT = "classifier.json", "classifier.npz", "report.html", "result.json"
ENCODER = "encoder"  # folder in a classifier's own: towers that were fine-tuned with it
_DAMAGED = (ValueError, KeyError, TypeError, RuntimeError, AttributeError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True, eq=False)
class FusionClassifier:
    """Implements :class:`retrieval.heads.Classifier`.

    Attributes:
        fingerprint: of the encoder whose vectors image and text are; empty where neither is used.
        encoder: how the encoder is loaded; of towers that were fine-tuned with the classifier, where their bundle is.
        variant: the name of the fusion.
        target: what is predicted.
        modalities: by name, in order.
        columns: those of them that are named columns.
        scaling: of the rows that were learnt from.
        fitted: the model itself, on standardised inputs.
        own_encoder: the encoder's bundle belongs to the classifier, and lies in its folder.
    """

    fingerprint: str
    encoder: str
    variant: str
    target: Target
    modalities: tuple[str, ...]
    columns: tuple[Column, ...]
    scaling: Scaling
    fitted: Fitted
    own_encoder: bool = False

    def inputs(self, modalities: Modalities) -> Inputs:
        """Standardise tables; one that is not given is missing in all rows.

        Raises:
            ModelError: a table of another width, or of another number of rows.
        """
        count = max((len(table) for table in modalities.values()), default=0)
        whole = {}
        for name, mean in self.scaling.mean.items():
            table = modalities.get(name, np.full((count, len(mean)), np.nan, np.float32))
            if table.shape != (count, len(mean)):
                raise ModelError(f"the modality {name!r} must be a table of {(count, len(mean))}, not {table.shape}")
            whole[name] = table
        return self.scaling.apply(whole)

    def predict(self, modalities: Modalities) -> Outputs:
        """(N, C) probabilities or (N, 1) numbers, from tables with NaN where a row has nothing of a modality."""
        return self.fitted.predict(self.inputs(modalities))

    def check(self, fingerprint: str) -> None:
        """Refuse vectors of another model: ModelMismatch."""
        if self.fingerprint:
            check_fingerprint("the classifier", self.fingerprint, fingerprint)

    # ---- on disk ----

    def save(self, folder: Path, files: Mapping[str, bytes] | None = None) -> None:
        """Write a new folder, whole or not at all, with further files in it.

        Raises:
            UsageError: it exists, or cannot be made.
            ModelError: the encoder's bundle is not there any more.
        """
        refuse(folder)
        fields = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "encoder": ENCODER if self.own_encoder else self.encoder,
            "own_encoder": self.own_encoder,
            "variant": self.variant,
            "target": asdict(self.target),
            "modalities": list(self.modalities),
            "columns": [asdict(column) for column in self.columns],
            "model": self.fitted.settings(),
        }
        arrays = {f"model/{name}": value for name, value in self.fitted.arrays().items()}
        for i, name in enumerate(self.modalities):
            arrays |= {f"mean/{i}": self.scaling.mean[name], f"std/{i}": self.scaling.std[name]}
        staging = folder.with_name(f".{folder.name}.part")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            with replacing(staging / ARRAYS) as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]
            whole = {**(files or {}), SETTINGS: (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()}
            for name, data in whole.items():
                (staging / name).write_bytes(data)
            if self.own_encoder:
                Bundle.load(Path(self.encoder)).copy_to(staging / ENCODER)
            staging.rename(folder)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, folder: Path) -> FusionClassifier:
        """Read what :meth:`save` has written.

        Raises:
            ModelError: there is no classifier, or it is damaged, or of a newer release.
        """
        file = folder / SETTINGS
        if not file.is_file():
            raise ModelError(f"{folder} holds no classifier: it has no {SETTINGS}; make one with  diptych classify fit")
        try:
            fields = json.loads(file.read_text("utf-8"))
            if fields["format"] > FORMAT:
                raise ModelError(f"{file} has format {fields['format']}, this release reads up to {FORMAT}: upgrade")
            with np.load(folder / ARRAYS, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            target = _target(fields["target"])
            names = tuple(map(str, fields["modalities"]))
            scaling = Scaling(
                {name: arrays[f"mean/{i}"] for i, name in enumerate(names)},
                {name: arrays[f"std/{i}"] for i, name in enumerate(names)},
            )
            own_encoder = fields.get("own_encoder") is True
            own = {key.removeprefix("model/"): value for key, value in arrays.items() if key.startswith("model/")}
            found = cls(
                fingerprint=str(fields["fingerprint"]),
                encoder=str(folder / ENCODER) if own_encoder else str(fields["encoder"]),
                variant=str(fields["variant"]),
                target=target,
                modalities=names,
                columns=tuple(_column(column) for column in fields["columns"]),
                scaling=scaling,
                fitted=load_fitted(target, fields["model"], own),
                own_encoder=own_encoder,
            )
            found._try()
            if own_encoder and Bundle.load(folder / ENCODER).fingerprint != found.fingerprint:
                raise ValueError(f"the model in {ENCODER} is not the one it was fitted with")
        except (*_DAMAGED, OSError, ModelError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"{folder} cannot be read as a classifier: {reason}") from error
        return found

    def _try(self) -> None:
        """Raise ValueError if the parts do not fit each other: a row without anything has an answer too."""
        if not {IMAGE, TEXT, *(column.name for column in self.columns)} >= set(self.modalities):
            raise ValueError("it has modalities that nothing is known of")
        widths = {name: np.full((1, len(mean)), np.nan, np.float32) for name, mean in self.scaling.mean.items()}
        outputs = self.fitted.predict(self.scaling.apply(widths))
        if outputs.shape != (1, self.target.outputs) or not np.isfinite(outputs).all():
            raise ValueError("its arrays do not fit its labels")


def refuse(folder: Path) -> None:
    """Say that a folder exists, before anything is fitted: UsageError."""
    if folder.exists():
        raise UsageError(f"{folder} exists already: choose another --out, or remove it first")


def load_fitted(target: Target, settings: Mapping[str, Any], arrays: Arrays) -> Fitted:
    """A fitted model of any kind from what it wrote."""
    kind = settings["kind"]
    if kind == "late":
        return load_late(target, settings, arrays, load_fitted)
    return {"linear": load_linear, "network": load_network, "graph": load_graph}[kind](target, settings, arrays)


def _target(fields: Mapping[str, Any]) -> Target:
    return Target(
        str(fields["column"]),
        fields["task"],
        tuple(map(str, fields["names"])),
        float(fields["mean"]),
        float(fields["std"]),
    )


def _column(fields: Mapping[str, Any]) -> Column:
    return Column(str(fields["name"]), fields["kind"], int(fields["width"]), tuple(map(str, fields["categories"])))


# ---- why -------------------------------------------------------------------------------------------------------------


def contributions(fitted: Fitted, inputs: Inputs, names: Sequence[str]) -> NDArray[np.float64]:
    """(N, M): by how much the output behind each row's answer falls when a modality is left out.

    Of classes, the probability of the answer; of labels, that of the likeliest; of numbers, by what the number is more
    than without it. 0 where a row does not have the modality.
    """
    whole = fitted.predict(inputs)
    best = whole.argmax(axis=1)
    rows = np.arange(len(whole))
    out = np.zeros((len(whole), len(names)))
    for i, name in enumerate(names):
        without = fitted.predict(inputs.without(name))
        change = whole[rows, best] - without[rows, best]
        out[:, i] = np.where(inputs.present[:, inputs.names.index(name)], change, 0)
    return out
