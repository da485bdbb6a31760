"""Which weights of a dual encoder are trained, and how fast each.

A tower is read as layers from the bottom to the top: its stem (embeddings, first convolutions), its blocks, and its
top, which is all that stands behind the blocks: the last norm, the pooling, the projection. Depth counts from the top:
the top has 0, the last block 1, the first of n blocks n, the stem n + 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from retrieval.errors import DataError, ModelError
from retrieval.training.lora import LORA_PARAMETERS

Side = Literal["image", "text"]

_TEMPERATURE = ("log_scale", "logit_scale", "logit_bias", "bias")  # of the model itself, not of something in a tower
_POSITIONS = re.compile(  # tables of positions and of kinds of tokens
    r"(^|\.)(positional_embedding|class_embedding|cls_emb|pos_embed|cls_token|reg_token|positions\.weight"
    r"|position_embeddings\.weight|token_type_embeddings\.weight)$"
)
_HEADS = (  # where a tower's projection is, the first that there is; timm's pooling where that is the last thing learnt
    *("head", "proj", "text_projection", "attnpool.c_proj"),
    *("trunk.head", "trunk.classifier", "trunk.fc", "trunk.attn_pool"),
)


@dataclass(frozen=True)
class _Plan:
    """How the names of an architecture's parameters tell their place."""

    stem: tuple[str, ...]
    blocks: str  # a pattern, with the block's number as its group
    top: tuple[str, ...]


_PLANS = (
    _Plan(  # open_clip's transformers, of pictures and of words
        ("conv1", "class_embedding", "positional_embedding", "ln_pre", "token_embedding", "cls_emb"),
        r"transformer\.resblocks\.(\d+)\.",
        ("attn_pool", "attn_pool_contrastive", "ln_post", "proj", "ln_final", "text_projection"),
    ),
    _Plan(("conv1", "bn1", "conv2", "bn2", "conv3", "bn3"), r"layer(\d+)\.", ("attnpool",)),  # ModifiedResNet
    _Plan(("trunk.conv_stem", "trunk.bn0"), r"trunk\.blocks\.(\d+)\.", ("trunk.conv_head", "trunk.bn1", "head")),
    _Plan(("trunk.tokens", "trunk.positions", "trunk.kind", "trunk.norm"), r"trunk\.layers\.(\d+)\.", ("head",)),
    _Plan(("trunk.words",), r"trunk\.lstm\.(?:weight|bias)_[ih]h_l(\d+)$", ("head",)),
    _Plan(  # transformers' BERT and RoBERTa
        ("transformer.embeddings",), r"transformer\.encoder\.layer\.(\d+)\.", ("transformer.pooler", "proj")
    ),
    _Plan(  # its T5
        ("transformer.embed_tokens",), r"transformer\.block\.(\d+)\.", ("transformer.final_layer_norm", "proj")
    ),
    _Plan(  # its M2M-100
        ("transformer.embed_tokens",), r"transformer\.layers\.(\d+)\.", ("transformer.layer_norm", "proj")
    ),
)


class Group(TypedDict):
    """One of the optimiser's parameter groups."""

    name: str  # "image block 3", "text head, no decay"
    params: list[nn.Parameter]
    lr: float
    peak: float  # the same, for a schedule to scale
    weight_decay: float
    depth: int | None  # from the top; None where one rate suits all depths


@dataclass(frozen=True)
class Layer:
    """One step of the way through a tower."""

    tower: Side
    name: str  # stem, block 1, block 2, ..., top
    depth: int  # 0 is the top
    parameters: tuple[str, ...]  # their names in the model


@dataclass(frozen=True)
class Count:
    """Numbers that are learnt, and that are not."""

    trained: int = 0
    frozen: int = 0


@dataclass(frozen=True)
class TrainedGroup:
    """One parameter group, for the record."""

    name: str
    depth: int | None
    learning_rate: float
    weight_decay: float
    parameters: int


@dataclass(frozen=True)
class Trained:
    """What a run trains, for its record: ``dataclasses.asdict`` is plain JSON."""

    image: Count
    text: Count
    other: Count  # temperature and bias; what both towers share; what has no part in the contrast, as CoCa's decoder
    groups: tuple[TrainedGroup, ...]

    def lines(self) -> list[str]:
        """The groups as lines of text, each tower from its top to its stem."""
        return [
            f"{group.name}: {group.parameters:,} parameters, learning rate {group.learning_rate:.3g}, "
            f"weight decay {group.weight_decay:g}" + ("" if group.depth is None else f", depth {group.depth}")
            for group in self.groups
        ]


