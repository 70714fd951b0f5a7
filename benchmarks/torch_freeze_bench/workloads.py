"""What is updated: real networks with random weights, and synthetic sets of parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .checks import HEAD, Share, require
from .contestants import Family, Groups, Hyper

Loss = Callable[[], Tensor]
MakeLoss = Callable[[nn.Module, torch.device], Loss]
"""Takes a network and returns a function that runs it on one small batch."""


@dataclass(frozen=True)
class ModelSpec:
    """How to build one network, what its head is called, and how to compute a loss with it."""

    title: str
    head: str
    blocks: str
    """A pattern for the beginning of the names of a block's parameters."""
    build: Callable[[], nn.Module]
    make_loss: MakeLoss
    needs: str | None = None
    """The package it comes from."""
    large: bool = False
    """Too large for a CPU to do everything with it."""


def _vision(name: str) -> nn.Module:
    torchvision = require("torchvision", "torchvision", name)
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def _text(kind: str, config: str, **options: Any) -> nn.Module:
    transformers = require("transformers", "transformers", kind)
    model: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**options))
    return model


def _decoder() -> nn.Module:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in float32 it would need twice the memory
    try:
        return _text(
            "LlamaForCausalLM",
            "LlamaConfig",
            vocab_size=32_000,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=20,
            num_attention_heads=16,
            num_key_value_heads=8,
            use_cache=False,
        )
    finally:
        torch.set_default_dtype(usual)


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))


def _classify(shape: tuple[int, ...], classes: int, on_cpu: int, on_cuda: int) -> MakeLoss:
    def make(model: nn.Module, device: torch.device) -> Loss:
        count = on_cuda if device.type == "cuda" else on_cpu
        inputs = torch.randn(count, *shape, device=device)
        labels = torch.randint(classes, (count,), device=device)
        return lambda: nn.functional.cross_entropy(model(inputs), labels)

    return make


def _read(on_cpu: tuple[int, int], on_cuda: tuple[int, int], classes: int | None) -> MakeLoss:
    """Classify texts, or without ``classes`` predict their tokens."""

    def make(model: nn.Module, device: torch.device) -> Loss:
        shape = on_cuda if device.type == "cuda" else on_cpu
        tokens = torch.randint(1000, 30000, shape, device=device)
        labels = torch.randint(classes, shape[:1], device=device) if classes else tokens

        def loss() -> Tensor:
            value: Tensor = model(input_ids=tokens, labels=labels).loss
            return value

        return loss

    return make


def _images(
    title: str, name: str, head: str, blocks: str, on_cpu: int, on_cuda: int = 32
) -> ModelSpec:
    loss, build = _classify((3, 224, 224), 1000, on_cpu, on_cuda), functools.partial(_vision, name)
    return ModelSpec(title, head, blocks, build, loss, "torchvision")


def _bert(title: str, on_cpu: tuple[int, int], on_cuda: tuple[int, int]) -> ModelSpec:
    build = functools.partial(_text, "BertForSequenceClassification", "BertConfig")
    loss, blocks = _read(on_cpu, on_cuda, 2), r"bert\.encoder\.layer\.\d+\."
    return ModelSpec(title, "classifier.", blocks, build, loss, "transformers")


_RESNET, _VIT = r"layer\d+\.", r"encoder\.layers\.encoder_layer_\d+\."
_MOBILENET = ("mobilenet_v3_small", "classifier.3.", r"features\.\d+\.")
_TOKENS = _read((1, 16), (4, 512), None)
_LLAMA = ("lm_head.", r"model\.layers\.\d+\.", _decoder, _TOKENS, "transformers")
_TINY = ("3.", r"\d+\.", _tiny, _classify((16,), 4, 8, 8))
MODELS = {
    "resnet50": _images("ResNet-50", "resnet50", "fc.", _RESNET, 2),
    "vit_b_16": _images("ViT-B/16", "vit_b_16", "heads.", _VIT, 1),
    "mobilenet_v3_small": _images("MobileNetV3-small", *_MOBILENET, 4),
    "bert_base": _bert("BERT-base", (2, 32), (32, 128)),
    "decoder_1b": ModelSpec("1.07B decoder in bf16", *_LLAMA, large=True),
    "resnet18_batch_8": _images("ResNet-18 at batch 8", "resnet18", "fc.", _RESNET, 8, 8),
    "bert_base_batch_4": _bert("BERT-base at batch 4", (4, 128), (4, 128)),
    "tiny": ModelSpec("three linear layers", *_TINY),
}
"""Batches are small on a CPU, so that the step matters. ``tiny`` needs no other
package: it is for trying out the benchmark itself."""


def needs_of(key: str) -> None:
    """Check that the package of a model is there, or raise MissingPackageError."""
    package = MODELS[key].needs
    if package is not None:
        require(package, package, key)


def freeze_share(named: Iterable[tuple[str, nn.Parameter]], share: Share, head: str) -> None:
    """Freeze from the input side, parameter by parameter in the order of registration.

    Args:
        named: the network's ``named_parameters()``.
        share: percent of the elements to freeze, or ``"head"`` for all but the head. What is
            frozen is the closest that whole parameters allow, and never the last one.
        head: the beginning of the names of the head's parameters.
    """
    items = list(named)
    total = sum(p.numel() for _, p in items)
    if share == HEAD:
        frozen = {name for name, _ in items if not name.startswith(head)}
    else:
        wanted = float(share) / 100 * total
        sizes = [p.numel() for _, p in items[:-1]]
        count = min(range(len(items)), key=lambda n: (abs(sum(sizes[:n]) - wanted), n))
        frozen = {name for name, _ in items[:count]}
    for name, p in items:
        p.requires_grad_(name not in frozen)
        p.grad = None


