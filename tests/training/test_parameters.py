"""What is trained, by the names of the weights; how fast, by depth; and that the rest stays as it was, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from retrieval.errors import DataError, ModelError  # noqa: E402
from retrieval.training.lora import add_lora  # noqa: E402
from retrieval.training.parameters import (  # noqa: E402
    check_what,
    clamp_scale,
    summary,
    tower_layers,
    train_mode,
    trainable_groups,
)
from retrieval.training.towers import DualEncoder, EfficientNetLite, MiniLM  # noqa: E402
from tests.retrieval.open_clip_models import TINY  # noqa: E402

torch.set_num_threads(1)

_WORDS = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}


def build(kind):
    """A small model with random weights."""
    torch.manual_seed(0)
    if kind == "ours":
        words = MiniLM(50, 24, 2, 3)
        words.features = 24
        return DualEncoder(EfficientNetLite(0.2, 0.2), words, 8)
    import open_clip.model
    from open_clip.coca_model import CoCa

    tall = {"embed_dim": 24, "text_cfg": _WORDS, "custom_text": True}
    config = {
        **TINY.get(kind, {}),
        **{
            "mobileclip": {
                **tall,
                "vision_cfg": {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None},
            },
            "siglip": {
                **tall,
                "vision_cfg": {
                    "timm_model_name": "test_vit",
                    "timm_pool": "map",
                    "timm_proj": "none",
                    "image_size": 160,
                },
            },
            "sine": {**TINY["causal"], "vision_cfg": {**TINY["causal"]["vision_cfg"], "pos_embed_type": "sin_cos_2d"}},
        }.get(kind, {}),
    }
    if kind in TINY:
        config["text_cfg"] = {**config["text_cfg"], "vocab_size": 50, "context_length": 8, "eos_id": 49}
    custom = config.pop("custom_text", False)
    if kind == "coca":
        config["multimodal_cfg"] = {**config["multimodal_cfg"], "context_length": 8, "vocab_size": 50}
        return CoCa(**config)
    return (open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP)(**config)


def groups_of(model, what="all", **settings):
    """The groups by name, each as the names of its weights."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = trainable_groups(model, what, **{"learning_rate": 1e-3, "weight_decay": 0.1, **settings})
    held = [parameter for group in groups for parameter in group["params"]]
    assert len(held) == len({id(parameter) for parameter in held})  # none twice
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(group["lr"] == group["peak"] for group in groups)
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}, groups


def trained(model, what):
    groups_of(model, what)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def under(model, *patterns):
    return {name for name, _ in model.named_parameters() if any(re.match(pattern, name) for pattern in patterns)}


# ---- which weights, in which group -----------------------------------------------------------------------------------

TEMPERATURE = {"ours": {"log_scale", "bias"}, "causal-custom": {"logit_scale", "logit_bias"}}
HEADS = {
    "ours": ["image.head", "text.head"],
    "causal": ["visual.proj$", "text_projection$"],
    "causal-custom": ["visual.proj$", r"text\.text_projection"],
    "resnet": [r"visual\.attnpool\.c_proj", "text_projection$"],
    "coca": ["visual.proj$", r"text\.text_projection"],
    "mobileclip": [r"visual\.trunk\.head\.fc\.", r"text\.text_projection"],
    "siglip": [r"visual\.trunk\.attn_pool\.", r"text\.text_projection"],
}
LAST = {  # the last block of each tower and what stands behind
    "ours": [r"image\.(trunk\.(blocks\.6|conv_head|bn1)\.|head)", r"text\.(trunk\.layers\.1\.|head)"],
    "causal": [
        r"visual\.(transformer\.resblocks\.1|ln_post|proj)",
        r"transformer\.resblocks\.1|ln_final|text_projection",
    ],
    "causal-custom": [
        r"visual\.(transformer\.resblocks\.1|ln_post|proj)",
        r"text\.(transformer\.resblocks\.1|ln_final|text_projection)",
    ],
    "resnet": [r"visual\.(layer4|attnpool)", r"transformer\.resblocks\.1|ln_final|text_projection"],
    "coca": [
        r"visual\.(transformer\.resblocks\.1|ln_post|proj|attn_pool)",
        r"text\.(transformer\.resblocks\.1|ln_final|text_projection)",
    ],
    "mobileclip": [
        r"visual\.trunk\.(stages\.3\.blocks\.1|final_conv|head)\.",
        r"text\.(transformer\.resblocks\.1|ln_final|text_projection)",
    ],
    "siglip": [
        r"visual\.trunk\.(blocks\.5|norm|attn_pool|fc_norm)\.",
        r"text\.(transformer\.resblocks\.1|ln_final|text_projection)",
    ],
}
KINDS = list(HEADS)


