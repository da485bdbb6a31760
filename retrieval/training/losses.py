"""Training objectives: functions of two (B, D) matrices of unit rows, and the table that a config chooses from by name.

Row i of one matrix belongs with row i of the other. ``owner`` (B,) says what each row is of: two rows of one owner (two
captions of one photo, two photos of one class) are no negatives of each other, although they are not the same row.

Everything is computed in float32 at least, under autocast and for half-precision rows too. Nothing is kept between
calls; what is learned beside the encoders (a scale, a bias) is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Nats = TypeVar("Nats", float, Tensor)

_CLOSE = 1e-12  # squared distance below which two rows are one: the root's slope is infinite at 0


# ---- what they share -------------------------------------------------------------------------------------------------


def _wide(rows: Tensor) -> Tensor:
    """The same numbers in float32; float64 stays, for the sake of numerical gradients."""
    return rows if rows.dtype == torch.float64 else rows.float()


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, D), (C, D) -> (R, C) dot products, which autocast would otherwise take in half precision."""
    with torch.autocast(rows.device.type, enabled=False):
        return _wide(rows) @ _wide(columns).T


def _logits(rows: Tensor, columns: Tensor, scale: Tensor | float) -> Tensor:
    """(R, C) scaled cosines."""
    return _products(scale * _wide(rows), columns)


def _negatives(rows: Tensor, owner: Tensor | None) -> Tensor:
    """(B, B) True for the pairs that do not belong together: those of different owners."""
    if owner is None:
        owner = torch.arange(len(rows), device=rows.device)
    return owner[:, None] != owner[None, :]


def _numbers(rows: Tensor) -> Tensor:
    """(B,) the row numbers: in a matrix of logits, the column that is each row's own."""
    return torch.arange(len(rows), device=rows.device)


def _mask_others(logits: Tensor, negative: Tensor) -> Tensor:
    """(B, B) logits, -inf where a pair is neither a negative nor the row's own."""
    other = ~negative
    other.fill_diagonal_(False)
    return logits.masked_fill(other, -torch.inf)


# ---- image and text: softmax and sigmoid -----------------------------------------------------------------------------


def info_nce(
    images: Tensor, texts: Tensor, scale: Tensor | float, owner: Tensor | None = None, beta: float = 0.0
) -> Tensor:
    """Symmetric InfoNCE, the loss of CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3).

    For each picture, minus the log of its own sentence's share in the softmax over its own and the negative sentences;
    the same for each sentence; the mean of both directions' means. Other rows of the same owner are in no sum at all:
    they are neither drawn near nor pushed away (:func:`multi_positive_info_nce` draws them near).

    With ``beta``, harder negatives weigh more (Robinson et al. 2021, arXiv:2010.04592, section 3, with τ⁺ = 0): a
    negative's term in the sum is multiplied by a weight proportional to exp(beta · scaled cosine), of mean 1 over a
    row's negatives. Gradients flow through the weights, as they do in the authors' code.

    Args:
        images: (B, D) unit rows; row i belongs with row i of ``texts``.
        texts: (B, D) unit rows.
        scale: the inverse temperature, a scalar.
        owner: (B,) what each row is of. Rows of the same owner are no negatives of each other: two captions of one
            photo, or two photos of one class. None: every row is of its own.
        beta: how much harder negatives are preferred; 0 is plain InfoNCE.

    Returns:
        The mean of both directions' cross-entropies, in nats; log B when the encoders know nothing.
    """
    negative = _negatives(images, owner)
    logits = _mask_others(_logits(images, texts, scale), negative)  # (B, B)
    own = _numbers(logits)
    ways = [_emphasise(way, negative, beta) if beta else way for way in (logits, logits.T)]
    return (F.cross_entropy(ways[0], own) + F.cross_entropy(ways[1], own)) / 2


