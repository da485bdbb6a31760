"""open_clip's models in training: from scratch, from their weights, or from a bundle that one was exported to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval.bundle import IMAGE_FILE, TEXT_FILE, Bundle
from retrieval.errors import ModelError
from retrieval.training.export import any_length_text, bound_tower, read_weights

SCRATCH = "scratch:"  # in front of an architecture's name: random weights


@dataclass(frozen=True)
class _Tower:
    """A tower as the loop sees one: features, and what makes a vector of them."""

    trunk: Callable[[Tensor], Tensor]

    def head(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D) unit rows."""
        return F.normalize(features, dim=-1)


class OpenClipEncoder(nn.Module):
    """Any of open_clip's models, with the attributes of a :class:`retrieval.training.towers.DualEncoder`."""

    def __init__(self, clip: Any, bias: float = 0.0) -> None:
        super().__init__()
        self.clip = clip
        if getattr(clip, "logit_bias", None) is None:
            clip.logit_bias = nn.Parameter(torch.tensor(bias))
        self.image, self.text = _Tower(clip.encode_image), _Tower(clip.encode_text)

    @property
    def trained(self) -> nn.Module:
        """What holds the weights."""
        module: nn.Module = self.clip
        return module

    @property
    def adaptable(self) -> list[nn.Module]:
        """What low-rank updates are added to."""
        return [self.trained]

    @property
    def bias(self) -> Tensor:
        """Of the logits, for objectives that learn one."""
        bias: Tensor = self.clip.logit_bias
        return bias

    def scale(self) -> Tensor:
        """The inverse temperature, at most 100 as in CLIP."""
        scale: Tensor = self.clip.logit_scale.exp().clamp(max=100)
        return scale

    def exported(self) -> tuple[nn.Module, nn.Module, bool]:
        """The two towers as a bundle's graphs compute them, and whether the text tower takes any length."""
        any_length = any_length_text(self.clip)
        text = bound_tower(self.clip, any_length or "encode_text")
        return bound_tower(self.clip, "encode_image"), text, any_length is not None


def create(name: str) -> tuple[Any, Mapping[str, Any], Any]:
    """An architecture of open_clip with random weights, its description, and its tokenizer. ModelError for no such one.

    The same weights for the same state of torch's random numbers.
    """
    if name not in open_clip.list_models():
        raise ModelError(f"open_clip has no architecture {name!r}: see  python -m open_clip.list_models")
    return open_clip.create_model(name), open_clip.get_model_config(name) or {}, open_clip.get_tokenizer(name)


def from_bundle(bundle: Bundle) -> Any:
    """The model that a bundle was exported from, with the bundle's weights. ModelError when they do not fit."""
    architecture = bundle.source.get("architecture")
    if not isinstance(architecture, Mapping):
        raise ModelError(f"{bundle.path} cannot be trained further: it does not name its architecture")
    weights = {**read_weights(bundle.path / TEXT_FILE), **read_weights(bundle.path / IMAGE_FILE)}
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "diptych-bundle.json"
        config.write_text(json.dumps(architecture), "utf-8")
        open_clip.add_model_config(config)
        clip = open_clip.create_model("diptych-bundle")
    own = clip.state_dict()
    lost = [name for name in own if name not in weights and not _computed(name)]
    if lost or any(own[name].shape != value.shape for name, value in weights.items() if name in own):
        raise ModelError(f"{bundle.path} cannot be trained further: it is not the network that it names")
    clip.load_state_dict({**own, **{name: value for name, value in weights.items() if name in own}})
    clip.logit_scale.data.fill_(torch.tensor(bundle.score_scale).log())
    return clip


def _computed(name: str) -> bool:
    """What no graph has: the temperature, counters, and masks that are made anew."""
    return name in ("logit_scale", "logit_bias") or name.endswith(("num_batches_tracked", "attn_mask", "position_ids"))