@pytest.fixture(scope="module")
def built():
    return {kind: build(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained(built, kind):
    model = built[kind]
    warm = TEMPERATURE.get(kind, {"logit_scale"})
    decoder = under(model, "text_decoder")
    every = {name for name, _ in model.named_parameters()} - decoder
    image = under(model, "visual", "image")
    assert trained(model, "all") == every
    assert trained(model, "heads") == under(model, *HEADS[kind]) | warm
    assert trained(model, "last-1") == under(model, *LAST[kind]) | warm
    assert trained(model, "image") == image | warm
    assert trained(model, "text") == every - image
    assert trained(model, "all") == every  # whatever was frozen before


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_decay(built, kind):
    model = built[kind]
    named, groups = groups_of(model, "all", weight_decay=0.2)
    assert named["temperature"] == TEMPERATURE.get(kind, {"logit_scale"})
    tables = r"(positional_embedding|class_embedding|cls_emb|pos_embed|cls_token|positions\.weight)$"
    for group in groups:
        assert group["weight_decay"] == (0.0 if "no decay" in group["name"] or group["name"] == "temperature" else 0.2)
        for name in named[group["name"]] - named["temperature"]:
            parameter = model.get_parameter(name)
            flat = sum(size > 1 for size in parameter.shape) <= 1
            assert (group["weight_decay"] == 0) == bool(flat or re.search(tables, name)), name
    if kind == "mobileclip":
        gains = "visual.trunk.stages.0.blocks.0.layer_scale.gamma"  # (C, 1, 1)
        assert model.get_parameter(gains).ndim == 3
        assert gains in named["image, no decay"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_towers_rates_are_their_own_and_the_projections_learn_at_the_first(built, kind):
    model = built[kind]
    named, groups = groups_of(model, "all", image_learning_rate=1e-4, text_learning_rate=1e-5)
    heads = under(model, *HEADS[kind])
    for group in groups:
        names = named[group["name"]]
        assert group["depth"] is None
        if names & heads or group["name"] == "temperature":
            assert group["lr"] == 1e-3
            assert names <= heads or group["name"] == "temperature"
        else:
            assert group["lr"] == (1e-4 if names <= under(model, "visual", "image") else 1e-5)


# ---- depth -----------------------------------------------------------------------------------------------------------


def depths(model, tower):
    return {layer.name: (layer.depth, set(layer.parameters)) for layer in tower_layers(model) if layer.tower == tower}


def test_depths_of_our_towers(built):
    model = built["ours"]
    image, text = depths(model, "image"), depths(model, "text")
    assert len(model.image.trunk.blocks) == 7
    assert image == {
        "stem": (8, under(model, r"image\.trunk\.(conv_stem|bn0)")),
        **{f"block {n + 1}": (7 - n, under(model, rf"image\.trunk\.blocks\.{n}\.")) for n in range(7)},
        "top": (0, under(model, r"image\.(trunk\.(conv_head|bn1)|head)")),
    }
    assert text == {
        "stem": (3, under(model, r"text\.trunk\.(tokens|positions|kind|norm)")),
        "block 1": (2, under(model, r"text\.trunk\.layers\.0")),
        "block 2": (1, under(model, r"text\.trunk\.layers\.1")),
        "top": (0, under(model, r"text\.head")),
    }


@pytest.mark.parametrize("kind", ["causal", "causal-custom", "coca"])
def test_depths_of_transformers(built, kind):
    model = built[kind]
    own = "" if kind == "causal" else r"text\."
    assert depths(model, "image") == {
        "stem": (3, under(model, r"visual\.(conv1|class_embedding|positional_embedding|ln_pre)")),
        "block 1": (2, under(model, r"visual\.transformer\.resblocks\.0")),
        "block 2": (1, under(model, r"visual\.transformer\.resblocks\.1")),
        "top": (0, under(model, r"visual\.(attn_pool|ln_post|proj)")),
    }
    assert depths(model, "text") == {
        "stem": (3, under(model, rf"{own}(token_embedding|positional_embedding|cls_emb)")),
        "block 1": (2, under(model, rf"{own}transformer\.resblocks\.0")),
        "block 2": (1, under(model, rf"{own}transformer\.resblocks\.1")),
        "top": (0, under(model, rf"{own}(ln_final|text_projection)")),
    }


def test_depths_of_residual_networks(built):
    model = built["resnet"]
    assert depths(model, "image") == {
        "stem": (5, under(model, r"visual\.(conv|bn)[123]")),
        **{f"block {n}": (5 - n, under(model, rf"visual\.layer{n}")) for n in (1, 2, 3, 4)},
        "top": (0, under(model, r"visual\.attnpool")),
    }


def test_depths_of_timm_s_networks_are_timm_s(built):
    image = depths(built["mobileclip"], "image")
    counts = [len(stage.blocks) for stage in built["mobileclip"].visual.trunk.stages]
    assert len(image) == sum(counts) + 2
    assert image["stem"] == (sum(counts) + 1, under(built["mobileclip"], r"visual\.trunk\.stem"))
    assert image["top"] == (0, under(built["mobileclip"], r"visual\.trunk\.(final_conv|head)"))
    second = under(built["mobileclip"], r"visual\.trunk\.stages\.1\.(downsample|blocks\.0)\.")
    assert image[f"block {counts[0] + 1}"] == (sum(counts) - counts[0], second)
    image = depths(built["siglip"], "image")
    assert image["stem"] == (7, under(built["siglip"], r"visual\.trunk\.(cls_token|reg_token|pos_embed|patch_embed)"))
    assert image["block 6"][0] == 1
    assert image["top"] == (0, under(built["siglip"], r"visual\.trunk\.(attn_pool|fc_norm)"))


@pytest.mark.parametrize(
    ("kind", "config", "stem", "block", "top"),
    [
        ("bert", {"hidden_size": 24}, "embeddings", r"encoder\.layer\.{}\.", ""),
        ("roberta", {"hidden_size": 24, "pad_token_id": 1}, "embeddings", r"encoder\.layer\.{}\.", ""),
        ("mt5", {"d_model": 24, "d_kv": 12, "d_ff": 32}, "embed_tokens", r"block\.{}\.", "final_layer_norm"),
        ("m2m_100", {"d_model": 24, "encoder_ffn_dim": 32}, "embed_tokens", r"layers\.{}\.", "layer_norm"),
    ],
)
def test_depths_of_transformers_text_models(tmp_path, kind, config, stem, block, top):
    pytest.importorskip("transformers")
    from open_clip.hf_model import HFTextEncoder

    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "num_layers": 3, "num_heads": 2}
    sizes |= {"encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": 50, **sizes, **config}))
    model = nn.Module()
    model.visual = build("ours").image
    model.text = HFTextEncoder(str(tmp_path), 8, pooler_type="mean_pooler", proj_type="linear", pretrained=False)
    transformer = r"text\.transformer\."
    assert depths(model, "text") == {
        "stem": (4, under(model, transformer + stem)),
        **{f"block {n + 1}": (3 - n, under(model, transformer + block.format(n))) for n in range(3)},
        "top": (0, under(model, r"text\.proj", *([transformer + top] if top else []))),
    }
    assert trained(model, "heads") == under(model, r"text\.proj", r"visual\.head")


