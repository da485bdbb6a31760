"""A graph network over nearest neighbours: each row is told what its neighbours in the store are like.

Two layers of a graph convolutional network (Kipf & Welling 2017, arXiv:1609.02907) over the k nearest rows that were
learnt from, for each modality apart, so that its outputs are still vectors of that modality and can be scored as a
shared space. A new row has edges to rows that were learnt from, and none comes back: what is said of one row does not
depend on which others are asked about (as GraphSAGE has it, Hamilton et al. 2017, arXiv:1706.02216).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from indexes.vectors import exact_search
from retrieval.heads.imbalance import treated
from retrieval.heads.modalities import IMAGE, TEXT, Inputs
from retrieval.heads.networks import Recipe, dropped, learn, loss_function, right_tensor, tensors
from retrieval.heads.problem import Arrays, Fitted, Problem, link
from retrieval.heads.scores import Outputs
from retrieval.heads.targets import Target
from retrieval.training.losses import info_nce

_NEIGHBOURS = 8
_SELF = 2.0  # weight of a row itself beside the sum of its neighbours, which is 1
_RECIPE = Recipe(epochs=20, batch=256)
_FEWEST = 150  # steps
_SHARED = 0.1  # of the contrastive loss, which keeps the outputs a shared space
_TEMPERATURE = 20.0


class GraphNet(nn.Module):
    """Two graph layers for each modality and one linear layer over their mean. N rows, k neighbours, H hidden."""

    def __init__(self, widths: Sequence[int], outputs: int, hidden: int = 128, dropout: float = 0.5) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
        self.second = nn.ModuleList(nn.Linear(hidden, hidden) for _ in widths)
        self.out = nn.Linear(hidden, outputs)
        self.dropout = dropout

    def hidden(self, i: int, gathered: Tensor) -> Tensor:
        """First layer of modality i: (N, width) means over a row and its neighbours -> (N, H)."""
        rows: Tensor = F.gelu(self.first[i](F.dropout(gathered, self.dropout / 2, self.training)))
        return F.dropout(rows, self.dropout, self.training)

    def vectors(self, i: int, gathered: Tensor) -> Tensor:
        """Second layer: (N, H) means over first layers -> (N, H)."""
        rows: Tensor = gathered + F.gelu(self.second[i](gathered))
        return rows

    def forward(self, vectors: Sequence[Tensor], present: Tensor) -> Tensor:
        shares = present / present.sum(1, keepdim=True).clamp(min=1)  # (N, M)
        mean = torch.stack([rows * shares[:, i : i + 1] for i, rows in enumerate(vectors)]).sum(0)  # (N, H)
        logits: Tensor = self.out(F.dropout(mean, self.dropout, self.training))
        return logits


@dataclass(frozen=True)
class Graph:
    """A graph network as a variant."""

    stage: str
    about: str
    neighbours: int = _NEIGHBOURS

    def fit(self, problem: Problem) -> FittedGraph:
        """Train one on the graph of the rows to learn from; kept is what validates best on the way."""
        train = treated(problem)
        widths = [table.shape[1] for table in train.inputs.values]
        build = {"widths": widths, "outputs": problem.target.outputs}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(problem.seed)
            network = GraphNet(**build).to(problem.device)  # type: ignore[arg-type]
            fitted = FittedGraph(
                problem.target, network, build, train.inputs, min(self.neighbours, len(train) - 1), problem.device
            )
            _train(fitted, problem, train.right)
        return fitted


@dataclass(frozen=True, eq=False)
class FittedGraph:
    """A trained graph network, and the rows of its graph."""

    target: Target
    network: GraphNet
    build: Mapping[str, Any]
    nodes: Inputs
    neighbours: int
    device: str = "cpu"

    def predict(self, inputs: Inputs) -> Outputs:
        """See :class:`retrieval.heads.problem.Fitted`."""
        with torch.inference_mode():
            vectors = [torch.from_numpy(rows).to(self.device) for rows in self.outputs(inputs)]
            present = torch.from_numpy(inputs.present.astype(np.float32)).to(self.device)
            return link(self.target, self.network(vectors, present).double().cpu().numpy())

    @torch.inference_mode()
    def outputs(self, inputs: Inputs, edges: Sequence[Tensor] | None = None) -> list[NDArray[np.float32]]:
        """(N, H) of each modality: the second layer's outputs. ``edges``: of the inputs, where they are known."""
        self.network.eval()
        found = []
        for i, table in enumerate(inputs.values):
            own = torch.from_numpy(self.nodes.values[i]).to(self.device)
            outside = edges[i] if edges else self.edges(i, inputs)
            of_nodes = self.network.hidden(i, gather(own, own, self.inside[i]))
            hidden = self.network.hidden(i, gather(torch.from_numpy(table).to(self.device), own, outside))
            found.append(self.network.vectors(i, gather(hidden, of_nodes, outside)).cpu().numpy())
        return found

    @cached_property
    def inside(self) -> list[Tensor]:
        """The graph itself: (G, k) edges of each modality."""
        return [self.edges(i, self.nodes, skip=True) for i in range(len(self.nodes.names))]

    def edges(self, i: int, inputs: Inputs, skip: bool = False) -> Tensor:
        """(N, k) rows of the graph nearest to each row in modality i, -1 = none. ``skip``: not a row's own self."""
        nodes = np.flatnonzero(self.nodes.present[:, i])
        asked = np.flatnonzero(inputs.present[:, i])
        out = np.full((len(inputs), self.neighbours), -1, np.int64)
        count = min(self.neighbours + skip, len(nodes))
        if not len(asked) or not count:
            return torch.from_numpy(out).to(self.device)
        hits = exact_search(unit_rows(self.nodes.values[i][nodes]), unit_rows(inputs.values[i][asked]), count)
        rows = nodes[hits.rows]
        if skip:  # among equal rows one's own may stand anywhere, or not at all
            own = rows == asked[:, None]
            own[~own.any(axis=1), -1] = True
            rows = rows[~own].reshape(len(asked), count - 1)
        out[asked, : rows.shape[1]] = rows
        return torch.from_numpy(out).to(self.device)

    def attention(self, _: Inputs) -> None:
        """There is none."""
        return

    def arrays(self) -> Arrays:
        """See :class:`retrieval.heads.problem.Fitted`."""
        nodes = {f"node/{i}": table for i, table in enumerate(self.nodes.values)}
        weights = {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}
        return {**weights, **nodes, "node/present": self.nodes.present}

    def settings(self) -> dict[str, Any]:
        """See :class:`retrieval.heads.problem.Fitted`."""
        names, build = list(self.nodes.names), dict(self.build)
        return {"kind": "graph", "build": build, "names": names, "neighbours": self.neighbours}


