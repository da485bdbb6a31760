"""Generators on the disk: ``generator.json`` and ``weights.safetensors`` in a folder of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import nn

from indexes.manifest import replacing
from indexes.vectors import Vectors
from retrieval.errors import ModelError, UsageError
from retrieval.heads import Translator
from retrieval.heads.generation.adversarial import GeneratorNet
from retrieval.heads.generation.autoencoder import Autoencoder, AutoencoderNet
from retrieval.heads.generation.gan import PictureGenerator
from retrieval.heads.generation.material import Centring
from retrieval.heads.generation.prior import Prior, PriorNet, between
from retrieval.heads.modalities import IMAGE, TEXT

FORMAT = 1
SETTINGS, ARRAYS = "generator.json", "weights.safetensors"


Stored = Autoencoder | Prior | PictureGenerator

# By kind: the network that its build makes, the generator around it, and the fields that only this kind has.
_KINDS: Mapping[str, tuple[Callable[..., nn.Module], Callable[..., Stored], tuple[str, ...]]] = {
    "autoencoder": (AutoencoderNet, Autoencoder, ("modalities", "beta", "share")),
    "prior": (PriorNet, Prior, ("share", "draws")),
    "gan": (GeneratorNet, PictureGenerator, ()),
}


def refuse(folder: Path) -> None:
    """Say that a folder exists, before anything is fitted: UsageError."""
    if folder.exists():
        raise UsageError(f"{folder} exists already: choose another --out, or remove it first")


def save(generator: Stored, folder: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a generator into a folder, which is made if it is not there.

    Args:
        generator: of any kind.
        folder: what is there under the same names is replaced, the JSON last.
        about: whatever else is to be known of it, in JSON: settings, data, measurements.

    Raises:
        UsageError: nothing can be written.
    """
    fields = {
        "format": FORMAT,
        "kind": generator.kind,
        "fingerprint": generator.fingerprint,
        "encoder": generator.encoder,
        "source": generator.source,
        "target": generator.target,
        "build": dict(generator.build),
        **{name: getattr(generator, name) for name in _KINDS[generator.kind][2]},
        "about": dict(about or {}),
    }
    arrays = {f"network/{name}": value for name, value in generator.arrays().items()}
    arrays |= {f"mean/{name}": value for name, value in generator.centring.means.items()}
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in (
            (ARRAYS, save_arrays({name: np.ascontiguousarray(value) for name, value in arrays.items()})),
            (SETTINGS, text.encode()),
        ):
            with replacing(folder / name) as file:
                file.write(data)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error


def load(folder: Path, device: str = "cpu") -> Stored:
    """Read what :func:`save` has written.

    Raises:
        ModelError: there is no generator, or it is damaged, or of a newer release.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise ModelError(
            f"{folder} holds no generator: it has no {SETTINGS}; make one with  diptych imagine fit --out {folder}"
        )
    try:
        fields = json.loads(file.read_text("utf-8"))
        if fields["format"] > FORMAT:
            raise ModelError(f"{file} has format {fields['format']}, this release reads up to {FORMAT}: upgrade")
        arrays = load_arrays((folder / ARRAYS).read_bytes())
        network_of, generator_of, own = _KINDS[fields["kind"]]
        with torch.random.fork_rng(devices=[]):  # its first weights are random, and of no consequence
            network = network_of(**fields["build"])
        network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in _part(arrays, "network/")})
        found = generator_of(
            str(fields["fingerprint"]),
            str(fields["encoder"]),
            Centring(dict(_part(arrays, "mean/"))),
            network.to(device).eval(),
            fields["build"],
            source=str(fields["source"]),
            target=str(fields["target"]),
            device=device,
            **{name: tuple(fields[name]) if isinstance(fields[name], list) else fields[name] for name in own},
        )
        _try(found)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{folder} cannot be read as a generator: {reason}") from error
    return found


def translators(
    folder: Path, source: str | None = None, target: str | None = None, device: str = "cpu"
) -> list[Translator]:
    """What a generator translates: from and to the modalities given, or all ways that it knows.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    generator = load(folder, device)
    ways = [
        way
        for one, other in ((TEXT, IMAGE), (IMAGE, TEXT))
        if source in (None, one) and target in (None, other) and (way := between(generator, one, other)) is not None
    ]
    if not ways:
        wanted = f"from {source} to {target}" if source and target else "between image and text"
        raise ModelError(f"{folder} translates nothing {wanted}: fit one with  diptych imagine fit --kind regression")
    return ways


def told(folder: Path) -> dict[str, Any]:
    """What was told of a generator when it was saved. Raises what :func:`load` does, but looks at the JSON alone."""
    try:
        fields: dict[str, Any] = json.loads((folder / SETTINGS).read_text("utf-8"))["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} cannot be read as a generator: {error}") from error
    return fields


def _part(arrays: Mapping[str, NDArray[Any]], prefix: str) -> list[tuple[str, NDArray[Any]]]:
    return [(name.removeprefix(prefix), value) for name, value in arrays.items() if name.startswith(prefix)]


def _try(generator: Stored) -> None:
    """Raise ValueError if the parts do not fit each other: anything can be made something of."""
    probe: Vectors = np.eye(1, len(generator.centring.means[generator.source]), dtype=np.float32)
    if not np.isfinite(generator.generate(probe)).all():
        raise ValueError("its arrays are not finite")