def _emphasise(logits: Tensor, negative: Tensor, beta: float) -> Tensor:
    """(B, B) logits with the log of each negative's weight added, so that a softmax counts it that often."""
    hardness = (beta * logits).masked_fill(~negative, torch.finfo(logits.dtype).min)
    count = negative.sum(1, keepdim=True).clamp(min=1).to(logits.dtype)
    return torch.where(negative, logits + hardness.log_softmax(1) + count.log(), logits)


def mutual_information_bound(loss: Nats, batch: int) -> Nats:
    """What an InfoNCE loss proves the two modalities to share: log(B) - loss, in nats (van den Oord 2018).

    A lower bound of the mutual information of picture and sentence (arXiv:1807.03748, section 2.3 and appendix A.1), in
    expectation over batches whose pairs are drawn independently. It cannot exceed log B, and close to log B it says
    only that the batch is too small to measure more. It holds for the mean of either direction's cross-entropy; that of
    both, which :func:`info_nce` returns, gives the mean of two lower bounds, itself one. It does not hold with masked
    owners (fewer candidates than B), hard-negative weights, or on the pairs that the model learned from.

    Args:
        loss: InfoNCE in nats, a number or a tensor.
        batch: B, how many candidates each softmax ran over.

    Returns:
        Nats, negative where the loss is worse than a guess; divide by log 2 for bits.
    """
    return math.log(batch) - loss


def multi_positive_info_nce(
    images: Tensor, texts: Tensor, scale: Tensor | float, owner: Tensor | None = None
) -> Tensor:
    """InfoNCE in which all rows of one owner are positives of each other, across the modalities.

    For each picture, the mean over the sentences of its owner of minus the log of that sentence's share in the softmax
    over all B sentences; the same for each sentence; the mean of both directions' means (the supervised contrastive
    loss with the sum outside the logarithm, Khosla et al. 2020, arXiv:2004.11362, equation 2, between two modalities
    as in UniCL, Yang et al. 2022, arXiv:2204.03610).

    :func:`info_nce` masks the other rows of an owner and asks nothing of them; here they are drawn near, and stand in
    the denominator. So P positives can at best share the softmax evenly: the smallest loss is the mean of log P, not 0.
    Where every row is of its own, both are the same.

    Args:
        images: (B, D) unit rows.
        texts: (B, D) unit rows.
        scale: the inverse temperature, a scalar.
        owner: (B,) what each row is of; None: every row is of its own.

    Returns:
        A scalar, in nats; log B when the encoders know nothing.
    """
    logits = _logits(images, texts, scale)  # (B, B)
    negative = _negatives(images, owner)
    positives = (~negative).sum(1)  # (B,)

    def one_way(logits: Tensor) -> Tensor:
        return -(logits.log_softmax(1).masked_fill(negative, 0).sum(1) / positives).mean()

    return (one_way(logits) + one_way(logits.T)) / 2


def pairwise_sigmoid(
    images: Tensor, texts: Tensor, scale: Tensor | float, bias: Tensor | float, owner: Tensor | None = None
) -> Tensor:
    """Pairwise sigmoid, the loss of SigLIP (Zhai et al. 2023, arXiv:2303.15343, algorithm 1).

    Each of the B x B pairs is a yes-or-no question of its own: minus log σ(z · (scale · cosine + bias)), z = 1 for a
    row's own pair and -1 for a negative, summed over all pairs and divided by B. Pairs of one owner that are not the
    same row are left out. The paper starts from scale 10 and bias -10, with which nearly every answer is no, as it
    should be.

    Args:
        images: (B, D) unit rows; row i belongs with row i of ``texts``.
        texts: (B, D) unit rows.
        scale: the inverse temperature, a scalar.
        bias: what is added to every scaled cosine, a scalar.
        owner: (B,) what each row is of; None: every row is of its own.

    Returns:
        A scalar, in nats: the sum of a row's questions, so that it grows with B.
    """
    logits = _logits(images, texts, scale) + bias  # (B, B)
    repelled = F.logsigmoid(-logits).masked_fill(~_negatives(images, owner), 0)
    return -(F.logsigmoid(logits.diagonal()).sum() + repelled.sum()) / len(logits)


