"""Averages of weights against loops over single numbers; the choice of a share on tables made by hand."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from retrieval.errors import DataError, ModelError  # noqa: E402
from retrieval.training.averaging import (  # noqa: E402
    Scores,
    WeightAverage,
    choose_interpolation,
    interpolated,
)


class Small(nn.Module):
    """A trained and a frozen weight, a batch norm with float and integer buffers, and a buffer that is not saved."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=dtype))
        self.locked = nn.Parameter(torch.randn(2, generator=generator, dtype=dtype), requires_grad=False)
        self.norm = nn.BatchNorm1d(2, dtype=dtype)
        self.register_buffer("mask", torch.full((2,), -torch.inf), persistent=False)

    def step(self, generator: torch.Generator) -> None:
        """Move everything that learns, as a step of training would."""
        with torch.no_grad():
            for value in (self.weight, self.norm.weight, self.norm.bias, self.norm.running_mean, self.norm.running_var):
                value.add_(torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype))
            self.norm.num_batches_tracked += 1


LEARNT = ["weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def numbers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# ---- the moving average ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.0, 0.3, 0.9999])
def test_the_average_is_that_of_a_loop(limit):
    model, generator = Small(), torch.Generator().manual_seed(1)
    average = WeightAverage(model, limit)
    flat = {name: value.flatten().tolist() for name, value in numbers(model).items()}
    for t in range(1, 8):
        model.step(generator)
        average.update(model)
        d = min(limit, (1 + t) / (10 + t))
        for name, values in flat.items():
            now = numbers(model)[name].flatten().tolist()
            if name == "norm.num_batches_tracked":
                flat[name] = now
            else:
                flat[name] = [d * old + (1 - d) * new for old, new in zip(values, now, strict=True)]
    state = average.state_dict()
    assert sorted(state) == sorted(["updates", *(f"average.{name}" for name in LEARNT)])  # neither frozen nor unsaved
    assert state["updates"] == 7
    for name in LEARNT:
        assert state[f"average.{name}"].flatten().tolist() == pytest.approx(flat[name], abs=1e-12), name
    assert state["average.norm.num_batches_tracked"] == 7


def test_the_first_update_keeps_two_elevenths():
    model = Small()
    first = model.weight.detach().clone()
    average = WeightAverage(model, 0.999)
    model.weight.data.zero_()
    average.update(model)
    torch.testing.assert_close(average.state_dict()["average.weight"], first * 2 / 11)


def test_applied_gives_the_average_and_then_the_weights_back_bit_for_bit():
    model, generator = Small(), torch.Generator().manual_seed(2)
    average = WeightAverage(model, 0.9)
    for _ in range(3):
        model.step(generator)
        average.update(model)
    before, pointers = numbers(model), [value.data_ptr() for value in model.state_dict().values()]
    with average.applied(model):
        inside = numbers(model)
        state = average.state_dict()
        for name in LEARNT:
            assert torch.equal(inside[name], state[f"average.{name}"]), name
        assert torch.equal(inside["locked"], before["locked"])
        assert not torch.equal(inside["weight"], before["weight"])
    assert equal(numbers(model), before)
    assert [value.data_ptr() for value in model.state_dict().values()] == pointers  # the optimiser's own tensors
    with pytest.raises(RuntimeError, match="broken"), average.applied(model):
        raise RuntimeError("broken")
    assert equal(numbers(model), before)


def test_applied_in_inference_mode_leaves_a_model_that_can_learn():
    model = Small()
    average = WeightAverage(model, 0.9)
    model.step(torch.Generator().manual_seed(2))
    average.update(model)
    before = numbers(model)
    with torch.inference_mode(), average.applied(model):
        assert not torch.equal(model.weight, before["weight"])
    assert equal(numbers(model), before)
    model.weight.square().sum().backward()
    assert torch.equal(model.weight.grad, 2 * before["weight"])
    average.update(model)


def test_a_resumed_average_goes_on_bit_for_bit(tmp_path):
    from safetensors.torch import load_file, save_file

    model, generator = Small(dtype=torch.float32), torch.Generator().manual_seed(3)
    average = WeightAverage(model, 0.99)
    for _ in range(4):
        model.step(generator)
        average.update(model)
    save_file(average.state_dict(), tmp_path / "average.safetensors")
    again = WeightAverage(Small(seed=9, dtype=torch.float32), 0.99)
    again.load_state_dict(load_file(tmp_path / "average.safetensors"))
    for _ in range(3):
        model.step(generator)
        average.update(model)
        again.update(model)
    assert equal(average.state_dict(), again.state_dict())


def test_half_precision_is_averaged_in_float32():
    """A hundred steps that bfloat16 would round away."""
    model = Small(dtype=torch.bfloat16)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.999)
    average.updates = 100_000  # beyond the warm-up
    model.weight.data.fill_(1.0078125)  # the next number
    for _ in range(100):
        average.update(model)
    expected = 1.0078125 - 0.0078125 * 0.999**100
    assert average.state_dict()["average.weight"].flatten().tolist() == pytest.approx([expected] * 6, abs=1e-5)
    with average.applied(model):
        assert model.weight.dtype == torch.bfloat16


