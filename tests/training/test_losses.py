"""Every objective against a loop over pairs, closed forms and numerical gradients."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from retrieval.training import losses  # noqa: E402 - torch first
from retrieval.training.losses import OBJECTIVES, info_nce  # noqa: E402

OWNERS = [None, [0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 2], [-7, 3, -7, 3, 5, 5], [9] * 6]
RAGGED = [0, 0, 1, 1, 1, 2]
BETAS = (0.5, 2.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so little work that sharing it costs more than it gains
    yield
    torch.set_num_threads(threads)


def unit(rows: int, dim: int, seed: int, requires_grad: bool = False):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(rows, dim, dtype=torch.float64, generator=generator), dim=1)
    return vectors.requires_grad_(requires_grad)


def scalar(value: float, requires_grad: bool = False):
    return torch.tensor(value, dtype=torch.float64, requires_grad=requires_grad)


def tensor(owner):
    return None if owner is None else torch.tensor(owner)


# ---- the slow ones: number by number, as the papers have them --------------------------------------------------------


def dot(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def distance(a, b) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def mean(values) -> float:
    return math.fsum(values) / len(values)


def owners(rows, owner):
    return list(range(len(rows))) if owner is None else owner


def ways(images, texts):
    return ((images, texts), (texts, images))


def slow_info_nce(images, texts, owner=None, scale=1.0, bias=0.0, beta=0.0) -> float:
    n, owner, total = len(images), owners(images, owner), 0.0
    for queries, answers in ways(images, texts):
        for i in range(n):
            own = scale * dot(queries[i], answers[i])
            wrong = [scale * dot(queries[i], answers[j]) for j in range(n) if owner[j] != owner[i]]
            weights = [math.exp(beta * score) for score in wrong]
            weights = [weight / mean(weights) for weight in weights]
            below = math.exp(own) + sum(w * math.exp(s) for w, s in zip(weights, wrong, strict=True))
            total += math.log(below) - own
    return total / (2 * n)


def slow_multi_positive(images, texts, owner=None, scale=1.0, bias=0.0) -> float:
    n, owner, total = len(images), owners(images, owner), 0.0
    for queries, answers in ways(images, texts):
        for i in range(n):
            below = math.log(sum(math.exp(scale * dot(queries[i], answer)) for answer in answers))
            total += mean([below - scale * dot(queries[i], answers[p]) for p in range(n) if owner[p] == owner[i]])
    return total / (2 * n)


def slow_sigmoid(images, texts, owner=None, scale=1.0, bias=0.0) -> float:
    n, owner, total = len(images), owners(images, owner), 0.0
    for i in range(n):
        for j in range(n):
            if i == j or owner[i] != owner[j]:
                sign = 1 if i == j else -1
                total += math.log1p(math.exp(-sign * (scale * dot(images[i], texts[j]) + bias)))
    return total / n


def slow_distance(images, texts, owner=None, scale=1.0, bias=0.0) -> float:
    return mean([distance(x, y) ** 2 for x, y in zip(images, texts, strict=True)])


def slow_contrastive(images, texts, owner=None, scale=1.0, bias=0.0, margin=1.0, hard=False) -> float:
    n, owner = len(images), owners(images, owner)
    if hard:
        found = [
            min(wrong)
            for queries, answers in ways(images, texts)
            for i in range(n)
            if (wrong := [distance(queries[i], answers[j]) for j in range(n) if owner[j] != owner[i]])
        ]
    else:
        found = [distance(images[i], texts[j]) for i in range(n) for j in range(n) if owner[i] != owner[j]]
    apart = mean([0.5 * max(0, margin - d) ** 2 for d in found]) if found else 0
    return mean([0.5 * distance(x, y) ** 2 for x, y in zip(images, texts, strict=True)]) + apart


def slow_triplet(images, texts, owner=None, scale=1.0, bias=0.0, margin=0.2, hardest=True) -> float:
    n, owner, total = len(images), owners(images, owner), 0.0
    for queries, answers in ways(images, texts):
        for i in range(n):
            own = dot(queries[i], answers[i])
            wrong = [dot(queries[i], answers[j]) for j in range(n) if owner[j] != owner[i]]
            hinges = [max(0, margin + score - own) for score in wrong]
            total += (max(hinges, default=0)) if hardest else sum(hinges)
    return total / n


SLOW = {
    "infonce": slow_info_nce,
    "hard-infonce": lambda *args: slow_info_nce(*args, beta=0.5),
    "multi-positive": slow_multi_positive,
    "sigmoid": slow_sigmoid,
    "triplet": slow_triplet,
    "triplet-sum": lambda *args: slow_triplet(*args, hardest=False),
    "contrastive": slow_contrastive,
    "hard-contrastive": lambda *args: slow_contrastive(*args, hard=True),
    "distance": slow_distance,
}


# ---- what holds for all that a config can name -----------------------------------------------------------------------


@pytest.fixture(params=OBJECTIVES)
def named(request):
    """Each objective of the table, with rows that it is not at a minimum of."""
    return SimpleNamespace(
        name=request.param,
        objective=OBJECTIVES[request.param],
        images=unit(6, 4, seed=1),
        texts=unit(6, 4, seed=2),
        owner=torch.tensor(RAGGED),
    )


def test_each_has_a_slow_one():
    assert set(OBJECTIVES) == set(SLOW)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (14.3, -10.0), (100.0, 3.0)])
def test_equals_a_loop(named, owner, scale, bias):
    loss = named.objective(named.images, named.texts, tensor(owner), scalar(scale), scalar(bias))
    slow = SLOW[named.name](named.images.tolist(), named.texts.tolist(), owner, scale, bias)
    assert loss.shape == ()
    assert float(loss) == pytest.approx(slow, rel=1e-11, abs=1e-12)


def test_rows_that_are_alike_equal_a_loop(named):
    """Positives that agree and negatives within the margin: every branch of a hinge."""
    images = torch.cat([named.images[:3], named.images[:3] + 0.1 * named.texts[:3]])
    images = torch.nn.functional.normalize(images, dim=1)
    texts = torch.nn.functional.normalize(images + 0.2 * named.texts, dim=1)
    for owner in OWNERS:
        loss = named.objective(images, texts, tensor(owner), scalar(5.0), scalar(-1.0))
        slow = SLOW[named.name](images.tolist(), texts.tolist(), owner, 5.0, -1.0)
        assert float(loss) == pytest.approx(slow, rel=1e-11)


@pytest.mark.parametrize("owner", [None, [0, 0, 1, 2, 2], [4] * 5])
def test_gradients(named, owner):
    inputs = unit(5, 3, 5, True), unit(5, 3, 6, True), scalar(4.0, True), scalar(-2.0, True)
    owner = tensor(owner)
    assert torch.autograd.gradcheck(lambda i, t, s, b: named.objective(i, t, owner, s, b), inputs)


def test_both_modalities_count_alike(named):
    one = named.objective(named.images, named.texts, named.owner, 9.0, -3.0)
    other = named.objective(named.texts, named.images, named.owner, 9.0, -3.0)
    assert float(one) == pytest.approx(float(other), rel=1e-12)


def test_the_order_of_the_batch_does_not_matter(named):
    order = torch.tensor([3, 0, 4, 5, 1, 2])
    one = named.objective(named.images, named.texts, named.owner, 9.0, -3.0)
    other = named.objective(named.images[order], named.texts[order], named.owner[order], 9.0, -3.0)
    assert float(one) == pytest.approx(float(other), rel=1e-12)


def test_owners_are_names_and_no_owners_are_all_different(named):
    arguments = named.images, named.texts
    one = named.objective(*arguments, named.owner, 9.0, -3.0)
    assert float(named.objective(*arguments, 5 - 7 * named.owner, 9.0, -3.0)) == float(one)
    nobody = named.objective(*arguments, None, 9.0, -3.0)
    assert float(named.objective(*arguments, torch.tensor([3, 1, 4, 5, 9, 2]), 9.0, -3.0)) == float(nobody)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "multi-positive"])
def test_a_masked_pair_does_not_matter(name):
    """With pictures at right angles, number i of text j is their cosine: one can be changed, and no other."""
    images, texts = torch.eye(4, 6, dtype=torch.float64), 0.3 * unit(4, 6, seed=3)

    def turned(i, j, by, owner):
        rows = texts.clone()
        rows[j, i] += by
        rows[:, 5] = (1 - rows[:, :5].square().sum(1)).sqrt()  # of unit length, by a number that no picture looks at
        return float(OBJECTIVES[name](images, rows, tensor(owner), 6.0, -2.0))

    owner = [0, 0, 1, 2]
    for i, j in ((1, 0), (0, 1)):
        assert turned(i, j, 0.7, owner) == pytest.approx(turned(i, j, 0, owner), rel=1e-14)
        unmasked = [turned(i, j, by, None) for by in (0, 0.7)]
        assert unmasked[0] + 1e-3 < unmasked[1] or not OBJECTIVES[name].negatives


def test_multi_positive_draws_near_what_infonce_masks():
    images, texts = torch.eye(4, 6, dtype=torch.float64), unit(4, 6, seed=3, requires_grad=True)
    owner = torch.tensor([0, 0, 1, 2])
    (near,) = torch.autograd.grad(losses.multi_positive_info_nce(images, texts, 6.0, owner), texts)
    (masked,) = torch.autograd.grad(info_nce(images, texts, 6.0, owner), texts)
    for picture, text in ((0, 1), (1, 0)):
        assert near[text, picture] < -0.1  # downhill is towards the owner's other picture
        assert masked[text, picture] == 0


@pytest.mark.parametrize("scale", [1e-4, 100.0, 1e4])
def test_finite_in_float32_however_sharp(named, scale):
    rows, point = named.images.float(), (torch.eye(4)[:1].repeat(6, 1),) * 2  # no rounding keeps these apart
    for images, texts in (
        (rows, rows),
        (rows, -rows),
        (rows, named.texts.float()),
        (rows[:1].repeat(6, 1),) * 2,
        point,
    ):
        for owner in (None, named.owner, torch.zeros(6)):
            given = (images, texts, torch.tensor(scale), torch.tensor(-scale))
            x, y, *learned = (value.detach().clone().requires_grad_() for value in given)
            with torch.autograd.set_detect_anomaly(True):  # not even on the way
                loss = named.objective(x, y, owner, *learned)
                loss.backward()
            gradients = [value.grad for value in (x, y, *learned) if value.grad is not None]
            assert loss.dtype == torch.float32
            assert all(torch.isfinite(value).all() for value in (loss, *gradients))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rows_lose_only_their_own_rounding(named, autocast):
    """The sums are float32 whatever comes in: the same as from the rounded rows in float64."""
    images, texts = named.images.bfloat16(), named.texts.bfloat16()
    scale, bias = torch.tensor(30.0).bfloat16(), torch.tensor(-10.0).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = named.objective(images, texts, named.owner, scale, bias)
    exact = named.objective(images.double(), texts.double(), named.owner, scale.double(), bias.double())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)


def test_autocast_changes_nothing(named):
    images, texts = named.images.float(), named.texts.float()
    plain = named.objective(images, texts, named.owner, 30.0, -10.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = named.objective(images, texts, named.owner, 30.0, -10.0)
    assert float(cast) == float(plain)


def test_a_batch_of_one_pair(named):
    images, texts = unit(1, 4, seed=1), unit(1, 4, seed=2)
    expected = {
        "sigmoid": math.log1p(math.exp(-(3 * float(images[0] @ texts[0]) - 1))),
        "contrastive": slow_distance(images.tolist(), texts.tolist()) / 2,
        "hard-contrastive": slow_distance(images.tolist(), texts.tolist()) / 2,
        "distance": slow_distance(images.tolist(), texts.tolist()),
    }
    loss = named.objective(images, texts, None, 3.0, -1.0)
    assert float(loss) == pytest.approx(expected.get(named.name, 0.0))


def test_what_it_does_not_take_is_ignored(named):
    one = named.objective(named.images, named.texts, named.owner, scalar(9.0), scalar(-3.0))
    others = {
        "owner": named.objective(named.images, named.texts, None, scalar(9.0), scalar(-3.0)),
        "scale": named.objective(named.images, named.texts, named.owner, scalar(5.0), scalar(-3.0)),
        "bias": named.objective(named.images, named.texts, named.owner, scalar(9.0), scalar(-1.0)),
    }
    assert {name for name, loss in others.items() if float(loss) != float(one)} == set(named.objective.takes)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        OBJECTIVES["infonce"] = None


# ---- InfoNCE ---------------------------------------------------------------------------------------------------------


def test_pairs_that_agree_and_are_orthogonal_to_all_others():
    """Each row's softmax is over one score of s and n - 1 of 0: the loss is log(1 + (n - 1) exp(-s))."""
    for n, scale in ((2, 0.0), (5, 3.0), (8, 20.0)):
        rows = torch.eye(n, dtype=torch.float64)
        expected = math.log1p((n - 1) * math.exp(-scale))
        for loss in (info_nce, losses.multi_positive_info_nce):
            assert float(loss(rows, rows, scalar(scale))) == pytest.approx(expected, rel=1e-9)
        hard = info_nce(rows, rows, scalar(scale), beta=3.0)  # all negatives are as hard as each other
        assert float(hard) == pytest.approx(expected, rel=1e-9)


