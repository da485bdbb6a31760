"""Low-rank updates of frozen weights: LoRA (Hu et al. 2021, arXiv:2106.09685).

A weight W becomes W + alpha / rank * B A, of which only A and B learn. It is the tensor that is replaced, not the
module around it: so code that reads a weight itself sees the sum too, above all ``nn.MultiheadAttention``, whose query,
key and value lie packed in one tensor, and open_clip's attention pooling.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from retrieval.errors import DataError, ModelError

Target = Literal["attention", "linear", "conv1x1"]

LORA_PARAMETERS = ("lora_a", "lora_b")  # the last part of their names in ``named_parameters()``
_PACKED = "in_proj_weight"  # query, key and value above one another
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # the same, of inputs of different widths


class LowRank(nn.Module):
    """The update of one weight, or of several that lie above one another in one tensor, each with its own A and B.

    ``lora_a`` is (rank, in), ``lora_b`` (out, rank); of a packed tensor (3, rank, in) and (3, out / 3, rank).
    """

    lora_scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        parts: int,
        rank: int,
        alpha: float,
        dropout: float,
        generator: torch.Generator | None,
        order: tuple[str, ...],
    ) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0] // parts, weight[0].numel()
        packed = (parts,) if parts > 1 else ()
        a = torch.empty((*packed, rank, inputs), dtype=torch.float64)  # on the CPU: one seed, the same numbers anywhere
        bound = 1 / math.sqrt(inputs)  # what nn.Linear starts from, as in the paper's code
        a.uniform_(-bound, bound, generator=generator)
        dtype = torch.promote_types(weight.dtype, torch.float32)  # steps are too small for half precision
        self.lora_a = nn.Parameter(a.to(weight.device, dtype))
        self.lora_b = nn.Parameter(torch.zeros((*packed, outputs, rank), device=weight.device, dtype=dtype))
        self.register_buffer("lora_scale", torch.tensor(alpha / rank, device=weight.device))
        self.dropout = dropout
        self.order = order  # of the parameters of the weight's module, to be merged back into

    def forward(self, weight: Tensor) -> Tensor:
        """W -> W + scale B A, of the same shape and type."""
        a: Tensor = self.lora_a
        if self.training and self.dropout:
            a = a * F.dropout(a.new_ones(a.shape[-1]), self.dropout)  # whole columns: A does not see these inputs
        update = self.lora_scale * (self.lora_b @ a)
        return weight + update.reshape(weight.shape).to(weight.dtype)


def add_lora(
    module: nn.Module,
    rank: int,
    alpha: float,
    targets: Collection[Target] = ("attention", "linear"),
    *,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[str, ...]:
    """Freeze a module and give its weights low-rank updates, which start at zero: each weight stays bit for bit.

    (The outputs too, where torch picks the same kernels; for attention it looks at what requires a gradient.)
    Merge before exporting (:func:`merge_lora`), and before interpolating: the product of two mixed factors is not the
    mix of two products.

    Args:
        module: a model, a tower or a part of one, changed in place.
        rank: of each update.
        alpha: the update is scaled by alpha / rank (section 4.1 of the paper).
        targets: ``attention``: query, key, value and output of ``nn.MultiheadAttention`` and of open_clip's own
            ``Attention``; ``linear``: every other ``nn.Linear``, those that attention is made of elsewhere among them;
            ``conv1x1``: ungrouped pointwise convolutions.
        dropout: share of a weight's input features that A does not see, drawn anew for each forward pass and the same
            for the whole batch, since it is the weight that changes and not the input.
        generator: on the CPU; draws A. None: torch's global one.

    Returns:
        The names of the adapted weights.

    Raises:
        DataError: an unknown target, a rank below 1, a dropout outside [0, 1).
        ModelError: the module has no such weight, or has updates already.
    """
    unknown = sorted(set(targets) - set(get_args(Target)))
    if unknown:
        raise DataError(f"LoRA has no target {unknown[0]!r}: it knows {', '.join(get_args(Target))}")
    if rank < 1 or not 0 <= dropout < 1:
        raise DataError(f"LoRA takes a rank of 1 or more and a dropout in [0, 1), not {rank} and {dropout}")
    if any(True for _ in _updates(module)):
        raise ModelError("the model has LoRA updates already: merge them first")
    found = list(_targets(module, targets))
    if not found:
        raise ModelError(
            f"{type(module).__name__} has no weight for LoRA among {', '.join(targets)}: "
            f"choose other targets of {', '.join(get_args(Target))}"
        )
    module.requires_grad_(False)
    orders = {id(owner): tuple(owner._parameters) for _, owner, _, _ in found}
    for _, owner, tensor, parts in found:
        update = LowRank(getattr(owner, tensor), parts, rank, alpha, dropout, generator, orders[id(owner)])
        update.train(owner.training)
        # unsafe: no trial run; shape and type are kept by construction
        parametrize.register_parametrization(owner, tensor, update, unsafe=True)
    return tuple(_join(name, tensor) for name, _, tensor, _ in found)


def merge_lora(module: nn.Module) -> None:
    """Fold the updates into the weights: the same outputs under the plain names, in their old order, all still frozen.

    A deep copy can be merged for measuring or exporting while the original goes on learning.

    Raises:
        ModelError: the module has no updates.
    """
    found = list(_updates(module))
    if not found:
        raise ModelError(f"{type(module).__name__} has no LoRA updates to merge")
    for _, owner, tensor, update in found:
        weight = owner.parametrizations[tensor].original  # type: ignore[index, union-attr]
        with torch.no_grad():
            weight.copy_(update.eval()(weight))
    for owner in {id(owner): owner for _, owner, _, _ in found}.values():
        _restore(owner)


def _restore(owner: nn.Module) -> None:
    # Not torch's remove_parametrizations: it takes the property off a class that deep copies share, and so breaks them,
    # and it puts the weight behind the bias.
    adapted = dict(owner.parametrizations.items())  # type: ignore[operator, union-attr]
    held = {**owner._parameters, **{name: one.original for name, one in adapted.items()}}
    order = next(one[0].order for one in adapted.values())
    del owner.parametrizations
    owner.__class__ = type(owner).__bases__[0]
    owner._parameters.clear()
    for name in order:
        owner.register_parameter(name, held[name])


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """The updates alone, for a checkpoint: ``<weight>.lora_a``, ``.lora_b`` and ``.lora_scale`` of each."""
    return {key: value.clone() for key, value in _tensors(module).items()}


def load_lora(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`lora_state` gave, into a module that :func:`add_lora` has prepared in the same way.

    Raises:
        ModelError: the updates are of other weights, or of another rank.
    """
    own = _tensors(module)
    wrong = sorted(own.keys() ^ state.keys()) or sorted(k for k, v in own.items() if v.shape != state[k].shape)
    if wrong:
        raise ModelError(
            f"the LoRA updates do not fit the model: {wrong[0]} is missing, superfluous or of another size"
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{_join(name, tensor)}.{key}": value
        for name, _, tensor, update in _updates(module)
        for key, value in update.state_dict().items()
    }