def test_an_average_of_other_weights_is_refused():
    average = WeightAverage(Small())
    state = average.state_dict()
    with pytest.raises(ModelError, match=r"weight is missing in one or of another size"):
        average.load_state_dict({**state, "average.weight": torch.zeros(2, 2)})
    state.pop("average.norm.bias")
    with pytest.raises(ModelError, match=r"norm\.bias is missing"):
        average.load_state_dict(state)
    with pytest.raises(ModelError, match="missing"):
        average.update(nn.Linear(2, 2))
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(DataError, match="decay"):
            WeightAverage(Small(), decay)


# ---- interpolation ---------------------------------------------------------------------------------------------------


def ends():
    start = Small(seed=1)
    end = Small(seed=1)
    for _ in range(2):
        end.step(torch.Generator().manual_seed(5))
    return numbers(start), numbers(end)


def test_the_ends_are_the_start_and_the_end():
    start, end = ends()
    start["odd"] = end["odd"] = torch.tensor([torch.inf])
    assert equal(interpolated(start, end, 0), start)
    assert equal(interpolated(start, end, 1.0), end)
    assert interpolated(start, end, 0)["weight"].data_ptr() != start["weight"].data_ptr()


def test_between_the_ends_by_single_numbers():
    start, end = ends()
    mixed = interpolated(start, end, 0.3)
    for name, value in mixed.items():
        if name == "norm.num_batches_tracked":
            assert value == 2
            continue
        pairs = zip(start[name].flatten().tolist(), end[name].flatten().tolist(), strict=True)
        assert value.flatten().tolist() == pytest.approx([0.7 * a + 0.3 * b for a, b in pairs], abs=1e-12), name


def test_half_precision_stays_and_is_mixed_in_float32():
    one, other = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([3.0], dtype=torch.bfloat16)
    mixed = interpolated({"w": one}, {"w": other}, 0.26)["w"]
    assert mixed.dtype == torch.bfloat16
    assert mixed.item() == torch.tensor(1.52).bfloat16().item()


def test_interpolation_refuses():
    start, end = ends()
    for share in (-0.01, 1.01, math.nan):
        with pytest.raises(DataError, match="share"):
            interpolated(start, end, share)
    with pytest.raises(ModelError, match="locked"):
        interpolated(start, {name: value for name, value in end.items() if name != "locked"}, 0.5)


# ---- the forgetting guard --------------------------------------------------------------------------------------------


def choose(table, max_loss, shares=None):
    """``table``: share to (target, {held-out name: score})."""
    asked = []

    def score(share):
        asked.append(share)
        target, held_out = table[share]
        return Scores(target, held_out)

    chosen = choose_interpolation(table if shares is None else shares, score, max_loss)
    assert asked == sorted(table)  # each once, the start first
    assert [one.share for one in chosen.tries] == asked
    assert [one.scores for one in chosen.tries] == [Scores(*table[share]) for share in asked]
    return chosen