def test_encoders_that_know_nothing_lose_log_n():
    same = torch.ones(7, 1, dtype=torch.float64)
    for loss in (info_nce, losses.multi_positive_info_nce):
        assert float(loss(same, same, scalar(30.0))) == pytest.approx(math.log(7))


def test_rows_of_one_owner_are_no_negatives_of_each_other():
    """Two owners of two rows each, all four orthogonal: three scores are left in a row's sum, its own and two of 0."""
    rows = torch.eye(4, dtype=torch.float64)
    loss = info_nce(rows, rows, scalar(2.0), torch.tensor([5, 5, 8, 8]))
    assert float(loss) == pytest.approx(math.log1p(2 * math.exp(-2.0)))
    # Two captions of one photo: with the same vectors they would be each other's hardest negatives.
    twins = rows[[0, 0, 1, 1]]
    assert float(info_nce(twins, twins, scalar(2.0))) == pytest.approx(math.log(2 + 2 * math.exp(-2.0)))
    owned = info_nce(twins, twins, scalar(2.0), torch.tensor([0, 0, 1, 1]))
    assert float(owned) == pytest.approx(math.log1p(2 * math.exp(-2.0)))
    assert float(info_nce(twins, twins, scalar(2.0), torch.tensor([3, 3, 3, 3]))) == 0.0


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("beta", BETAS)
def test_hard_negatives_equal_a_loop(owner, beta):
    images, texts = unit(6, 4, seed=1), unit(6, 4, seed=2)
    loss = info_nce(images, texts, scalar(7.0), tensor(owner), beta)
    slow = slow_info_nce(images.tolist(), texts.tolist(), owner, 7.0, beta=beta)
    assert float(loss) == pytest.approx(slow, rel=1e-12)