def load_graph(target: Target, settings: Mapping[str, Any], arrays: Arrays) -> Fitted:
    """A fitted model from what it wrote; KeyError, ValueError or RuntimeError where that is damaged."""
    build, names = dict(settings["build"]), tuple(settings["names"])
    network = GraphNet(**build)
    weights = {
        name: torch.from_numpy(np.array(value)) for name, value in arrays.items() if not name.startswith("node/")
    }
    network.load_state_dict(weights)
    nodes = Inputs(names, tuple(arrays[f"node/{i}"] for i in range(len(names))), arrays["node/present"])
    return FittedGraph(target, network.eval(), build, nodes, int(settings["neighbours"]))


def gather(own: Tensor, nodes: Tensor, edges: Tensor) -> Tensor:
    """One message: (N, W) rows, (G, W) rows of the graph, (N, k) edges, -1 = none -> (N, W) weighted means."""
    there = (edges >= 0).to(own.dtype)  # (N, k)
    shares = there / there.sum(1, keepdim=True).clamp(min=1)
    told = torch.einsum("nkw,nk->nw", nodes[edges.clamp(min=0)], shares)
    return (_SELF * own + told) / (_SELF + shares.sum(1, keepdim=True))


def _train(fitted: FittedGraph, problem: Problem, right: NDArray[Any]) -> None:
    network, target, device = fitted.network, problem.target, problem.device
    nodes, val = fitted.nodes, problem.val.inputs
    tables, present = tensors(nodes, device)
    edges, val_edges = fitted.inside, [fitted.edges(i, val) for i in range(len(tables))]
    first = [gather(table, table, edge) for table, edge in zip(tables, edges, strict=True)]  # needs no weights: once
    rights = right_tensor(target, right, device)
    loss_of = loss_function(problem, problem.train)
    of_val = right_tensor(target, problem.val.right, device)
    val_present = torch.from_numpy(val.present.astype(np.float32)).to(device)
    pair = [nodes.names.index(name) for name in (IMAGE, TEXT)] if {IMAGE, TEXT} <= set(nodes.names) else []

    def step(rows: Tensor) -> Tensor:
        vectors = []
        for i, gathered in enumerate(first):
            hidden = network.hidden(i, gathered)  # of all rows: neighbours of the batch are anywhere
            vectors.append(network.vectors(i, gather(hidden[rows], hidden, edges[i][rows])))
        logits = network(vectors, dropped(present[rows], _RECIPE.drop))
        loss = loss_of(logits, rights[rows])
        if pair:
            both = (present[rows][:, pair] > 0).all(1)
            if int(both.sum()) > 1:
                one, other = (F.normalize(vectors[i][both], dim=-1) for i in pair)
                loss = loss + _SHARED * info_nce(one, other, torch.tensor(_TEMPERATURE, device=device))
        return loss

    def score() -> float:
        vectors = [torch.from_numpy(rows).to(device) for rows in fitted.outputs(val, val_edges)]
        return -float(loss_of(network(vectors, val_present), of_val))

    learn(network, step, score, len(nodes), _RECIPE, problem.seed, fewest=_FEWEST)


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Unit rows; one of zeros points along the first axis, as good as any."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.where(lengths > 0, rows, np.eye(1, rows.shape[1])).astype(np.float32)
    return np.ascontiguousarray(unit / np.where(lengths > 0, lengths, 1))