TABLE = {
    0.0: (0.30, {"coco": 0.50, "imagenet": 0.40}),
    0.25: (0.40, {"coco": 0.51, "imagenet": 0.39}),
    0.5: (0.45, {"coco": 0.50, "imagenet": 0.38}),
    0.75: (0.47, {"coco": 0.50, "imagenet": 0.36}),
    1.0: (0.44, {"coco": 0.42, "imagenet": 0.30}),
}


@pytest.mark.parametrize(
    ("max_loss", "share", "forgets"),
    [
        (math.inf, 0.75, [(), (), (), (), ()]),
        (0.1, 0.75, [(), (), (), (), ()]),  # 0.4 - 0.3: a fall by exactly that much is allowed
        (0.04, 0.75, [(), (), (), (), ("coco", "imagenet")]),
        (0.03, 0.5, [(), (), (), ("imagenet",), ("coco", "imagenet")]),
        (0.02, 0.5, [(), (), (), ("imagenet",), ("coco", "imagenet")]),
        (0.01, 0.25, [(), (), ("imagenet",), ("imagenet",), ("coco", "imagenet")]),
    ],
)
def test_the_best_share_that_forgets_little_enough(max_loss, share, forgets):
    chosen = choose(TABLE, max_loss)
    assert chosen.share == share
    assert [one.forgets for one in chosen.tries] == forgets
    refused = sum(map(bool, forgets))
    told = f"; {refused} of 5 shares forget too much" if refused else ""
    assert chosen.reason == "the highest target score" + told


def test_the_start_where_everything_forgets():
    chosen = choose(TABLE, 0.0)
    assert chosen.share == 0
    assert chosen.reason == (
        "the start: every share of the trained weights loses more than 0 of a held-out score (coco, imagenet)"
    )


def test_the_start_where_training_gained_nothing():
    chosen = choose({0.0: (0.5, {"a": 0.1}), 0.5: (0.5, {"a": 0.9}), 1.0: (0.4, {"a": 0.0})}, 0.05)
    assert chosen.share == 0  # a tie with 0.5
    assert chosen.reason == "the start: no share that is allowed scores higher on the target"


def test_ties_go_to_the_smaller_share():
    assert choose({0.0: (0.1, {}), 0.4: (0.6, {}), 0.7: (0.6, {}), 1.0: (0.6, {})}, 0.0).share == 0.4


def test_the_start_is_tried_without_being_named_and_shares_in_any_order_once():
    table = {0.0: (0.1, {"a": 1.0}), 0.5: (0.2, {"a": 1.0}), 1.0: (0.3, {"a": 0.2})}
    assert choose(table, 0.1, shares=[1, 0.5, 0.5]).share == 0.5


def test_what_is_no_number_is_never_chosen():
    table = {0.0: (0.1, {"a": 1.0}), 0.5: (math.nan, {"a": 1.0}), 0.8: (0.2, {"a": 1.0}), 1.0: (0.9, {"a": math.nan})}
    chosen = choose(table, 0.1)
    assert chosen.share == 0.8
    assert chosen.tries[-1].forgets == ("a",)
    assert choose({0.0: (math.nan, {}), 0.5: (0.2, {}), 1.0: (0.1, {})}, 0.1).share == 0.5


def test_a_new_held_out_score_of_a_mixed_model_is_no_guard():
    assert choose({0.0: (0.1, {"a": 1.0}), 1.0: (0.2, {"a": 1.0, "b": 0.0})}, 0.1).share == 1.0


def test_choosing_refuses():
    def score(share):
        return Scores(share, {"a": 1.0} if share == 0 else {})

    for shares, max_loss in (
        ([], 0.1),
        ([0.0], 0.1),
        ([0.5, 1.2], 0.1),
        ([-0.1, 1], 0.1),
        ([1], -0.1),
        ([1], math.nan),
    ):
        with pytest.raises(DataError, match="interpolation needs shares"):
            choose_interpolation(shares, score, max_loss)
    with pytest.raises(DataError, match="no held-out score 'a'"):
        choose_interpolation([1.0], score, 0.1)