def test_harder_negatives_weigh_more():
    images, texts = unit(6, 4, seed=1), unit(6, 4, seed=2)
    found = [float(info_nce(images, texts, scalar(7.0), beta=beta)) for beta in (0.0, 1e-9, 0.5, 1.0, 2.0)]
    assert found[1] == pytest.approx(found[0], rel=1e-7)
    assert found[1:] == sorted(found[1:])
    # In the end only the hardest is left, counted five times.
    scores = 7 * images @ texts.T
    wrong = scores.masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
    both = [
        torch.log(own.exp() + 5 * hardest.exp()) - own
        for own, hardest in ((scores.diagonal(), wrong.amax(1)), (scores.diagonal(), wrong.amax(0)))
    ]
    assert float(info_nce(images, texts, scalar(7.0), beta=1e4)) == pytest.approx(float(torch.cat(both).mean()))


def test_multi_positive_is_least_where_positives_share_the_softmax():
    """Two of one owner and one of another, orthogonal between owners: log 2 for two rows, 0 for one."""
    rows = torch.eye(2, dtype=torch.float64)[[0, 0, 1]]
    loss = losses.multi_positive_info_nce(rows, rows, scalar(200.0), torch.tensor([4, 4, 1]))
    assert float(loss) == pytest.approx(2 / 3 * math.log(2))


