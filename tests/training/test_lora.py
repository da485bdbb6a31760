"""LoRA against W + scale * B A written out, on the modules alone, on open_clip's towers and on ours."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from retrieval.errors import DataError, ModelError  # noqa: E402
from retrieval.training.lora import add_lora, load_lora, lora_state, merge_lora  # noqa: E402
from retrieval.training.towers import EfficientNetLite, MiniLM, ProjectedTower, SameConv2d  # noqa: E402
from tests.retrieval.open_clip_models import TINY  # noqa: E402

torch.set_num_threads(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomise(module, seed=1):
    """Updates as after some training."""
    state = lora_state(module)
    for number, (name, value) in enumerate(state.items()):
        if name.endswith(("lora_a", "lora_b")):
            state[name] = torch.randn(value.shape, generator=seeded(seed + number), dtype=value.dtype) * 0.3
    load_lora(module, state)
    return state


def open_clip_model(kind="causal"):
    open_clip = pytest.importorskip("open_clip.model")
    config = dict(TINY[kind])
    torch.manual_seed(0)
    return (open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP)(**config).eval()


def minilm():
    torch.manual_seed(0)
    return MiniLM(vocabulary=50, width=24, layers=2, heads=3).eval()


# ---- the sum written out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_linear_is_the_sum(train):
    torch.manual_seed(0)
    layer = nn.Linear(5, 7)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert add_lora(layer, 3, 6.0) == ("weight",)
    state = randomise(layer.train(train))
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "weight.lora_a": (3, 5),
        "weight.lora_b": (7, 3),
        "weight.lora_scale": (),
    }
    assert state["weight.lora_scale"] == 2.0
    x = torch.randn(4, 5, generator=seeded(7))
    a, b = (state[f"weight.{name}"].double().numpy() for name in ("lora_a", "lora_b"))
    expected = x.double().numpy() @ (weight.double().numpy() + 2 * b @ a).T + bias.double().numpy()
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-5)


def test_pointwise_convolutions_are_the_sum():
    torch.manual_seed(0)
    net = nn.Sequential(SameConv2d(4, 6, 1, 2, bias=False), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 1, groups=2))
    weight = net[0].weight.detach().clone()
    assert add_lora(net, 2, 1.0, ("conv1x1",)) == ("0.weight",)  # neither spatial nor grouped ones
    state = randomise(net)
    x = torch.randn(2, 4, 5, 5, generator=seeded(7))
    full = weight[:, :, 0, 0] + 0.5 * state["0.weight.lora_b"] @ state["0.weight.lora_a"]
    torch.testing.assert_close(net[0](x), torch.einsum("oi,nihw->nohw", full, x[:, :, ::2, ::2]), atol=1e-6, rtol=0)


def slow_attention(x, mask, packed, packed_bias, out, out_bias, heads):
    """Query by query, in float64."""
    x, packed, packed_bias, out, out_bias = (
        t.detach().double().numpy() for t in (x, packed, packed_bias, out, out_bias)
    )
    batch, length, width = x.shape
    size = width // heads
    q, k, v = np.split(x @ packed.T + packed_bias, 3, axis=-1)
    attended = np.zeros_like(x)
    for n in range(batch):
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            for i in range(length):
                scores = k[n, :, own] @ q[n, i, own] / math.sqrt(size)
                scores = scores + (0 if mask is None else mask[i].numpy())
                weights = np.exp(scores - scores.max())
                attended[n, i, own] = weights / weights.sum() @ v[n, :, own]
    return attended @ out.T + out_bias


def custom_attention(width, heads):
    return pytest.importorskip("open_clip.transformer").Attention(width, heads)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("grad", [True, False])  # without one, and in eval mode, torch takes its fast path
def test_attention_is_the_sum(custom, masked, train, grad):
    torch.manual_seed(0)
    attention = custom_attention(8, 2) if custom else nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    packed, out = attention.in_proj_weight.detach().clone(), attention.out_proj.weight.detach().clone()
    assert add_lora(attention, 2, 1.0, ("attention",)) == ("in_proj_weight", "out_proj.weight")
    state = randomise(attention.train(train))
    a, b = state["in_proj_weight.lora_a"], state["in_proj_weight.lora_b"]
    assert a.shape == (3, 2, 8)
    assert b.shape == (3, 8, 2)
    for part in range(3):  # query, key and value, each with an update of its own
        packed[8 * part : 8 * part + 8] += 0.5 * b[part] @ a[part]
    out += 0.5 * state["out_proj.weight.lora_b"] @ state["out_proj.weight.lora_a"]
    x = torch.randn(3, 5, 8, generator=seeded(7))
    mask = torch.full((5, 5), -torch.inf).triu(1) if masked else None
    with torch.set_grad_enabled(grad):
        result = attention(x, attn_mask=mask) if custom else attention(x, x, x, attn_mask=mask, need_weights=False)[0]
    expected = slow_attention(x, mask, packed, attention.in_proj_bias, out, attention.out_proj.bias, 2)
    np.testing.assert_allclose(result.detach(), expected, atol=1e-5)


def test_attention_between_different_widths():
    """As in open_clip's attentional pooler: three weights instead of a packed one."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True)
    plain = copy.deepcopy(attention)
    names = add_lora(attention, 2, 2.0)
    assert names == ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    state = randomise(attention)
    for name in names:
        with torch.no_grad():
            plain.get_parameter(name).add_(state[f"{name}.lora_b"] @ state[f"{name}.lora_a"])
    q, k, v = (torch.randn(2, n, w, generator=seeded(n)) for n, w in ((3, 8), (4, 6), (4, 5)))
    torch.testing.assert_close(attention(q, k, v)[0], plain(q, k, v)[0], atol=1e-6, rtol=0)