@pytest.mark.parametrize("kind", KINDS)
def test_rates_fall_with_depth(built, kind):
    model = built[kind]
    named, groups = groups_of(model, "all", layer_decay=0.7, image_learning_rate=1e-4)
    heads = under(model, *HEADS[kind])
    rates = {name: group["lr"] for group in groups for name in named[group["name"]]}
    depth = {name: layer.depth for layer in tower_layers(model) for name in layer.parameters}
    for layer in tower_layers(model):
        for name in layer.parameters:
            start = 1e-3 if name in heads or layer.tower == "text" else 1e-4
            assert rates[name] == pytest.approx(start * 0.7**layer.depth, rel=1e-12), name
    for group in groups[1:]:
        assert {depth[name] for name in named[group["name"]]} == {group["depth"]}
    assert groups[0]["lr"] == 1e-3
    image = [group["depth"] for group in groups if group["name"].startswith("image")]
    assert image == sorted(image)


def test_the_last_blocks_of_towers_of_unequal_depth(built):
    model = built["ours"]
    assert trained(model, "last-3") == under(
        model, r"log_scale|bias|image\.(trunk\.(blocks\.[456]|conv_head|bn1)\.|head)", r"text\.(trunk\.layers|head)"
    )
    everything = {name for name, _ in model.named_parameters()}
    stems = under(model, r"image\.trunk\.(conv_stem|bn0)", r"text\.trunk\.(tokens|positions|kind|norm)")
    assert trained(model, "last-7") == everything - stems
    with pytest.raises(ModelError, match="last-8 cannot be trained: the deeper tower has 7 blocks"):
        trained(model, "last-8")


# ---- one step of training --------------------------------------------------------------------------------------------