def test_mutual_information_saturates_at_log_n():
    assert losses.mutual_information_bound(math.log(8), 8) == 0.0
    assert losses.mutual_information_bound(0.0, 8) == math.log(8)
    assert losses.mutual_information_bound(3.0, 8) < 0
    loss = torch.tensor(0.5, requires_grad=True)
    losses.mutual_information_bound(loss, 8).backward()
    assert float(loss.grad) == -1


@pytest.mark.parametrize("classes", [4, 50])
def test_the_bound_is_below_the_information_that_there_is(classes):
    """Picture and text both show which of C equally likely classes it is: they share log C nats exactly.

    With scores as sharp as can be, the bound comes near log C where batches are large enough, and near log B where
    there is more to know than it can measure; above neither.
    """
    random, information, batch = torch.Generator().manual_seed(0), math.log(classes), 16
    bounds = []
    for _ in range(100):
        rows = torch.eye(classes, dtype=torch.float64)[torch.randint(classes, (batch,), generator=random)]
        bounds.append(float(losses.mutual_information_bound(info_nce(rows, rows, scalar(100.0)), batch)))
    assert mean(bounds) < min(information, math.log(batch))
    assert mean(bounds) > 0.75 * min(information, math.log(batch))


# ---- sigmoid, distances, margins -------------------------------------------------------------------------------------