# ---- the start, and the gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "causal-custom", "resnet"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_model_starts_bit_for_bit_where_it_was(kind, grad):
    model = open_clip_model(kind).requires_grad_(grad)  # by which torch chooses kernels of attention, 1e-6 apart
    side = 64 if kind == "resnet" else 32
    pixels, ids = torch.randn(2, 3, side, side, generator=seeded()), torch.randint(1, 9, (2, 77), generator=seeded())
    with torch.set_grad_enabled(grad):
        before = model.encode_image(pixels), model.encode_text(ids)
        add_lora(model, 4, 8.0, ("attention", "linear", "conv1x1"))
        after = model.encode_image(pixels), model.encode_text(ids)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        randomise(model)
        assert not torch.allclose(model.encode_image(pixels), before[0], atol=1e-3)
        assert not torch.allclose(model.encode_text(ids), before[1], atol=1e-3)


def test_only_a_and_b_learn():
    model = open_clip_model().train()
    names = add_lora(model, 2, 4.0, generator=seeded())
    weights = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    blocks = (f"{tower}transformer.resblocks.{n}" for tower in ("visual.", "") for n in range(2))
    assert sorted(names) == sorted(f"{block}.{weight}" for block in blocks for weight in weights)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learnt = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.endswith(("lora_a", "lora_b")) for name in learnt)
    assert len(learnt) == 2 * len(names)
    optimizer = torch.optim.SGD(learnt.values(), 0.1)
    for _ in range(2):  # at first B is zero, and so is A's gradient
        optimizer.zero_grad()
        images = model.encode_image(torch.randn(2, 3, 32, 32, generator=seeded(3)), normalize=True)
        texts = model.encode_text(torch.randint(1, 9, (2, 77), generator=seeded(4)), normalize=True)
        F.cross_entropy(10 * images @ texts.T, torch.arange(2)).backward()
        assert all((p.grad is not None) == (name in learnt) for name, p in model.named_parameters())
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(learnt)


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
    add_lora(attention, 2, 3.0)
    randomise(attention)
    x = torch.randn(1, 3, 4, generator=seeded(7), dtype=torch.float64)
    learnt = {name: p.detach().clone().requires_grad_() for name, p in attention.named_parameters() if p.requires_grad}

    def forward(*values):
        return torch.func.functional_call(attention, dict(zip(learnt, values, strict=True)), (x, x, x))[0]

    assert len(learnt) == 4
    assert torch.autograd.gradcheck(forward, tuple(learnt.values()))


