"""The shared loop, beside a slow one written out, and what it does with numbers that are none."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from retrieval.errors import DataError  # noqa: E402
from retrieval.training.averaging import WeightAverage  # noqa: E402
from retrieval.training.fit import FitConfig, adamw, fit, fit_best, plain_groups, rate_at  # noqa: E402


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, generator=generator), torch.randn(5, 1, generator=generator)) for _ in range(count)]


def loss_of(network):
    return lambda batch: (network(batch[0]) - batch[1]).square().mean()


def config(network, total, **more):
    return FitConfig(network, adamw(plain_groups(network, 0.05, 0.1)), total, **more)


def test_it_takes_the_steps_that_a_loop_written_out_takes():
    fast, slow = model(), model()
    average = WeightAverage(fast, 0.9)
    taken = [step for step, _ in fit(loss_of(fast), batches(20), config(fast, 20, warmup=5, clip=0.3, average=average))]
    assert taken == list(range(1, 21))
    assert not fast.training
    matrices = [weight for weight in slow.parameters() if weight.ndim == 2]
    vectors = [weight for weight in slow.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}])
    clipped = 0
    for step, batch in enumerate(batches(20), 1):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1, step / 2) * (1 + math.cos(math.pi * step / 20)) / 2
        optimizer.zero_grad()
        loss_of(slow)(batch).backward()
        norm = math.sqrt(sum(float(weight.grad.square().sum()) for weight in slow.parameters()))
        for weight in slow.parameters():
            weight.grad *= min(1, 0.3 / (norm + 1e-6))
        clipped += norm > 0.3
        optimizer.step()
    assert clipped
    for mine, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_takes_the_steps_that_are_left():
    whole, parts = model(), model()
    all_batches = batches(6)
    list(fit(loss_of(whole), all_batches, config(whole, 6)))
    settings = config(parts, 6)
    list(fit(loss_of(parts), all_batches[:2], settings))
    rest = FitConfig(parts, settings.optimizer, 6, begun=2)
    assert [step for step, _ in fit(loss_of(parts), all_batches[2:], rest)] == [3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_the_rate_rises_to_its_peak_and_falls_to_near_zero():
    rates = [rate_at(2.0, step, 100, 10) for step in range(1, 101)]
    assert rates.index(max(rates)) == 9
    assert rates[0] < 0.3
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert rate_at(1.0, 1, 1, 10) > 0  # a single step learns something


def test_hooks_are_called_in_order():
    network, seen = model(), []

    def before():
        seen.append(network[0].weight.grad is not None)

    def after():
        seen.append(bool(torch.equal(network[0].weight, first)))

    first = network[0].weight.detach().clone()
    list(fit(loss_of(network), batches(1), config(network, 1, before_step=before, after_step=after)))
    assert seen == [True, False]


def test_a_loss_that_is_no_number_ends_it_at_its_step():
    network = model()

    def step(batch):
        return loss_of(network)(batch) * (math.nan if batch[0].sum() == 0 else 1)

    with pytest.raises(DataError, match="no number any more at step 3: try a lower --lr, or less of it"):
        list(
            fit(
                step,
                [*batches(2), (torch.zeros(5, 3), torch.zeros(5, 1))],
                config(network, 3, hint=", or less of it"),
            )
        )


def test_what_validated_best_is_kept():
    network, scores, states = model(), iter([0.1, 0.7, math.nan, 0.7, 0.2]), []

    def score():
        assert not network.training
        states.append({name: value.clone() for name, value in network.state_dict().items()})
        return next(scores)

    assert fit_best(loss_of(network), batches(10), config(network, 10), score, every=2) == (4, 0.7)
    assert all(torch.equal(value, states[1][name]) for name, value in network.state_dict().items())
    assert not all(torch.equal(value, states[0][name]) for name, value in network.state_dict().items())


def test_it_ends_early_where_nothing_gets_better():
    network, calls = model(), []

    def score():
        calls.append(1)
        return -len(calls)

    assert fit_best(loss_of(network), batches(50), config(network, 50), score, every=1, patience=3) == (1, -1)
    assert len(calls) == 4


def test_the_last_step_is_scored_too_and_a_score_that_is_never_a_number_is_refused():
    network, calls = model(), []
    fit_best(loss_of(network), batches(5), config(network, 5), lambda: calls.append(1) or 0.0, every=3)
    assert len(calls) == 2
    with pytest.raises(DataError, match="never a number"):
        fit_best(loss_of(network), batches(2), config(network, 2), lambda: math.nan, every=1)


def test_the_averaged_weights_are_what_is_scored_and_kept():
    network = model()
    average, seen = WeightAverage(network, 0.99), []
    settings = config(network, 4, average=average)
    fit_best(loss_of(network), batches(4), settings, lambda: seen.append(network[0].weight.clone()) or 1.0, every=4)
    assert torch.equal(network[0].weight, seen[0])
    expected = average.state_dict()["average.0.weight"]
    assert torch.equal(network[0].weight, expected)