def trainable_groups(
    model: nn.Module,
    what: str = "all",
    *,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    image_learning_rate: float | None = None,
    text_learning_rate: float | None = None,
) -> list[Group]:
    """Choose what is trained, freeze everything else, and give the optimiser's parameter groups.

    Whatever was frozen before has no say. The temperature and a bias of the logits are always trained, without weight
    decay, in a group of their own. Nor do norms, biases, gains and tables of positions decay.

    Args:
        model: a :class:`DualEncoder`, open_clip's ``CLIP`` or ``CustomTextCLIP``, or what is built like one of them.
        what: ``all``: both towers; ``heads``: the projections alone; ``last-N``: the last N blocks of each tower and
            what stands behind them; ``image``, ``text``: one tower, the other locked with its head, so that vectors
            already computed with it stay valid (LiT, Zhai et al. 2022, arXiv:2111.07991), and with it what the two
            share; ``lora``: the updates that :func:`add_lora` added.
        learning_rate: of the projections and the temperature, and of the rest where that has no own.
        weight_decay: of matrices, as AdamW has it.
        layer_decay: the rate falls by this factor with each step of depth (ELECTRA, Clark et al. 2020,
            arXiv:2003.10555; BEiT, Bao et al. 2022, arXiv:2106.08254). 1: the same at all depths.
        image_learning_rate: of the image tower without its projection.
        text_learning_rate: of the text tower without its projection.

    Returns:
        Groups of at least one parameter each: the temperature, what both towers share, then each tower from its top to
        its stem.

    Raises:
        DataError: an unknown ``what``, or a ``layer_decay`` outside (0, 1].
        ModelError: the model has no two towers; or not what is to be trained; or it is asked for by depth (``last-N``,
            ``layer_decay``), and the model's architecture is unknown.
    """
    check_what(what)
    if not 0 < layer_decay <= 1:
        raise DataError(f"layer_decay must be more than 0 and at most 1, not {layer_decay:g}")
    parts = _parts(model)
    chosen = _chosen(parts, what)
    layers = {tower.side: _layer_of(tower, chosen) if layer_decay < 1 else {} for tower in parts.towers}
    undecayed = _undecayed(model)
    model.requires_grad_(False)  # not before everything that can be refused has been
    groups: dict[str, Group] = {}

    def add(name: str, weight: _Weight, rate: float, decay: float, depth: int | None) -> None:
        group = Group(name=name, params=[], lr=rate, peak=rate, weight_decay=decay, depth=depth)
        groups.setdefault(name, group)["params"].append(weight.parameter)
        weight.parameter.requires_grad_()

    for weight in parts.temperature:
        add("temperature", weight, learning_rate, 0.0, None)
    for weight in parts.shared if what not in ("image", "text", "lora") else ():
        plain = weight.name in undecayed
        name = "shared head, no decay" if plain else "shared head"
        add(name, weight, learning_rate, 0.0 if plain else weight_decay, 0 if layer_decay < 1 else None)
    for tower, own_rate in ((parts.image, image_learning_rate), (parts.text, text_learning_rate)):
        rate = learning_rate if own_rate is None else own_rate
        head = {weight.name for weight in tower.head()}
        places = layers[tower.side]
        trained = [weight for weight in tower.weights if weight.name in chosen]
        trained.sort(key=lambda weight: (weight.name not in head, places[weight.name].depth if places else 0))
        for weight in trained:
            layer = places.get(weight.name)
            depth = layer.depth if layer else None
            if weight.name in head:
                name, peak = f"{tower.side} head", learning_rate
            else:
                name = f"{tower.side} {layer.name}" if layer else tower.side
                peak = rate * layer_decay ** (depth or 0)
            if weight.name in undecayed:
                add(f"{name}, no decay", weight, peak, 0.0, depth)
            else:
                add(name, weight, peak, weight_decay, depth)
    return list(groups.values())


def check_what(what: str) -> None:
    """Refuse what :func:`trainable_groups` does not know, before anything is loaded.

    Raises:
        DataError: unknown.
    """
    if what not in ("all", "heads", "image", "text", "lora") and not _last(what):
        raise DataError(f"what is trained must be all, heads, last-N (as last-2), image, text or lora, not {what!r}")


def tower_layers(model: nn.Module) -> tuple[Layer, ...]:
    """The layers of the image tower, then those of the text tower, each from the stem to the top.

    What the two share, which is the top of both, is in neither.

    Raises:
        ModelError: the model has no two towers, or has parts whose order is not known.
    """
    parts = _parts(model)
    return (*parts.image.layers(), *parts.text.layers())


