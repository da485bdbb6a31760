"""Every way of joining modalities, by name; and the models of one modality that they are measured against."""

from __future__ import annotations

from collections.abc import Mapping

from retrieval.heads.graph import Graph
from retrieval.heads.late import Late
from retrieval.heads.linear import Linear
from retrieval.heads.networks import Network
from retrieval.heads.problem import Variant

ALONE: Mapping[str, Variant] = {
    "logistic": Linear("logistic", "alone", "Logistic regression (ridge regression of a number)."),
    "svm": Linear("svm", "alone", "A linear support vector machine, its margins scaled to probabilities on val."),
    "mlp": Network("concat", "alone", "A perceptron with two hidden layers."),
}

FUSED: Mapping[str, Variant] = {
    "early-logistic": Linear("logistic", "early", "Logistic regression on all modalities side by side."),
    "early-mlp": Network("concat", "early", "A perceptron on all modalities side by side."),
    "sum-fixed": Network("sum", "weighted", "The mean of the modalities' hidden layers.", weighting="fixed"),
    "sum-searched": Network(
        "sum", "weighted", "Their weighted mean, the weights searched on val.", weighting="searched"
    ),
    "sum-learnt": Network("sum", "weighted", "Their weighted mean, the weights learnt."),
    "gmu": Network("gmu", "intermediate", "Gated multimodal unit (Arevalo et al. 2017)."),
    "bilinear": Network("bilinear", "intermediate", "Outer products of narrow hidden layers (Zadeh et al. 2017)."),
    "low-rank": Network("low-rank", "intermediate", "Low-rank multimodal fusion (Liu et al. 2018)."),
    "cross-attention": Network(
        "cross-attention", "intermediate", "Each modality's tokens ask the others' (Tsai et al. 2019).", tokens=4
    ),
    "transformer": Network("transformer", "intermediate", "A small transformer over all tokens.", tokens=4),
    "graph": Graph("graph", "A graph network over nearest neighbours (Kipf & Welling 2017)."),
    "late-average": Late("average", "late", "The mean of the best models of one modality each."),
    "late-vote": Late("vote", "late", "Their votes."),
    "late-stacking": Late("stacking", "late", "Logistic regression on their out-of-fold outputs (Wolpert 1992)."),
}