def test_sigmoid_with_no_scale_asks_b_questions_of_one_coin():
    rows = unit(5, 3, seed=1)
    loss = losses.pairwise_sigmoid(rows, rows, scalar(0.0), scalar(0.0))
    assert float(loss) == pytest.approx(5 * math.log(2))
    owned = losses.pairwise_sigmoid(rows, rows, scalar(0.0), scalar(0.0), torch.tensor([0, 0, 1, 1, 1]))
    assert float(owned) == pytest.approx((5 + 2 * 2 * 3) / 5 * math.log(2))  # each its own, and 2 x 3 both ways


def test_distance_in_closed_form():
    rows = torch.eye(3, dtype=torch.float64)
    assert float(losses.squared_distance(rows, rows)) == 0
    assert float(losses.squared_distance(rows, rows[[1, 2, 0]])) == pytest.approx(2)
    assert float(losses.squared_distance(rows, -rows)) == pytest.approx(4)


def test_contrastive_in_closed_form():
    rows = torch.eye(3, dtype=torch.float64)
    assert float(losses.contrastive(rows, rows)) == pytest.approx(0)  # right angles are beyond the margin
    for hard in (False, True):
        wide = losses.contrastive(rows, rows, margin=2.0, hard=hard)
        assert float(wide) == pytest.approx((2 - math.sqrt(2)) ** 2 / 2)
        same = losses.contrastive(rows[:1].expand(3, -1), rows[:1].expand(3, -1), margin=2.0, hard=hard)
        assert float(same) == pytest.approx(2, rel=1e-5)  # two points that are one: 1e-6 apart


@pytest.mark.parametrize("margin", [0.3, 1.0, 1.8])
@pytest.mark.parametrize("chosen", [False, True])
def test_margins_equal_a_loop(margin, chosen):
    images, texts = unit(6, 4, seed=1), unit(6, 4, seed=2)
    for owner in OWNERS:
        lists = images.tolist(), texts.tolist(), owner
        fast = losses.contrastive(images, texts, tensor(owner), margin, chosen)
        assert float(fast) == pytest.approx(slow_contrastive(*lists, margin=margin, hard=chosen), rel=1e-11)
        fast = losses.triplet(images, texts, tensor(owner), margin, chosen)
        assert float(fast) == pytest.approx(slow_triplet(*lists, margin=margin, hardest=chosen), rel=1e-11)


def test_triplet_in_closed_form():
    rows = torch.eye(4, dtype=torch.float64)
    assert float(losses.triplet(rows, rows)) == 0
    same = rows[:1].expand(4, -1)
    assert float(losses.triplet(same, same)) == pytest.approx(0.4)
    assert float(losses.triplet(same, same, hardest=False)) == pytest.approx(3 * 0.4)
    assert float(losses.triplet(rows, rows, margin=1.5)) == pytest.approx(2 * 0.5)


# ---- Matryoshka ------------------------------------------------------------------------------------------------------


def test_matryoshka_is_a_sum_over_prefixes():
    images, texts, owner = unit(5, 8, seed=1), unit(5, 8, seed=2), torch.tensor([0, 0, 1, 2, 3])

    def loss(x, y):
        return info_nce(x, y, scalar(9.0), owner)

    expected = 0.0
    for prefix, weight in ((2, 0.5), (5, 2.0), (8, 1.0)):
        cut = [
            [[x / math.hypot(*row[:prefix]) for x in row[:prefix]] for row in rows.tolist()] for rows in (images, texts)
        ]
        expected += weight * slow_info_nce(*cut, owner.tolist(), 9.0)
    assert float(losses.matryoshka(loss, images, texts, (2, 5, 8), (0.5, 2.0, 1.0))) == pytest.approx(expected)
    whole = losses.matryoshka(loss, images, texts, (8,))
    assert float(whole) == pytest.approx(float(loss(images, texts)))
    both = losses.matryoshka(loss, images, texts, (2, 8))
    assert float(both) == pytest.approx(float(whole + losses.matryoshka(loss, images, texts, (2,))))