def test_seeds_are_respected():
    layers = [nn.Linear(6, 6) for _ in range(4)]
    torch.manual_seed(5)
    add_lora(layers[0], 2, 1.0)
    torch.manual_seed(5)
    add_lora(layers[1], 2, 1.0)
    before = torch.get_rng_state()
    add_lora(layers[2], 2, 1.0, generator=seeded(5))
    assert torch.equal(torch.get_rng_state(), before)
    add_lora(layers[3], 2, 1.0, generator=seeded(6))
    first, second, third, fourth = (lora_state(layer)["weight.lora_a"] for layer in layers)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, fourth)
    assert first.abs().max() <= 1 / math.sqrt(6)
    assert first.std() == pytest.approx(1 / math.sqrt(18), rel=0.4)


def test_dropout_hides_input_features_from_a_in_training_alone():
    torch.manual_seed(0)
    layer = nn.Linear(400, 1, bias=False)
    layer.weight.data.zero_()
    add_lora(layer, 1, 1.0, dropout=0.25)
    state = lora_state(layer)
    load_lora(layer, {name: torch.ones_like(value) for name, value in state.items()})
    eye = torch.eye(400)
    torch.manual_seed(3)
    seen = layer(eye).detach().flatten()  # one feature at a time: the weight as this pass has it
    assert sorted(set(seen.tolist())) == pytest.approx([0, 1 / 0.75])
    assert (seen == 0).float().mean() == pytest.approx(0.25, abs=0.07)
    torch.manual_seed(3)
    assert torch.equal(layer(eye).detach().flatten(), seen)
    assert not torch.equal(layer(eye).detach().flatten(), seen)
    layer.eval()
    assert torch.equal(layer(eye).flatten(), torch.ones(400))
    layer.train()
    merge_lora(layer)
    assert torch.equal(layer.weight, torch.ones(1, 400))


def test_updates_of_a_module_in_eval_mode_are_in_eval_mode():
    layer = nn.Linear(50, 3).eval()
    add_lora(layer, 2, 1.0, dropout=0.5)
    randomise(layer)
    assert torch.equal(layer.weight, layer.weight)
    assert not torch.equal(layer.train().weight, layer.weight)


def test_half_precision_weights_keep_their_type_and_learn_in_float32():
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    before = layer.weight.detach().clone()
    add_lora(layer, 2, 2.0)
    state = randomise(layer)
    assert {value.dtype for value in state.values()} == {torch.float32}
    expected = before + (state["weight.lora_b"] @ state["weight.lora_a"]).bfloat16()
    assert torch.equal(layer.weight, expected)
    merge_lora(layer)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, expected)


# ---- merging, saving, refusing ---------------------------------------------------------------------------------------


def outline(module):
    """What can be seen of a module from outside."""
    return (
        [(name, tuple(value.shape), value.dtype) for name, value in module.state_dict().items()],
        [name for name, _ in module.named_parameters()],
        [(name, type(part)) for name, part in module.named_modules()],
    )


@pytest.mark.parametrize("kind", ["causal", "resnet", "minilm"])
def test_merging_leaves_the_plain_model_with_the_same_outputs(kind):
    model = minilm() if kind == "minilm" else open_clip_model(kind)
    seen = outline(model)
    parameters = dict(model.named_parameters())
    add_lora(model, 3, 6.0, ("attention", "linear", "conv1x1"))
    randomise(model)
    assert outline(model) != seen

    def outputs():
        if kind == "minilm":
            return [model(torch.tensor([[4, 5, 6, 0]]))]
        side = 64 if kind == "resnet" else 32
        pixels = torch.randn(2, 3, side, side, generator=seeded())
        return [model.encode_image(pixels), model.encode_text(torch.randint(1, 9, (2, 77), generator=seeded()))]

    with torch.no_grad():
        before = outputs()
        merge_lora(model)
        after = outputs()
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert outline(model) == seen
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())  # the optimiser's own
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_copy_is_merged_while_the_original_goes_on():
    model = minilm()
    add_lora(model, 2, 4.0)
    state = randomise(model)
    ids = torch.tensor([[4, 5, 6, 0]])
    before = model(ids)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    torch.testing.assert_close(merged(ids), before, atol=1e-6, rtol=0)
    assert torch.equal(model(ids), before)
    assert all(torch.equal(value, state[name]) for name, value in lora_state(model).items())
    assert all("lora" not in name and "parametr" not in name for name in merged.state_dict())
    model(ids).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.endswith("lora_b"))


