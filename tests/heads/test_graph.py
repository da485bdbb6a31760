"""The graph network's messages and edges, written out."""

from __future__ import annotations

import numpy as np
import pytest

from retrieval.heads.graph import FittedGraph, Graph, gather, unit_rows
from tests.heads.problems import torch, world  # skips without scikit-learn and torch


@pytest.fixture(scope="module")
def graph():
    torch.set_num_threads(1)
    small = world("class", 30)
    return small, Graph("graph", "", neighbours=3).fit(small.problem)


def test_a_message_is_the_mean_of_neighbours_beside_oneself():
    own, nodes = torch.tensor([[2.0], [4.0], [6.0]]), torch.tensor([[1.0], [3.0], [100.0]])
    edges = torch.tensor([[0, 1], [1, -1], [-1, -1]])
    found = gather(own, nodes, edges)[:, 0].tolist()
    assert found == pytest.approx([(2 * 2 + 2) / 3, (2 * 4 + 3) / 3, 6])


def test_edges_are_the_nearest_rows_that_have_the_modality(graph):
    small, fitted = graph
    inputs = small.problem.train.inputs
    for i in range(2):
        unit = unit_rows(inputs.values[i])
        cosines = unit @ unit.T
        asked = fitted.edges(i, inputs).numpy()
        np.testing.assert_array_equal(np.sort(asked, 1), np.sort(np.argsort(-cosines, axis=1)[:, :3], 1))
        np.fill_diagonal(cosines, -2)
        inside = fitted.inside[i].numpy()
        np.testing.assert_array_equal(np.sort(inside, 1), np.sort(np.argsort(-cosines, axis=1)[:, :3], 1))
    missing = inputs.without("image")
    assert (fitted.edges(0, missing) == -1).all()
    less = FittedGraph(fitted.target, fitted.network, fitted.build, missing, 3)
    assert (less.edges(0, inputs) == -1).all()


def test_outputs_written_out(graph):
    small, fitted = graph
    inputs = small.problem.train.inputs.take(np.arange(4))
    network = fitted.network
    (found, *_) = fitted.outputs(inputs)
    nodes, inside = fitted.nodes.values[0], fitted.inside[0].numpy()

    def layer(linear, rows):
        return torch.nn.functional.gelu(linear(torch.from_numpy(rows).float())).detach().numpy()

    for row in range(4):
        edges = fitted.edges(0, inputs)[row].numpy()
        own = layer(network.first[0], (2 * inputs.values[0][row] + nodes[edges].mean(0)) / 3)
        told = [layer(network.first[0], (2 * nodes[e] + nodes[inside[e]].mean(0)) / 3) for e in edges]
        gathered = (2 * own + np.mean(told, axis=0)) / 3
        np.testing.assert_allclose(found[row], gathered + layer(network.second[0], gathered), atol=1e-4)