def summary(model: nn.Module, groups: Iterable[Group] = ()) -> Trained:
    """Count what :func:`trainable_groups` has left to be trained."""
    parts = _parts(model)
    return Trained(
        _count(parts.image.weights),
        _count(parts.text.weights),
        _count([*parts.temperature, *parts.shared, *parts.other]),
        tuple(
            TrainedGroup(
                group["name"],
                group["depth"],
                group["peak"],
                group["weight_decay"],
                sum(parameter.numel() for parameter in group["params"]),
            )
            for group in groups
        ),
    )


def train_mode(model: nn.Module) -> None:
    """``model.train()``, except for every part whose parameters are all frozen: that stays in eval mode.

    So locked batch norms keep their statistics, and a locked tower has no dropout: its vectors are those of search.
    """
    model.train()
    _settle(model)


def _settle(module: nn.Module) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _settle(child)


@torch.no_grad()
def clamp_scale(model: nn.Module, most: float = 100.0) -> None:
    """Keep the inverse temperature from 1 to ``most``, after each step, as CLIP does (arXiv:2103.00020, section 2.5).

    Raises:
        ModelError: the model has no temperature.
    """
    scale = getattr(model, "log_scale", getattr(model, "logit_scale", None))
    if scale is None:
        raise ModelError(f"{type(model).__name__} has no temperature: neither log_scale nor logit_scale")
    scale.clamp_(0, math.log(most))


# ---- the parts of a model --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    name: str  # in the model
    local: str  # in the tower
    parameter: nn.Parameter


@dataclass(frozen=True)
class _Tower:
    side: Side
    module: Any  # the model itself, where open_clip's CLIP is its own text tower
    weights: Sequence[_Weight]

    def head(self) -> list[_Weight]:
        """The projection's weights; none where the tower has no projection."""
        for place in _HEADS:
            found = [weight for weight in self.weights if _under(weight.local, (place,))]
            if found:
                return found
        return []

    def layers(self) -> list[Layer]:
        """From the stem to the top, both perhaps without parameters; ModelError for unknown architectures."""
        places = (
            self._timm_places() if hasattr(getattr(self.module, "trunk", None), "group_matcher") else self._places()
        )
        lost = sorted({_root(weight.local) for weight in self.weights if weight.local not in places})
        if lost:
            raise ModelError(
                f"the order of these parts of the {self.side} tower is not known: {', '.join(lost)}. Training by depth "
                "(last-N, layer decay) is not for this model; all, heads and lora without layer decay are"
            )
        blocks = sorted({place for place in places.values() if 0 <= place < math.inf})
        order = [-1.0, *blocks, math.inf]
        names = ["stem", *(f"block {number}" for number in range(1, len(blocks) + 1)), "top"]
        return [
            Layer(self.side, name, depth, tuple(w.name for w in self.weights if places[w.local] == place))
            for place, name, depth in zip(order, names, reversed(range(len(order))), strict=True)
        ]

    def _places(self) -> Mapping[str, float]:
        """Local names to -1 (stem), a block's number, or infinity (top); without those that no plan tells."""
        names = [weight.local for weight in self.weights]
        plan = next((plan for plan in _PLANS if any(re.match(plan.blocks, name) for name in names)), None)
        places: dict[str, float] = {}
        for name in names if plan else ():
            assert plan
            if block := re.match(plan.blocks, name):
                places[name] = int(block[1])
            elif _under(name, plan.stem) or _under(name, plan.top):
                places[name] = -1 if _under(name, plan.stem) else math.inf
        return places

    def _timm_places(self) -> Mapping[str, float]:
        """The same by timm's own account of its networks; what it does not name stands behind the blocks."""
        from timm.models import group_parameters

        trunk = self.module.trunk
        matcher = trunk.group_matcher()
        ids: Mapping[str, int] = group_parameters(trunk, matcher, reverse=True)
        stem = _patterns(matcher.get("stem"))
        blocks = [pattern for key, specs in matcher.items() if key != "stem" for pattern in _patterns(specs)]
        places: dict[str, float] = {}
        for name, number in ids.items():
            in_stem, in_block = (any(re.match(p, name) for p in patterns) for patterns in (stem, blocks))
            places[f"trunk.{name}"] = -1 if in_stem else number if in_block else math.inf
        return {**places, **{weight.local: math.inf for weight in self.weights if _under(weight.local, ("head",))}}


@dataclass(frozen=True)
class _Parts:
    image: _Tower
    text: _Tower
    temperature: Sequence[_Weight]
    shared: Sequence[_Weight]  # of both towers
    other: Sequence[_Weight]

    @property
    def towers(self) -> tuple[_Tower, _Tower]:
        return self.image, self.text