# ---- image and text: distances and margins ---------------------------------------------------------------------------


def squared_distance(images: Tensor, texts: Tensor) -> Tensor:
    """The Siamese objective without negatives: mean of ||E(x) - E(y)||² over the pairs that belong together.

    It collapses: encoders that map everything to one point reach its minimum, 0, as Hadsell, Chopra and LeCun point out
    (2006, doi:10.1109/CVPR.2006.100). It is here to be a part of other objectives, and as the baseline that shows why
    they have negatives. For unit rows it is 2 - 2 · cosine.

    Args:
        images: (B, D) rows; row i belongs with row i of ``texts``.
        texts: (B, D) rows.

    Returns:
        A scalar; 0 to 4 for unit rows.
    """
    return (_wide(images) - _wide(texts)).square().sum(1).mean()


def contrastive(
    images: Tensor, texts: Tensor, owner: Tensor | None = None, margin: float = 1.0, hard: bool = False
) -> Tensor:
    """Contrastive loss of a Siamese pair, with every negative of the batch (Hadsell, Chopra, LeCun 2006).

    doi:10.1109/CVPR.2006.100, equation 4: half of d² for a pair that belongs together, half of max(0, margin - d)² for
    a negative, d being the Euclidean distance; here the mean of the one plus the mean of the other, so that their
    balance does not depend on B.

    Args:
        images: (B, D) unit rows; row i belongs with row i of ``texts``.
        texts: (B, D) unit rows.
        owner: (B,) what each row is of; None: every row is of its own.
        margin: how far apart negatives have to be; unit rows at right angles are √2 apart.
        hard: count only the nearest negative sentence of each picture and the nearest negative picture of each
            sentence: most others are beyond the margin soon, and a mean over them is nearly 0.

    Returns:
        A scalar.
    """
    x, y = _wide(images), _wide(texts)
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None, :] - 2 * _products(x, y)
    negative = _negatives(images, owner)
    distances = squares.clamp(min=_CLOSE).sqrt().masked_fill(~negative, torch.inf)  # (B, B)
    if hard:
        distances = torch.stack([distances.amin(1), distances.amin(0)])  # (2, B)
    hinges = F.relu(margin - distances).square()
    count = distances.isfinite().sum().clamp(min=1)  # none in a batch of one owner
    return (squared_distance(x, y) + hinges.sum() / count) / 2


def triplet(
    images: Tensor, texts: Tensor, owner: Tensor | None = None, margin: float = 0.2, hardest: bool = True
) -> Tensor:
    """Triplet loss with the hardest negatives of the batch, that of VSE++ (Faghri et al. 2018, arXiv:1707.05612).

    For each pair, max(0, margin + s(i, t') - s(i, t)) with the most similar negative sentence t' plus
    max(0, margin + s(i', t) - s(i, t)) with the most similar negative picture i', s being the cosine (the paper's
    ℓ_MH); the mean over the pairs.

    Args:
        images: (B, D) unit rows; row i belongs with row i of ``texts``.
        texts: (B, D) unit rows.
        owner: (B,) what each row is of; None: every row is of its own.
        margin: by how much of a cosine a row's own has to be better.
        hardest: False sums the hinges of all negatives instead (ℓ_SH, that of VSE before it): slower to separate
            what is alike, but steadier at the start and with wrong labels.

    Returns:
        A scalar; 2 · margin when everything is mapped to one point and ``hardest``.
    """
    scores = _products(images, texts)  # (B, B)
    own = scores.diagonal()
    positive = ~_negatives(images, owner)
    to_texts = F.relu(margin + scores - own[:, None]).masked_fill(positive, 0)
    to_images = F.relu(margin + scores - own[None, :]).masked_fill(positive, 0)
    if hardest:
        return (to_texts.amax(1) + to_images.amax(0)).mean()
    return (to_texts.sum(1) + to_images.sum(0)).mean()


# ---- any objective on shorter vectors --------------------------------------------------------------------------------


