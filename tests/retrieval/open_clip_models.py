"""open_clip models with random weights, saved to disk the way users have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

_VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}

TINY: dict[str, dict[str, Any]] = {
    "causal": {"embed_dim": 24, "vision_cfg": _VISION, "text_cfg": _TEXT},
    "causal-custom": {
        "embed_dim": 24,
        "vision_cfg": _VISION,
        "text_cfg": {**_TEXT, "proj_bias": True, "pool_type": "eos", "eos_id": 49407},
        "custom_text": True,
        "init_logit_bias": -10,
    },
    "both-ways": {
        "embed_dim": 24,
        "vision_cfg": _VISION,
        "text_cfg": {**_TEXT, "no_causal_mask": True},
        "custom_text": True,
    },
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": _TEXT,
    },
    "coca": {
        "embed_dim": 24,
        "vision_cfg": {**_VISION, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**_TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 1},
        "custom_text": True,
    },
}

CAPTIONS = [
    "A black dog runs along the beach with a stick in its mouth.",
    "Two children build a snowman in front of a red house.",
    "the tabby cat sleeps on an old leather sofa",
    "Three cyclists ride up a steep mountain road in the rain.",
    "a cup of coffee, seen from above, on a wooden table",
    "An astronaut in an orange suit smiles at the camera.",
    "Smoke rises as the rocket lifts off at 7:32 a.m.",
    "The old temple's roof is covered with golden tiles.",
    "Yellow flowers in a vase",
    "people waiting for the bus (no. 42) at night",
]

TEXTS = [
    "a cat",
    "Two dogs play in the snow, and a third one looks on from behind a fence.",
    "It's 9 o'clock & the caf\u00e9 opens!",
    "an astronaut in an orange suit " * 20,
    "",
]


def save_model(
    folder: Path, config: dict[str, Any], preprocess: dict[str, Any] | None = None, tokenizer: Any = None
) -> Path:
    """Save a randomly initialised model as an open_clip `local-dir:`, the same for the same arguments."""
    folder.mkdir(parents=True)
    described = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described), "utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    for name, buffer in model.named_buffers():  # as after training: no two batch norms alike
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.05)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def photos() -> list[Image.Image]:
    """Real photos, of several shapes."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    arrays = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket")]
    return [
        Image.fromarray(array) for array in [*arrays, load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    ]