def describe_share(share: Share) -> str:
    """The share in words."""
    return "all but the head" if share == HEAD else f"{float(share):g} %"


@dataclass
class Workload:
    """A set of parameters to step; with a loss, a whole iteration can be run."""

    key: str
    title: str
    groups: Groups
    hyper: Hyper
    loss: Loss | None = None
    bandwidth: bool = False
    """Whether it is large enough to compare with the memory's speed."""
    shifted_gradients: bool = False
    """Whether gradients begin one element late, like views into a flat buffer."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of all groups."""
        return [p for group in self.groups for p in group]

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Those that are not frozen."""
        return [p for p in self.parameters if p.requires_grad]

    @property
    def any_frozen(self) -> bool:
        """Whether ``filter`` leaves anything out."""
        return len(self.trainable) < len(self.parameters)

    def fill_gradients(self) -> None:
        """Give each trainable parameter a random gradient and each frozen one none."""
        for p in self.parameters:
            p.grad = None
            if p.requires_grad:
                p.grad = _shifted(p) if self.shifted_gradients else torch.empty_like(p)
                p.grad.normal_(std=1e-2)


class Network:
    """A network built once, for all frozen shares and contestants."""

    def __init__(self, key: str, device: torch.device) -> None:
        self.key, self.device, self.spec = key, device, MODELS[key]
        torch.manual_seed(0)
        self.model = self.spec.build().to(device).train()

    @functools.cached_property
    def _start(self) -> dict[str, Tensor]:
        return {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def workload(self, share: Share, family: Family) -> Workload:
        """The network with its first weights back and ``share`` of it frozen."""
        self.model.load_state_dict(self._start)
        freeze_share(self.model.named_parameters(), share, self.spec.head)
        return Workload(
            key=f"{self.key}/{share if share == HEAD else f'{float(share):g}'}",
            title=f"{self.spec.title}, {describe_share(share)} frozen",
            groups=[list(self.model.parameters())],
            hyper=family.hyper["model"],
            loss=self.spec.make_loss(self.model, self.device),
            bandwidth=True,
        )

    def copy(self) -> tuple[nn.Module, Loss]:
        """A copy of the model, and the loss of the same batch for everyone."""
        model = copy.deepcopy(self.model)
        torch.manual_seed(1)
        return model, self.spec.make_loss(model, self.device)


def _shifted(like: Tensor) -> Tensor:
    room = torch.empty(like.numel() + 1, dtype=like.dtype, device=like.device)
    return room[1:].view(like.shape)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Place = Literal["aligned", "odd sizes", "gradients shifted", "parameters shifted"]


@dataclass(frozen=True)
class Tensors:
    """Equal tensors in equal param groups."""

    key: str
    title: str
    groups: int
    tensors: int
    """In each group."""
    elements: int
    """Of each tensor."""
    frozen: int = 0
    """How many of the first tensors are frozen."""
    dtype: str = "fp32"
    place: Place = "aligned"
    """Tensors of odd sizes have one element more. Shifted gradients begin one element late, like
    views into the flat buffer of DistributedDataParallel; shifted parameters likewise, as in
    libraries that keep them in one buffer."""
    large: bool = False

    def build(self, device: torch.device, family: Family, scale: float = 1.0) -> Workload:
        """Make the parameters; ``scale`` makes them smaller for a trial."""
        size, dtype = int(self.elements * scale) + (self.place == "odd sizes"), DTYPES[self.dtype]
        groups = []
        for _ in range(self.groups):
            values = [torch.randn(size, dtype=dtype, device=device) for _ in range(self.tensors)]
            if self.place == "parameters shifted":
                values = [_shifted(value).copy_(value) for value in values]
            groups.append([nn.Parameter(value) for value in values])
        for p in groups[0][: self.frozen]:
            p.requires_grad_(False)
        return Workload(
            self.key,
            self.title,
            groups,
            family.hyper["flat" if self.large else "steps"],
            bandwidth=self.large,
            shifted_gradients=self.place == "gradients shifted",
        )


def flat(millions: float, tensors: int, dtype: str = "fp32", place: Place = "aligned") -> Tensors:
    """So many elements in all that a step costs arithmetic and memory traffic."""
    elements = int(millions * 1e6)
    title = f"{millions:g} M elements in {tensors} {dtype} tensors"
    title += "" if place == "aligned" else f"; {place}"
    key, each = f"flat/{dtype}/{elements}/{place}", elements // tensors
    return Tensors(key, title, 1, tensors, each, dtype=dtype, place=place, large=True)


# One-element parameters leave the cost of a call; 161 is how many ResNet-50 has.
TINY = Tensors("tiny161", "161 one-element parameters", 1, 161, 1)
MOSTLY_FROZEN = Tensors("frozen998", "1000 one-element parameters, 998 frozen", 1, 1000, 1, 998)
WITHOUT_FROZEN = Tensors("frozen0", "2 one-element parameters", 1, 2, 1)
# As layer-wise learning rates make them.
GROUPS = Tensors("groups50", "50 param groups of 10 tensors of 64 elements", 50, 10, 64)
MANY_SINGLES = Tensors("groups465", "465 param groups of 1 tensor of 64 elements", 465, 1, 64)
SINGLES = Tensors("groups161", "161 param groups of 1 tensor of 64 elements", 161, 1, 64)