def step(model, kind, groups, steps=1):
    optimizer = torch.optim.AdamW(groups, eps=1e-30)  # the smallest gradients move a weight too
    side = {"resnet": 64}.get(kind, 32)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        train_mode(model)
        pixels, ids = (
            torch.randn(4, 3, side, side, generator=generator),
            torch.randint(1, 50, (4, 8), generator=generator),
        )
        if kind == "ours":
            images, texts, scale, bias = model.image(pixels), model.text(ids), model.scale(), model.bias
        else:
            images, texts = model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
            scale, bias = model.logit_scale.exp(), 0
        optimizer.zero_grad()
        F.softplus((1 - 2 * torch.eye(4)) * (scale * images @ texts.T + bias)).sum().backward()  # the bias learns too
        optimizer.step()


@pytest.mark.parametrize("what", ["all", "heads", "last-1", "image", "text", "lora"])
@pytest.mark.parametrize("kind", ["ours", "causal", "resnet"])
def test_a_step_changes_what_is_trained_and_nothing_else(kind, what):
    model = build(kind)
    for parameter in model.parameters():  # biases and gains too
        nn.init.normal_(parameter, 0.5, 0.2) if parameter.ndim == 1 else None
    if what == "lora":
        add_lora(model, 2, 4.0, ("attention", "linear", "conv1x1"))
    named, groups = groups_of(model, what, learning_rate=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, kind, groups, steps=2)
    after = model.state_dict()
    chosen = set().union(*named.values())
    for name in (name for name, _ in model.named_parameters()):
        assert torch.equal(before[name], after[name]) == (name not in chosen), name
    if what == "lora":
        assert all(name.endswith(("lora_a", "lora_b")) for name in chosen - {"log_scale", "bias", "logit_scale"})
    statistics = [name for name in before if "running" in name or "num_batches" in name]
    moved = {name for name in statistics if not torch.equal(before[name], after[name])}
    norms = {name.rpartition(".")[0] for name in chosen}
    assert moved == {n for n in statistics if n.rpartition(".")[0] in norms and kind == "resnet"}  # ours keep theirs
    assert bool(statistics) == (kind != "causal")


def test_locked_parts_stay_in_eval_mode():
    model = build("resnet")
    groups_of(model, "last-1")
    for _ in range(2):
        train_mode(model)
        modes = {name: part.training for name, part in model.visual.named_modules() if isinstance(part, nn.BatchNorm2d)}
        assert {name for name, training in modes.items() if training} == {name for name in modes if "layer4" in name}
        assert model.training
        assert model.transformer.resblocks[1].training
        assert not model.transformer.resblocks[0].training
        model.eval()
    groups_of(model, "all")
    train_mode(model)
    assert all(part.training for part in model.modules())


def test_a_locked_tower_has_no_dropout():
    model = build("ours")
    model.image.head.noise = model.text.head.noise = 1.0
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([[4, 5], [6, 7]])
    groups_of(model, "text")
    train_mode(model)
    assert torch.equal(model.image(pixels), model.image(pixels))
    assert not torch.equal(model.text(ids), model.text(ids))
    model.eval()
    locked = model.image(pixels)
    train_mode(model)
    assert torch.equal(model.image(pixels), locked)


# ---- LoRA, fixed positions, unknown models ---------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_updates_learn_at_the_rate_of_their_depth(rank):
    model = build("causal")
    add_lora(model, rank, 4.0)
    named, groups = groups_of(model, "lora", layer_decay=0.5, image_learning_rate=1e-4)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "temperature": (1e-3, 0.0),
        "image block 2": (0.5e-4, 0.1),
        "image block 1": (0.25e-4, 0.1),
        "text block 2": (0.5e-3, 0.1),
        "text block 1": (0.25e-3, 0.1),
    }
    assert named["image block 2"] == under(model, r"visual\.transformer\.resblocks\.1\..*lora_[ab]$")
    counted = summary(model, groups)
    assert counted.image.trained == sum(model.get_parameter(n).numel() for n in under(model, r"visual\..*lora_[ab]$"))
    with pytest.raises(ModelError, match=r"no lora in either tower \(add_lora first\)"):
        groups_of(build("causal"), "lora")


def test_sine_positions_are_never_trained():
    model = build("sine")
    assert not model.visual.positional_embedding.requires_grad
    assert trained(model, "all") == {name for name, _ in model.named_parameters()} - {"visual.positional_embedding"}


class Unknown(nn.Module):
    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.visual, self.text = nn.Module(), build("ours").text
        self.visual.encoder, self.visual.pool = nn.Linear(3, 4), nn.Linear(4, 4)
        if head:
            self.visual.head = nn.Linear(4, 8)
        self.logit_scale = nn.Parameter(torch.zeros(()))