def _updates(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, LowRank]]:
    """Every update with its weight: the owner's name, the owner, the tensor's name in it."""
    for name, owner in module.named_modules():
        if parametrize.is_parametrized(owner):
            for tensor, held in owner.parametrizations.items():
                if isinstance(held[0], LowRank):
                    yield name, owner, tensor, held[0]


def _targets(module: nn.Module, targets: Collection[Target]) -> Iterator[tuple[str, nn.Module, str, int]]:
    """The weights to adapt: their owner's name, the owner, the tensor's name in it, the weights packed in it."""
    owners = [(name, owner) for name, owner in module.named_modules() if not parametrize.is_parametrized(owner)]
    outputs = {id(owner.out_proj) for _, owner in owners if _attends(owner)}
    for name, owner in owners:
        if _attends(owner) and "attention" in targets:
            for tensor in (_PACKED, *_SEPARATE):
                if getattr(owner, tensor, None) is not None:
                    yield name, owner, tensor, 3 if tensor == _PACKED else 1
        elif ("attention" if id(owner) in outputs else _kind(owner)) in targets:
            yield name, owner, "weight", 1


def _attends(owner: nn.Module) -> bool:
    weights = (owner._parameters.get(name) for name in (_PACKED, *_SEPARATE))
    return hasattr(owner, "out_proj") and any(weight is not None for weight in weights)


def _kind(owner: nn.Module) -> Target | None:
    if isinstance(owner, nn.Linear):
        return "linear"
    pointwise = isinstance(owner, nn.Conv2d) and owner.kernel_size == (1, 1) and owner.groups == 1
    return "conv1x1" if pointwise else None


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