def matryoshka(
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    texts: Tensor,
    prefixes: Sequence[int] = (64, 128, 256),
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Matryoshka representation learning (Kusupati et al. 2022, arXiv:2205.13147, equation 1).

    The weighted sum of an objective over prefixes of the vectors, each brought to unit length anew, so that vectors cut
    to one of these widths still search well. Numbers behind the longest prefix learn nothing: name the whole width D
    too, unless the objective is added on whole vectors beside it.

    Args:
        loss: an objective of two matrices of unit rows, with what else it takes bound to it.
        images: (B, D) rows.
        texts: (B, D) rows.
        prefixes: widths from 1 to D.
        weights: one for each prefix; None: 1 each, as in the paper.

    Returns:
        A scalar.

    Raises:
        ValueError: a prefix that is not from 1 to D, or not as many weights as prefixes.
    """
    width = images.shape[1]
    if not prefixes or not all(1 <= prefix <= width for prefix in prefixes):
        raise ValueError(f"prefixes must be widths from 1 to {width}, not {list(prefixes)}")
    weights = [1.0] * len(prefixes) if weights is None else weights
    if len(weights) != len(prefixes):
        raise ValueError(f"there must be a weight for each of {len(prefixes)} prefixes, not {len(weights)}")
    x, y = _wide(images), _wide(texts)
    losses = [loss(F.normalize(x[:, :prefix], dim=1), F.normalize(y[:, :prefix], dim=1)) for prefix in prefixes]
    return torch.stack([weight * value for weight, value in zip(weights, losses, strict=True)]).sum()


# ---- distillation ----------------------------------------------------------------------------------------------------


def feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of the student's unit rows to the teacher's (CLIP-KD, Yang et al. 2024, arXiv:2307.12732).

    Once for the pictures and once for the sentences (FD in the paper). Where the widths differ, the caller maps the
    student's rows linearly to the teacher's width first, and drops the map after the training.

    Args:
        student: (B, D) rows of any length.
        teacher: (B, D) rows of any length, of the same inputs; no gradient reaches them.

    Returns:
        A scalar from 0 to 4: 2 - 2 · cosine.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student rows of shape {tuple(student.shape)} cannot be compared with teacher rows of shape "
            f"{tuple(teacher.shape)}: map them to the teacher's width first"
        )
    return squared_distance(F.normalize(_wide(student), dim=1), F.normalize(_wide(teacher.detach()), dim=1))


def relation_distillation(
    images: Tensor,
    texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    scale: Tensor | float,
    teacher_scale: Tensor | float,
) -> Tensor:
    """KL divergence of the student's in-batch similarities from the teacher's (CRD in CLIP-KD, arXiv:2307.12732).

    For each picture, Σ p log(p / q), where p is the teacher's and q the student's softmax over the batch's sentences;
    the same for each sentence; the mean of both directions' means. What the teacher finds similar the student shall
    too: only similarities meet, so that the two may be of different widths.

    Args:
        images: (B, D) unit rows of the student.
        texts: (B, D) unit rows of the student.
        teacher_images: (B, E) unit rows of the teacher; no gradient reaches them.
        teacher_texts: (B, E) unit rows of the teacher; no gradient reaches them.
        scale: the student's inverse temperature, a scalar.
        teacher_scale: the teacher's; less than it was trained with softens what it says (Hinton et al. 2015,
            arXiv:1503.02531).

    Returns:
        A scalar, in nats; 0 where they agree.
    """
    ours = _logits(images, texts, scale)
    with torch.no_grad():
        theirs = _logits(teacher_images, teacher_texts, teacher_scale)
    ways = [
        F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
        for q, p in ((ours, theirs), (ours.T, theirs.T))
    ]
    return (ways[0] + ways[1]) / 2


def interactive_contrastive(
    images: Tensor,
    texts: Tensor,
    teacher_images: Tensor,
    teacher_texts: Tensor,
    scale: Tensor | float,
    owner: Tensor | None = None,
) -> Tensor:
    """InfoNCE between student and teacher across the modalities (ICL in CLIP-KD, Yang et al. 2024, arXiv:2307.12732).

    For each picture of the student, minus the log of its sentence's share in the softmax over the teacher's sentences;
    for each sentence of the student the same over the teacher's pictures; the mean of both means.

    Args:
        images: (B, D) unit rows of the student.
        texts: (B, D) unit rows of the student.
        teacher_images: (B, D) unit rows of the teacher; no gradient reaches them.
        teacher_texts: (B, D) unit rows of the teacher; no gradient reaches them.
        scale: the inverse temperature, a scalar.
        owner: (B,) what each row is of, as for :func:`info_nce`.

    Returns:
        A scalar, in nats; log B when the student knows nothing.
    """
    negative, own = _negatives(images, owner), _numbers(images)
    ways = [
        F.cross_entropy(_mask_others(_logits(student, teacher.detach(), scale), negative), own)
        for student, teacher in ((images, teacher_texts), (texts, teacher_images))
    ]
    return (ways[0] + ways[1]) / 2


# ---- one modality alone ----------------------------------------------------------------------------------------------


def nt_xent(first: Tensor, second: Tensor, scale: Tensor | float, owner: Tensor | None = None) -> Tensor:
    """NT-Xent between two augmented views of each picture (SimCLR, Chen et al. 2020, arXiv:2002.05709, equation 1).

    Each of the 2 B rows has to find the other view of its picture among the other 2 B - 1 rows: minus the log of its
    share in the softmax over them, and the mean over all. SLIP (Mu et al. 2022, arXiv:2112.12750) adds it to CLIP's
    loss, with a projection of its own and scale 10.

    Args:
        first: (B, D) unit rows, one view of each picture.
        second: (B, D) unit rows, another view; row i is of the same picture as row i of ``first``.
        scale: the inverse temperature, a scalar.
        owner: (B,) what each row is of: rows of one owner are no negatives of each other. None: each of its own.

    Returns:
        A scalar, in nats; log(2 B - 1) when the encoder knows nothing.
    """
    rows = torch.cat([first, second])  # (2 B, D)
    other_view = _numbers(rows).roll(len(first))
    owner = _numbers(first) if owner is None else owner
    asked = _negatives(rows, owner.repeat(2)).scatter(1, other_view[:, None], True)
    return F.cross_entropy(_logits(rows, rows, scale).masked_fill(~asked, -torch.inf), other_view)


def reconstruction(features: Tensor, decoded: Tensor, spread: Tensor | None = None) -> Tensor:
    """Mean squared error of a decoder, in standard deviations of each feature: an autoencoder's loss, as an auxiliary.

    The mean over rows and features of ((decoded - features) / spread)²: the share of the variance that is not
    explained; 1 for a decoder that always says the mean. A feature that spreads less than a tenth of what they do
    together (their root mean square) counts as one that spreads a tenth.

    Args:
        features: (B, F) what was encoded; no gradient reaches it, or features that are easy to decode would be learned.
        decoded: (B, F) what the decoder makes of the embedding.
        spread: (F,) standard deviations of the features over the training data; None: over this batch.

    Returns:
        A scalar.
    """
    target = _wide(features.detach())
    spread = target.std(0, correction=0) if spread is None else _wide(spread)
    usual = spread.square().mean().sqrt()
    spread = torch.where(usual > 0, torch.maximum(spread, 0.1 * usual), 1.0)  # (F,); 1: nothing to standardise by
    return ((_wide(decoded) - target) / spread).square().mean()


def cross_reconstruction(
    images: Tensor,
    texts: Tensor,
    images_from_texts: Tensor,
    texts_from_images: Tensor,
    spreads: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Each modality's features decoded from the other's embedding (Corr-Cross-AE, Feng et al. 2014).

    doi:10.1145/2647868.2654902: the mean of both modalities' :func:`reconstruction` (the paper sums plain
    squared errors). It is added to a loss that ties the embeddings together, in the paper their squared distance;
    with each modality decoded from its own embedding beside it, it is the paper's Corr-Full-AE.

    Args:
        images: (B, F) features of the pictures.
        texts: (B, G) features of the sentences.
        images_from_texts: (B, F) what a decoder makes of the sentences' embeddings.
        texts_from_images: (B, G) what a decoder makes of the pictures' embeddings.
        spreads: (F,) and (G,) as for :func:`reconstruction`.

    Returns:
        A scalar.
    """
    ways = ((images, images_from_texts, spreads[0]), (texts, texts_from_images, spreads[1]))
    return (reconstruction(*ways[0]) + reconstruction(*ways[1])) / 2