def _parts(model: nn.Module) -> _Parts:
    image = next((name for name in ("visual", "image") if isinstance(getattr(model, name, None), nn.Module)), None)
    apart = isinstance(getattr(model, "text", None), nn.Module)
    if image is None or not (apart or isinstance(getattr(model, "transformer", None), nn.Module)):
        raise ModelError(f"{type(model).__name__} has no image tower and text tower that can be told apart")
    sorted_in: dict[str, list[_Weight]] = {"image": [], "text": [], "temperature": [], "shared": [], "other": []}
    towers = [getattr(model, image), *([model.text] if apart else ())]
    both = set.intersection(*({id(parameter) for parameter in tower.parameters()} for tower in towers)) if apart else ()
    for name, parameter in model.named_parameters():
        root, _, rest = name.partition(".")
        if id(parameter) in both:
            sorted_in["shared"].append(_Weight(name, rest, parameter))
        elif name in _TEMPERATURE:
            sorted_in["temperature"].append(_Weight(name, name, parameter))
        elif root == image:
            sorted_in["image"].append(_Weight(name, rest, parameter))
        elif not apart or root == "text":
            sorted_in["text"].append(_Weight(name, rest if apart else name, parameter))
        else:
            sorted_in["other"].append(_Weight(name, name, parameter))
    return _Parts(
        _Tower("image", getattr(model, image), sorted_in["image"]),
        _Tower("text", model.text if apart else model, sorted_in["text"]),
        sorted_in["temperature"],
        sorted_in["shared"],
        sorted_in["other"],
    )


def _chosen(parts: _Parts, what: str) -> set[str]:
    """The names of the towers' weights to train; ModelError if there are none."""
    names: set[str] = set()
    last = _last(what)
    blocks = 0
    for tower in parts.towers:
        if what in ("all", tower.side):
            names |= {weight.name for weight in tower.weights if not _fixed(weight)}
        elif what == "heads":
            names |= {weight.name for weight in tower.head()}
        elif what == "lora":
            names |= {weight.name for weight in tower.weights if _leaf(weight) in LORA_PARAMETERS}
        elif last:
            layers = tower.layers()[1:]  # the stem only with all
            names |= {name for layer in layers for name in layer.parameters if layer.depth <= last}
            blocks = max(blocks, len(layers) - 1)
    if last > blocks:
        raise ModelError(f"{what} cannot be trained: the deeper tower has {blocks} blocks")
    if not names:
        remedy = "add_lora first" if what == "lora" else "train last-1 or all"
        raise ModelError(f"there is nothing to train: no {what} in either tower ({remedy})")
    return names


def _layer_of(tower: _Tower, chosen: Collection[str]) -> Mapping[str, Layer]:
    """Each weight's layer by its name; empty where the projection alone is trained, which is the top of any tower."""
    head = {weight.name for weight in tower.head()}
    if all(weight.name in head for weight in tower.weights if weight.name in chosen):
        return {}
    return {name: layer for layer in tower.layers() for name in layer.parameters}


def _last(what: str) -> int:
    """N of ``last-N``, 0 of everything else."""
    found = re.fullmatch(r"last-([1-9]\d*)", what)
    return int(found[1]) if found else 0


def _fixed(weight: _Weight) -> bool:
    # open_clip's sine and cosine positions are a parameter that was never meant to be trained; no learnt table has a
    # row of zeros for the class token
    return weight.local == "positional_embedding" and not bool(weight.parameter[0].any())


def _undecayed(model: nn.Module) -> set[str]:
    """Names of parameters that are one row of numbers, however shaped, or that are positions."""
    names = {
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() == max(parameter.shape, default=1) or _POSITIONS.search(name)
        if not name.endswith(LORA_PARAMETERS)  # of rank 1
    }
    for prefix, module in model.named_modules():
        if hasattr(module, "no_weight_decay"):  # timm's and open_clip's own list
            names |= {f"{prefix}.{name}" if prefix else name for name in module.no_weight_decay()}
    return names


def _count(weights: Iterable[_Weight]) -> Count:
    sizes = {True: 0, False: 0}
    for weight in weights:
        sizes[weight.parameter.requires_grad] += weight.parameter.numel()
    return Count(trained=sizes[True], frozen=sizes[False])


def _under(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _leaf(weight: _Weight) -> str:
    return weight.local.rpartition(".")[2]


def _root(name: str) -> str:
    """The part of a tower that a parameter belongs to; inside a trunk, the part of the trunk."""
    parts = name.split(".")
    return ".".join(parts[: 2 if parts[0] in ("trunk", "transformer") else 1])


def _patterns(specs: Any) -> list[str]:
    """The expressions of one entry of a timm matcher: one, or pairs of one and a suffix."""
    return [specs] if isinstance(specs, str) else [expression for expression, _ in specs or ()]