def test_an_unknown_architecture_is_trained_but_not_by_depth():
    model = Unknown()
    assert trained(model, "all") == {name for name, _ in model.named_parameters()}
    assert trained(model, "heads") == under(model, r"visual\.head|text\.head|logit_scale")
    assert trained(model, "image") == under(model, "visual|logit_scale")
    assert len(groups_of(model, "heads", layer_decay=0.5)[1]) == 5
    told = r"order of these parts of the image tower is not known: encoder, head, pool\. Training by depth"
    trained(model, "heads")
    before = [parameter.requires_grad for parameter in model.parameters()]
    for what, settings in (("last-1", {}), ("all", {"layer_decay": 0.9}), ("image", {"layer_decay": 0.9})):
        with pytest.raises(ModelError, match=told):
            groups_of(model, what, **settings)
        assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert groups_of(model, "text", layer_decay=0.9)[0]["text block 2"]
    with pytest.raises(ModelError, match=told):
        tower_layers(model)
    add_lora(model.visual, 2, 1.0)
    assert trained(model, "lora") == under(model, ".*lora_[ab]$", "logit_scale")


def test_a_part_that_a_known_architecture_does_not_have_is_named():
    model = build("causal")
    model.visual.adapter = nn.Linear(2, 2)
    model.visual.transformer.extra = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"of the image tower is not known: adapter, transformer\.extra"):
        trained(model, "last-1")


def test_a_tower_without_projection_stays_locked_with_heads():
    model = Unknown(head=False)
    assert trained(model, "heads") == under(model, r"text\.head|logit_scale")
    model.text = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"no heads in either tower \(train last-1 or all\)"):
        trained(model, "heads")


def test_refusals():
    with pytest.raises(ModelError, match="Linear has no image tower and text tower"):
        groups_of(nn.Linear(2, 2))
    model = build("ours")
    everything = [parameter.requires_grad for parameter in model.parameters()]
    for what in ("", "last", "last-0", "last-01", "last--1", "Heads", "last-1x"):
        with pytest.raises(DataError, match="what is trained must be all, heads, last-N"):
            groups_of(model, what)
        with pytest.raises(DataError, match="what is trained must be"):
            check_what(what)
    for decay in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(DataError, match="layer_decay must be more than 0 and at most 1"):
            groups_of(model, layer_decay=decay)
    with pytest.raises(ModelError):
        groups_of(model, "last-99")
    assert [parameter.requires_grad for parameter in model.parameters()] == everything  # refused unchanged
    for what in ("all", "heads", "last-12", "image", "text", "lora"):
        check_what(what)


# ---- the record, the temperature -------------------------------------------------------------------------------------


def test_the_record_counts():
    model = build("ours")
    groups = trainable_groups(model, "last-1", learning_rate=1e-3, weight_decay=0.1, layer_decay=0.5)
    record = summary(model, groups)
    for counted, side in ((record.image, model.image), (record.text, model.text)):
        sizes = [(p.requires_grad, p.numel()) for p in side.parameters()]
        assert counted.trained == sum(size for learns, size in sizes if learns) > 0
        assert counted.frozen == sum(size for learns, size in sizes if not learns) > 0
    assert (record.other.trained, record.other.frozen) == (2, 0)
    assert sum(group.parameters for group in record.groups) == record.image.trained + record.text.trained + 2
    assert json.loads(json.dumps(dataclasses.asdict(record)))["groups"][0] == {
        "name": "temperature",
        "depth": None,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "parameters": 2,
    }
    lines = record.lines()
    assert lines[0] == "temperature: 2 parameters, learning rate 0.001, weight decay 0"
    width = 24
    assert lines[-2:] == [
        f"text block 2: {12 * width * width:,} parameters, learning rate 0.0005, weight decay 0.1, depth 1",
        f"text block 2, no decay: {13 * width} parameters, learning rate 0.0005, weight decay 0, depth 1",
    ]


@pytest.mark.parametrize("kind", ["ours", "causal"])
def test_the_scale_is_clamped(kind):
    model = build(kind)
    scale = model.log_scale if kind == "ours" else model.logit_scale
    for value, most, expected in (
        (9.0, 100, math.log(100)),
        (-1.0, 100, 0.0),
        (3.0, 100, 3.0),
        (9.0, 200, math.log(200)),
    ):
        scale.data.fill_(value)
        clamp_scale(model, most)
        assert scale.item() == pytest.approx(expected, rel=1e-6)
        assert scale.requires_grad
    with pytest.raises(ModelError, match="Linear has no temperature"):
        clamp_scale(nn.Linear(2, 2))