# ---- by name ---------------------------------------------------------------------------------------------------------


def soft_targets(rows: Tensor, columns: Tensor, targets: Tensor, scale: Tensor | float) -> Tensor:
    """Cross-entropy between given shares and the softmax of scaled cosines (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        rows: (R, D) unit rows.
        columns: (C, D) unit rows.
        targets: (R, C) how much of each row's attention each column is to have; a row sums to 1.
        scale: inverse temperature.

    Returns:
        The mean over the rows, a scalar.
    """
    return -(targets * _logits(rows, columns, scale).log_softmax(1)).sum(1).mean()


def told_apart(images: Tensor, texts: Tensor, others: Tensor, wrong: Tensor, scale: Tensor | float) -> Tensor:
    """InfoNCE of each picture with its own text, against further texts that belong to no picture of the batch.

    Args:
        images: (B, D) unit rows.
        texts: (B, D) their own.
        others: (N, D) unit rows.
        wrong: (B, N) which of those are wrong for the picture; the rest count for nothing.
        scale: inverse temperature.

    Returns:
        The mean over the pictures, a scalar; 0 for a picture that none is wrong for.
    """
    own = scale * (_wide(images) * _wide(texts)).sum(1, keepdim=True)  # (B, 1)
    against = _logits(images, others, scale).masked_fill(~wrong, -math.inf)  # (B, N)
    return (torch.cat([own, against], 1).logsumexp(1) - own[:, 0]).mean()