def test_matryoshka_takes_any_objective(named):
    images, texts = unit(5, 6, 1, True), unit(5, 6, 2, True)
    owner = torch.tensor([0, 0, 1, 2, 3])

    def loss(x, y):
        return named.objective(x, y, owner, 4.0, -2.0)

    assert torch.autograd.gradcheck(lambda x, y: losses.matryoshka(loss, x, y, (2, 4)), (images, texts))
    losses.matryoshka(loss, images, texts, (2, 4)).backward()
    assert float(images.grad[:, 4:].abs().max()) == 0  # behind the longest prefix


@pytest.mark.parametrize(
    ("prefixes", "weights", "words"),
    [
        ((), None, "from 1 to 8"),
        ((0, 4), None, "from 1 to 8"),
        ((4, 9), None, "from 1 to 8"),
        ((4,), (1, 2), "weight for"),
    ],
)
def test_matryoshka_that_is_wrong(prefixes, weights, words):
    with pytest.raises(ValueError, match=words):
        losses.matryoshka(losses.squared_distance, unit(3, 8, 1), unit(3, 8, 2), prefixes, weights)


def test_matryoshka_in_half_precision():
    images, texts = unit(5, 8, seed=1), unit(5, 8, seed=2)
    exact = losses.matryoshka(losses.squared_distance, images.bfloat16().double(), texts.bfloat16().double(), (2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.matryoshka(losses.squared_distance, images.bfloat16(), texts.bfloat16(), (2, 8))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=1e-5)


# ---- distillation ----------------------------------------------------------------------------------------------------


def slow_relation(images, texts, teacher_images, teacher_texts, scale, teacher_scale) -> float:
    n, total = len(images), 0.0
    both = zip(ways(images, texts), ways(teacher_images, teacher_texts), strict=True)
    for (queries, answers), (teacher_queries, teacher_answers) in both:
        for i in range(n):
            q = [math.exp(scale * dot(queries[i], answer)) for answer in answers]
            p = [math.exp(teacher_scale * dot(teacher_queries[i], answer)) for answer in teacher_answers]
            q, p = [value / sum(q) for value in q], [value / sum(p) for value in p]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / (2 * n)


def test_features_of_a_teacher():
    student, teacher = unit(4, 3, seed=1), unit(4, 3, seed=2)
    loss = losses.feature_distillation(3 * student, 0.5 * teacher)  # lengths do not matter
    assert float(loss) == pytest.approx(slow_distance(student.tolist(), teacher.tolist()))
    assert float(losses.feature_distillation(student, 7 * student)) == pytest.approx(0, abs=1e-15)
    with pytest.raises(ValueError, match="map them to the teacher's width first"):
        losses.feature_distillation(student, unit(4, 5, seed=2))


def test_relations_of_a_teacher_of_another_width():
    images, texts, teacher_images, teacher_texts = unit(5, 3, 1), unit(5, 3, 2), unit(5, 7, 3), unit(5, 7, 4)
    loss = losses.relation_distillation(images, texts, teacher_images, teacher_texts, scalar(6.0), 11.0)
    lists = [rows.tolist() for rows in (images, texts, teacher_images, teacher_texts)]
    assert float(loss) == pytest.approx(slow_relation(*lists, 6.0, 11.0), rel=1e-12)
    agreed = losses.relation_distillation(images, texts, images, texts, scalar(6.0), 6.0)
    assert float(agreed) == pytest.approx(0, abs=1e-15)
    swapped = losses.relation_distillation(texts, images, teacher_texts, teacher_images, scalar(6.0), 11.0)
    assert float(swapped) == pytest.approx(float(loss), rel=1e-12)
    sharp = losses.relation_distillation(images.float(), texts.float(), -images.float(), texts.float(), 1e4, 1e4)
    assert torch.isfinite(sharp)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_student_among_its_teacher_s_rows(owner):
    images, texts, teacher_images, teacher_texts = unit(6, 3, 1), unit(6, 3, 2), unit(6, 3, 3), unit(6, 3, 4)
    loss = losses.interactive_contrastive(images, texts, teacher_images, teacher_texts, scalar(6.0), tensor(owner))
    total = 0.0
    for queries, answers in ((images.tolist(), teacher_texts.tolist()), (texts.tolist(), teacher_images.tolist())):
        for i in range(6):
            among = [j for j in range(6) if j == i or owners(images, owner)[j] != owners(images, owner)[i]]
            scores = {j: 6 * dot(queries[i], answers[j]) for j in among}
            total += math.log(sum(map(math.exp, scores.values()))) - scores[i]
    assert float(loss) == pytest.approx(total / 12, rel=1e-12)
    itself = losses.interactive_contrastive(images, texts, images, texts, scalar(6.0), tensor(owner))
    assert float(itself) == pytest.approx(float(info_nce(images, texts, scalar(6.0), tensor(owner))), rel=1e-12)


def test_gradients_of_distillation_reach_the_student_alone():
    student = unit(4, 3, 1, True), unit(4, 3, 2, True)
    teacher = unit(4, 3, 3, True), unit(4, 3, 4, True)
    scale = scalar(5.0, True)
    assert torch.autograd.gradcheck(lambda x: losses.feature_distillation(x, teacher[0]), student[:1])
    for loss in (
        lambda x, y, s: losses.relation_distillation(x, y, *teacher, s, 9.0),
        lambda x, y, s: losses.interactive_contrastive(x, y, *teacher, s),
    ):
        assert torch.autograd.gradcheck(loss, (*student, scale))
        loss(*student, scale).backward()
    losses.feature_distillation(student[0], teacher[0]).backward()
    assert [rows.grad for rows in teacher] == [None, None]


# ---- one modality alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", OWNERS)
def test_nt_xent_equals_a_loop(owner):
    first, second = unit(6, 4, seed=1), unit(6, 4, seed=2)
    rows, whose = first.tolist() + second.tolist(), owners(first, owner) * 2
    total = 0.0
    for i in range(12):
        other = (i + 6) % 12
        scores = {j: 5 * dot(rows[i], rows[j]) for j in range(12) if j == other or whose[j] != whose[i]}
        total += math.log(sum(map(math.exp, scores.values()))) - scores[other]
    loss = losses.nt_xent(first, second, scalar(5.0), tensor(owner))
    assert float(loss) == pytest.approx(total / 12, rel=1e-12)
    assert float(losses.nt_xent(second, first, scalar(5.0), tensor(owner))) == pytest.approx(float(loss), rel=1e-12)


def test_nt_xent_in_closed_form():
    same = torch.ones(5, 1, dtype=torch.float64)
    assert float(losses.nt_xent(same, same, scalar(8.0))) == pytest.approx(math.log(9))
    rows = torch.eye(5, dtype=torch.float64)
    assert float(losses.nt_xent(rows, rows, scalar(3.0))) == pytest.approx(math.log1p(8 * math.exp(-3)))
    assert float(losses.nt_xent(rows[:1], rows[1:2], scalar(3.0))) == 0  # nothing else to mistake it for
    inputs = unit(4, 3, 1, True), unit(4, 3, 2, True), scalar(4.0, True)
    assert torch.autograd.gradcheck(lambda x, y, s: losses.nt_xent(x, y, s, torch.tensor([0, 0, 1, 2])), inputs)
    sharp = losses.nt_xent(rows.float(), -rows.float(), 1e4)
    assert torch.isfinite(sharp)


def test_reconstruction_is_the_share_that_is_not_explained():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(50, 3, dtype=torch.float64, generator=random) * torch.tensor([2.0, 3.0, 5.0]) + 7
    assert float(losses.reconstruction(features, features)) == 0
    assert float(losses.reconstruction(features, features.mean(0).expand(50, -1))) == pytest.approx(1)
    noise = torch.randn(50, 3, dtype=torch.float64, generator=random)
    rows, decoded = features.tolist(), (features + noise).tolist()
    total = 0.0
    for column in range(3):
        values = [row[column] for row in rows]
        variance = mean([(value - mean(values)) ** 2 for value in values])
        total += mean([(d[column] - r[column]) ** 2 for d, r in zip(decoded, rows, strict=True)]) / variance
    assert float(losses.reconstruction(features, features + noise)) == pytest.approx(total / 3, rel=1e-12)
    given = losses.reconstruction(features, features + 1, torch.tensor([2.0, 2.0, 2.0]))
    assert float(given) == pytest.approx(0.25)


def test_features_that_hardly_vary_do_not_rule_a_reconstruction():
    features = torch.tensor([[1.0, 5.0], [-1.0, 5.0]], dtype=torch.float64)  # spreads 1 and 0; together √½
    wrong = torch.tensor([[0.0, 0.1], [0.0, 0.1]], dtype=torch.float64)
    assert float(losses.reconstruction(features, features + wrong)) == pytest.approx(0.1**2 / (0.01 * 0.5) / 2)
    one = losses.reconstruction(features[:1], features[:1] + 2)  # of one row, nothing can be said to vary
    assert float(one) == pytest.approx(4)


def test_cross_reconstruction_is_of_both_and_reaches_the_decoders_alone():
    images, texts = unit(6, 4, 1, True), unit(6, 3, 2, True)
    decoded = unit(6, 4, 3, True), unit(6, 3, 4, True)
    loss = losses.cross_reconstruction(images, texts, *decoded)
    parts = losses.reconstruction(images, decoded[0]), losses.reconstruction(texts, decoded[1])
    assert float(loss.detach()) == pytest.approx(float(sum(parts).detach()) / 2)
    assert torch.autograd.gradcheck(lambda x, y: losses.cross_reconstruction(images, texts, x, y), decoded)
    loss.backward()
    assert images.grad is texts.grad is None
    spreads = torch.arange(1.0, 5), torch.arange(1.0, 4)
    told = losses.cross_reconstruction(images, texts, *decoded, spreads)
    parts = [losses.reconstruction(*each) for each in zip((images, texts), decoded, spreads, strict=True)]
    assert float(told.detach()) == pytest.approx(float(sum(parts).detach()) / 2)
    assert float(told.detach()) != pytest.approx(float(loss.detach()))
    swapped = losses.cross_reconstruction(texts, images, *reversed(decoded))
    assert float(swapped.detach()) == pytest.approx(float(loss.detach()))


def test_the_others_stay_in_float32_under_autocast():
    first, second, third, fourth = (unit(6, 4, seed=i).bfloat16() for i in range(4))
    exact = [rows.double() for rows in (first, second, third, fourth)]
    for loss in (
        lambda a, b, c, d: losses.feature_distillation(a, b),
        lambda a, b, c, d: losses.relation_distillation(a, b, c, d, 20.0, 30.0),
        lambda a, b, c, d: losses.interactive_contrastive(a, b, c, d, 20.0),
        lambda a, b, c, d: losses.nt_xent(a, b, 20.0),
        lambda a, b, c, d: losses.cross_reconstruction(a, b, c, d),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            cast = loss(first, second, third, fourth)
        assert cast.dtype == torch.float32
        assert float(cast) == pytest.approx(float(loss(*exact)), rel=1e-5)


# ---- nouns -----------------------------------------------------------------------------------------------------------


def test_soft_targets_equal_a_loop_and_are_infonce_s_one_way_for_hard_ones():
    rows, columns = unit(3, 4, 0, True), unit(5, 4, 1, True)
    targets = torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    targets = targets / targets.sum(1, keepdim=True)
    expected = []
    for row, shares in zip(rows.tolist(), targets.tolist(), strict=True):
        logits = [7 * dot(row, column) for column in columns.tolist()]
        total = math.log(math.fsum(map(math.exp, logits)))
        expected.append(-math.fsum(share * (one - total) for share, one in zip(shares, logits, strict=True)))
    assert float(losses.soft_targets(rows, columns, targets, 7.0)) == pytest.approx(mean(expected))
    assert torch.autograd.gradcheck(
        lambda x, y, s: losses.soft_targets(x, y, targets, s), (rows, columns, scalar(3.0, True))
    )
    square = unit(3, 4, 3)
    both = losses.soft_targets(rows, square, torch.eye(3), 7.0) + losses.soft_targets(square, rows, torch.eye(3), 7.0)
    assert float(both / 2) == pytest.approx(float(info_nce(rows, square, scalar(7.0))))


def test_told_apart_equals_a_loop():
    images, texts, others = unit(3, 4, 0, True), unit(3, 4, 1, True), unit(5, 4, 2, True)
    wrong = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    expected = []
    for image, text, row in zip(images.tolist(), texts.tolist(), wrong.tolist(), strict=True):
        own = 7 * dot(image, text)
        against = [7 * dot(image, other) for other, is_wrong in zip(others.tolist(), row, strict=True) if is_wrong]
        expected.append(math.log(math.fsum(map(math.exp, [own, *against]))) - own)
    assert expected[1] == pytest.approx(0)  # nothing is wrong for it
    assert float(losses.told_apart(images, texts, others, wrong, 7.0)) == pytest.approx(mean(expected))
    inputs = (images, texts, others, scalar(3.0, True))
    assert torch.autograd.gradcheck(lambda i, t, o, s: losses.told_apart(i, t, o, wrong, s), inputs)