def test_a_state_makes_the_trip_through_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    model, again = open_clip_model(), open_clip_model()
    names = add_lora(model, 2, 4.0, generator=seeded(1))
    state = randomise(model)
    assert sorted(state) == sorted(f"{name}.{key}" for name in names for key in ("lora_a", "lora_b", "lora_scale"))
    assert sum(value.numel() for value in state.values()) < 0.02 * sum(p.numel() for p in model.parameters())
    save_file(lora_state(model), tmp_path / "lora.safetensors")
    add_lora(again, 2, 1.0, generator=seeded(2))  # the scale is the file's
    load_lora(again, load_file(tmp_path / "lora.safetensors"))
    pixels = torch.randn(2, 3, 32, 32, generator=seeded())
    assert torch.equal(model.encode_image(pixels), again.encode_image(pixels))


def test_a_state_of_other_weights_is_refused():
    layer, other, narrow = (nn.Linear(4, 4) for _ in range(3))
    add_lora(layer, 2, 1.0)
    add_lora(narrow, 1, 1.0)
    before = lora_state(layer)
    with pytest.raises(ModelError, match=r"weight\.lora_a is missing, superfluous or of another size"):
        load_lora(layer, lora_state(narrow))
    with pytest.raises(ModelError, match=r"weight\.lora_b is missing"):
        load_lora(layer, {name: value for name, value in before.items() if "lora_b" not in name})
    with pytest.raises(ModelError, match="superfluous"):
        load_lora(other, before)
    assert all(torch.equal(value, before[name]) for name, value in lora_state(layer).items())


def test_what_cannot_be_adapted_is_refused_unchanged():
    trunk = EfficientNetLite(0.1, 0.1)
    with pytest.raises(
        ModelError, match="EfficientNetLite has no weight for LoRA among attention, linear: choose other"
    ):
        add_lora(trunk, 2, 1.0)
    assert all(parameter.requires_grad for parameter in trunk.parameters())
    assert len(add_lora(trunk, 2, 1.0, ("conv1x1",))) == sum(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) for part in trunk.modules()
    )
    with pytest.raises(ModelError, match="LoRA updates already: merge them first"):
        add_lora(trunk, 2, 1.0, ("conv1x1",))
    merge_lora(trunk)
    with pytest.raises(ModelError, match="no LoRA updates to merge"):
        merge_lora(trunk)
    for settings in ({"targets": ("mlp",)}, {"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        with pytest.raises(DataError, match="LoRA"):
            add_lora(nn.Linear(2, 2), **{"rank": 1, "alpha": 1.0, **settings})


# ---- through ONNX ----------------------------------------------------------------------------------------------------


def test_merged_towers_are_exported_under_their_plain_names(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from retrieval.images import Preprocessing
    from retrieval.training.export import bound_tower, read_weights, write_graphs

    preprocessing = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "squash", "bicubic")
    model, text = open_clip_model(), ProjectedTower(minilm(), 6)
    text.head.project = nn.Linear(24, 6)
    text.head.mean, text.head.std = torch.zeros(24), torch.ones(24)
    text.eval()
    image_names, text_names = set(model.visual.state_dict()), set(text.state_dict())
    for tower in (model.visual, text):
        add_lora(tower, 2, 4.0, generator=seeded(3))
        randomise(tower)
    pixels = torch.randint(0, 256, (2, 32, 32, 3), generator=seeded(), dtype=torch.uint8)
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]])
    with torch.no_grad():
        expected = model.visual((pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5), text(ids)
    merge_lora(model.visual)
    merge_lora(text)
    write_graphs(
        tmp_path,
        image=bound_tower(model.visual, "forward"),
        text=text,
        tokenizer_json="{}",
        preprocessing=preprocessing,
        context_length=4,
        any_length=True,
    )
    for file, feed, vectors, names in (
        ("image.onnx", {"pixels": pixels.numpy()}, expected[0], image_names),
        ("text.onnx", {"ids": ids.numpy()}, expected[1], text_names),
    ):
        session = onnxruntime.InferenceSession(str(tmp_path / file), providers=["CPUExecutionProvider"])
        result = F.normalize(torch.from_numpy(session.run(None, feed)[0]), dim=1)
        torch.testing.assert_close(result, F.normalize(vectors, dim=1), atol=1e-5, rtol=0)
        assert set(read_weights(tmp_path / file)) == names