@dataclass(frozen=True)
class Objective:
    """An objective of images and texts as a config names it; all are called alike.

    Attributes:
        loss: a function of this module, or another of two (B, D) matrices.
        takes: which of ``owner``, ``scale`` and ``bias`` it takes; the others are ignored.
        negatives: whether it has any: without them, the encoders collapse into one point.
        scale: where a learned scale starts in the paper.
        bias: where a learned bias starts in the paper.
    """

    loss: Callable[..., Tensor]
    takes: tuple[str, ...]
    negatives: bool = True
    scale: float = 1.0
    bias: float = 0.0

    def __call__(
        self,
        images: Tensor,
        texts: Tensor,
        owner: Tensor | None = None,
        scale: Tensor | float = 1.0,
        bias: Tensor | float = 0.0,
    ) -> Tensor:
        """A scalar of (B, D), (B, D), (B,) and two scalars."""
        given = {"owner": owner, "scale": scale, "bias": bias}
        return self.loss(images, texts, **{name: given[name] for name in self.takes})


_CLIP_SCALE = 1 / 0.07

OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        "infonce": Objective(info_nce, ("owner", "scale"), scale=_CLIP_SCALE),
        "hard-infonce": Objective(partial(info_nce, beta=0.5), ("owner", "scale"), scale=_CLIP_SCALE),
        "multi-positive": Objective(multi_positive_info_nce, ("owner", "scale"), scale=_CLIP_SCALE),
        "sigmoid": Objective(pairwise_sigmoid, ("owner", "scale", "bias"), scale=10.0, bias=-10.0),
        "triplet": Objective(triplet, ("owner",)),
        "triplet-sum": Objective(partial(triplet, hardest=False), ("owner",)),
        "contrastive": Objective(contrastive, ("owner",)),
        "hard-contrastive": Objective(partial(contrastive, hard=True), ("owner",)),
        "distance": Objective(squared_distance, (), negatives=False),
    }
)
"""The objectives of images and texts, by the field's names."""
