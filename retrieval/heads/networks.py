"""Networks as variants: how one of :mod:`retrieval.heads.fusion` is trained on tables, and used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from retrieval.heads.fusion import FusionNet
from retrieval.heads.imbalance import class_weights, focal_loss, treated
from retrieval.heads.modalities import Inputs
from retrieval.heads.problem import Arrays, Fitted, Part, Problem, link
from retrieval.heads.scores import Outputs
from retrieval.heads.targets import Target
from retrieval.training.averaging import WeightAverage
from retrieval.training.fit import FitConfig, adamw, fit_best, plain_groups
from retrieval.training.parameters import Group

_EMA = 0.98  # of the weights: what is kept does not depend on the last batch
_PATIENCE = 6  # scores on val without a better one
_FEWEST = 300  # steps: a few rows are passed over often
_OGM_ALPHA = 0.5  # how much a modality that is ahead is slowed down


@dataclass(frozen=True)
class Recipe:
    """How a network learns; the same for all, unless a variant says otherwise."""

    epochs: int = 30
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    joint: float = 0.3  # of the loss of each modality alone, beside the fused one
    drop: float = 0.2  # how often a modality is left out of a row that has another one


@dataclass(frozen=True)
class Network:
    """A fusion network, trained by gradients; kept is what validates best on the way."""

    fusion: str
    stage: str
    about: str
    hidden: int = 128
    tokens: int = 1
    dropout: float = 0.5
    weighting: Literal["learnt", "fixed", "searched"] = "learnt"  # of a sum
    recipe: Recipe = field(default_factory=Recipe)

    def fit(self, problem: Problem) -> FittedNetwork:
        """Train one; or one for each of the weights that are searched, and take the best on val."""
        count = len(problem.train.inputs.names)
        choices: Sequence[Sequence[float]] = [()] if self.weighting == "learnt" else [[1 / count] * count]
        if self.weighting == "searched" and count > 1:
            choices = _weightings(count)
        best, score = None, -np.inf
        for weights in choices:
            fitted = _train(self, problem, weights)
            value = problem.score(fitted.predict(problem.val.inputs)) if len(choices) > 1 else 0.0
            if best is None or value > score:
                best, score = fitted, value
        assert best is not None  # there is a choice
        return best


def _weightings(count: int) -> list[list[float]]:
    """Of two: from 0.2 to 0.8. Of more: each of them ahead of the others, and all alike."""
    if count == 2:
        return [[0.2, 0.8], [0.35, 0.65], [0.5, 0.5], [0.65, 0.35], [0.8, 0.2]]
    ahead = [[0.6 if i == j else 0.4 / (count - 1) for i in range(count)] for j in range(count)]
    return [[1 / count] * count, *ahead]


@dataclass(frozen=True, eq=False)
class FittedNetwork:
    """A trained network, and what builds it anew."""

    target: Target
    network: FusionNet
    build: Mapping[str, Any]  # FusionNet's arguments
    device: str = "cpu"

    def predict(self, inputs: Inputs) -> Outputs:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return link(self.target, self._run(inputs)[0])

    def attention(self, inputs: Inputs) -> NDArray[np.float64] | None:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return self._run(inputs)[1]

    @torch.inference_mode()
    def _run(self, inputs: Inputs) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        self.network.eval()
        values, present = tensors(inputs, self.device)
        logits, _, attention = self.network(values, present)
        looked = None if attention is None else attention.double().cpu().numpy()
        return logits.double().cpu().numpy(), looked

    def arrays(self) -> Arrays:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}

    def settings(self) -> dict[str, Any]:
        """See :class:`retrieval.heads.problem.Fitted`."""
        return {"kind": "network", "build": dict(self.build)}


def load_network(target: Target, settings: Mapping[str, Any], arrays: Arrays) -> Fitted:
    """A fitted model from what it wrote; KeyError, ValueError or RuntimeError where that is damaged."""
    build = dict(settings["build"])
    network = FusionNet(**build)
    network.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in arrays.items()})
    return FittedNetwork(target, network.eval(), build)


def tensors(inputs: Inputs, device: str) -> tuple[list[Tensor], Tensor]:
    """M tables (N, width), and who has what (N, M), on a device."""
    values = [torch.from_numpy(np.ascontiguousarray(table)).to(device) for table in inputs.values]
    return values, torch.from_numpy(inputs.present.astype(np.float32)).to(device)


def loss_function(problem: Problem, train: Part) -> Callable[[Tensor, Tensor], Tensor]:
    """(B, C) logits and what is right -> a scalar, as the task and the treatment have it."""
    target = problem.target
    if target.task == "number":
        return lambda logits, right: F.smooth_l1_loss(logits[:, 0], right)
    if problem.treatment == "focal":
        return focal_loss
    weighted = problem.treatment == "class-weights"
    if target.task == "labels":
        share = train.right.mean(axis=0).clip(0.01, 0.99)
        positive = torch.tensor(np.minimum((1 - share) / share, 10), dtype=torch.float32, device=problem.device)
        return lambda logits, right: F.binary_cross_entropy_with_logits(
            logits, right, pos_weight=positive if weighted else None
        )
    weight = torch.tensor(class_weights(train.right, target.outputs), dtype=torch.float32, device=problem.device)
    return lambda logits, right: F.cross_entropy(logits, right, weight=weight if weighted else None)


def right_tensor(target: Target, right: NDArray[Any], device: str) -> Tensor:
    """What is right, as the loss takes it: numbers are standardised."""
    if target.task == "class":
        return torch.from_numpy(right.astype(np.int64)).to(device)
    if target.task == "labels":
        return torch.from_numpy(right.astype(np.float32)).to(device)
    return torch.tensor((right - target.mean) / target.std, dtype=torch.float32, device=device)


def _train(variant: Network, problem: Problem, weights: Sequence[float]) -> FittedNetwork:
    recipe, target = variant.recipe, problem.target
    build: dict[str, Any] = {
        "widths": [table.shape[1] for table in problem.train.inputs.values],
        "outputs": target.outputs,
        "fusion": variant.fusion,
        "hidden": variant.hidden,
        "tokens": variant.tokens,
        "dropout": variant.dropout,
        "weights": list(weights),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        network = FusionNet(**build).to(problem.device)
        train = treated(problem)
        values, present = tensors(train.inputs, problem.device)
        right = right_tensor(target, train.right, problem.device)
        val_values, val_present = tensors(problem.val.inputs, problem.device)
        val_right = right_tensor(target, problem.val.right, problem.device)
        objective = Objective(network, problem, train, recipe)

        def step(rows: Tensor) -> Tensor:
            return objective.loss([table[rows] for table in values], present[rows], right[rows])

        def score() -> float:
            return -float(objective.fused(network(val_values, val_present)[0], val_right))

        learn(network, step, score, len(train), recipe, problem.seed, before_step=objective.slow_down)
    return FittedNetwork(target, network, build, problem.device)


class Objective:
    """What a network learns by: its own loss, that of each modality alone, and modalities left out at random."""

    def __init__(self, network: FusionNet, problem: Problem, train: Part, recipe: Recipe) -> None:
        """``train``: the rows to learn from, after the treatment of rare classes."""
        self.network, self.recipe, self.task = network, recipe, problem.target.task
        self.fused = loss_function(problem, train)
        several = len(network.towers) > 1
        self.joint = recipe.joint if several else 0.0
        self.balance = OGM(network) if problem.balance == "ogm-ge" and several and self.task == "class" else None

    def loss(self, values: Sequence[Tensor], present: Tensor, right: Tensor) -> Tensor:
        """M tables (B, width), (B, M) and what is right for B rows -> a scalar."""
        shown = dropped(present, self.recipe.drop)
        logits, alone, _ = self.network(values, shown)
        if self.balance:
            self.balance.look(alone.detach(), right, shown)
        loss = self.fused(logits, right)
        for i in range(alone.shape[1] if self.joint else 0):
            own = shown[:, i] > 0
            if own.any():
                loss = loss + self.joint * self.fused(alone[own, i], right[own])
        return loss

    def slow_down(self) -> None:
        """Between the gradients and the step."""
        if self.balance:
            self.balance.slow_down()


def learn(
    network: nn.Module,
    step: Callable[[Tensor], Tensor],
    score: Callable[[], float],
    count: int,
    recipe: Recipe,
    seed: int,
    *,
    fewest: int = _FEWEST,
    patience: int = _PATIENCE,
    before_step: Callable[[], None] = lambda: None,
    groups: Sequence[Group] = (),
) -> None:
    """Fit a network on shuffled row numbers; kept is what scores best at the end of a pass.

    Args:
        network: what learns.
        step: the loss of a batch of row numbers.
        score: higher is better, see :func:`retrieval.training.fit.fit_best`.
        count: how many rows there are.
        recipe: passes, batch, rate and decay.
        seed: of the order of the rows.
        fewest: steps at least.
        patience: scores in a row without a better one, after which it ends.
        before_step: called between the gradients and the step.
        groups: of the optimiser, where not all weights learn as the recipe says.
    """
    steps = max(1, count // recipe.batch)  # a pass
    total = max(recipe.epochs * steps, fewest)
    config = FitConfig(
        network,
        adamw(groups or plain_groups(network, recipe.learning_rate, recipe.weight_decay)),
        total,
        warmup=steps,
        clip=1.0,
        average=WeightAverage(network, _EMA),
        before_step=before_step,
    )
    batches = shuffled(count, recipe.batch, total, seed)
    fit_best(step, batches, config, score, every=max(steps, total // recipe.epochs), patience=patience)


def shuffled(count: int, batch: int, total: int, seed: int) -> Iterator[Tensor]:
    """So many batches of row numbers: each pass over the rows is shuffled, and what is left of it falls out."""
    random = np.random.default_rng(seed)
    done = 0
    while done < total:
        order = torch.from_numpy(random.permutation(count))
        for begin in range(0, max(1, count - batch + 1), batch):
            if done == total:
                return
            yield order[begin : begin + batch]
            done += 1


def dropped(present: Tensor, share: float) -> Tensor:
    """Modality dropout: leave each out of so many rows, never the last one that a row has (B, M)."""
    if not share or present.shape[1] < 2:
        return present
    kept = present * (torch.rand_like(present) >= share)
    return torch.where(kept.sum(1, keepdim=True) > 0, kept, present)


class OGM:
    """On-the-fly gradient modulation with generalisation enhancement (Peng et al. 2022, arXiv:2203.15332).

    The tower of a modality whose own layer is surer of the right class than the others' learns slower by
    1 - tanh(α ρ), ρ > 1 being how much surer; noise of its gradients' own spread makes up for what that takes away.
    """

    def __init__(self, network: FusionNet, alpha: float = _OGM_ALPHA) -> None:
        self.network, self.alpha = network, alpha
        self.slower = torch.ones(len(network.towers))

    def look(self, alone: Tensor, right: Tensor, present: Tensor) -> None:
        """Take in what each modality alone says of a batch: (B, M, C), (B,) and (B, M)."""
        sure = alone.softmax(2).gather(2, right[:, None, None].expand(-1, alone.shape[1], 1))[..., 0] * present
        sums = sure.sum(0)  # (M,)
        others = (sums.sum() - sums) / max(1, len(sums) - 1)
        ahead = sums / others.clamp(min=1e-6)
        self.slower = torch.where(ahead > 1, 1 - torch.tanh(self.alpha * ahead), torch.ones_like(ahead))

    def slow_down(self) -> None:
        """Change the towers' gradients before the step."""
        for tower, factor in zip(self.network.towers, self.slower.tolist(), strict=True):
            for weight in tower.parameters():
                if weight.grad is not None and factor < 1:
                    spread = weight.grad.std() if weight.grad.numel() > 1 else torch.zeros(())
                    weight.grad.mul_(factor).add_(torch.randn_like(weight.grad) * (spread + 1e-8))
