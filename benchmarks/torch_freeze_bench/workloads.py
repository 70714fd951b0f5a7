"""What is updated: real networks with random weights, and synthetic sets of parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

HEAD = "head"
"""The frozen share that means: everything but the last layer."""
Groups = Sequence[Sequence[nn.Parameter]]
Loss = Callable[[], Tensor]
MakeLoss = Callable[[nn.Module, torch.device], Loss]
"""Takes a network and returns a function that runs it on one small batch."""


class RequestError(RuntimeError):
    """What was asked for cannot be done; the message says why and what to do instead."""


class MissingPackageError(RequestError):
    """A package that is needed is not installed; the message says how to install it."""


def require(package: str, pip_name: str, purpose: str) -> Any:
    """Import ``package``, or say what needs it and how to install it.

    Raises:
        MissingPackageError: it is not installed, or was built for another torch.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        why = f"{purpose} needs {package}"
    except RuntimeError as error:  # torchvision's operators do not fit the installed torch
        why = f"{purpose} needs a {package} that fits torch {torch.__version__} ({error})"
    raise MissingPackageError(f"{why}: pip install {pip_name}")


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters that every contestant gets."""

    lr: float = 1e-3
    momentum: float = 0.9
    weight_decay: float = 0.0


@dataclass(frozen=True)
class ModelSpec:
    """How to build one network, what its head is called, and how to compute a loss with it."""

    title: str
    head: str
    build: Callable[[], nn.Module]
    make_loss: MakeLoss
    batch: str
    blocks: str
    """A pattern for the beginning of the names of a block's parameters."""
    needs: str | None = None
    """The package it comes from."""
    large: bool = False
    """Too large for a CPU to do everything with it."""


def _vision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torchvision = require("torchvision", "torchvision", name)
        model: nn.Module = torchvision.models.get_model(name, weights=None)
        return model

    return build


def _bert() -> nn.Module:
    transformers = require("transformers", "transformers", "bert_base")
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig())
    return model


def _decoder() -> nn.Module:
    transformers = require("transformers", "transformers", "decoder_1b")
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=20,
        num_attention_heads=16,
        num_key_value_heads=8,
        use_cache=False,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # in float32 it would need twice the memory
    try:
        model: nn.Module = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    return model


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


def _image_model(
    title: str, head: str, name: str, on_cpu: int, on_cuda: int, blocks: str
) -> ModelSpec:
    batch = f"{on_cpu} image{'s' if on_cpu > 1 else ''} of 224x224"
    batch += f" ({on_cuda} on a GPU)" if on_cuda != on_cpu else ""
    loss = _classify((3, 224, 224), 1000, on_cpu, on_cuda)
    return ModelSpec(title, head, _vision(name), loss, batch, blocks, "torchvision")


_BERT_BLOCKS = r"bert\.encoder\.layer\.\d+\."
MODELS = {
    "resnet50": _image_model("ResNet-50", "fc.", "resnet50", 2, 32, r"layer\d+\."),
    "vit_b_16": _image_model(
        "ViT-B/16", "heads.", "vit_b_16", 1, 32, r"encoder\.layers\.encoder_layer_\d+\."
    ),
    "mobilenet_v3_small": _image_model(
        "MobileNetV3-small", "classifier.3.", "mobilenet_v3_small", 4, 32, r"features\.\d+\."
    ),
    "bert_base": ModelSpec(
        "BERT-base",
        "classifier.",
        _bert,
        _read((2, 32), (32, 128), 2),
        "2 texts of 32 tokens (32 of 128 on a GPU)",
        _BERT_BLOCKS,
        "transformers",
    ),
    "decoder_1b": ModelSpec(
        "1.07B decoder in bf16",
        "lm_head.",
        _decoder,
        _read((1, 16), (4, 512), None),
        "1 text of 16 tokens (4 of 512 on a GPU)",
        r"model\.layers\.\d+\.",
        "transformers",
        large=True,
    ),
    "resnet18_batch_8": _image_model(
        "ResNet-18 at batch 8", "fc.", "resnet18", 8, 8, r"layer\d+\."
    ),
    "bert_base_batch_4": ModelSpec(
        "BERT-base at batch 4",
        "classifier.",
        _bert,
        _read((4, 128), (4, 128), 2),
        "4 texts of 128 tokens",
        _BERT_BLOCKS,
        "transformers",
    ),
    "tiny": ModelSpec(
        "three linear layers",
        "3.",
        _tiny,
        _classify((16,), 4, 8, 8),
        "8 rows of 16 numbers",
        r"\d+\.",
    ),
}
"""Those outside ``ALL_MODELS`` run when a suite or an option names them. ``tiny`` needs no other
package: it is for trying out the benchmark itself."""

ALL_MODELS = ("resnet50", "vit_b_16", "mobilenet_v3_small", "bert_base")


def needs_of(key: str) -> None:
    """Check that the package of a model is there.

    Raises:
        MissingPackageError: it is not.
    """
    package = MODELS[key].needs
    if package is not None:
        require(package, package, key)


def freeze_share(named: Iterable[tuple[str, nn.Parameter]], share: float | str, head: str) -> float:
    """Freeze from the input side, parameter by parameter in the order of registration.

    Args:
        named: the network's ``named_parameters()``.
        share: percent of the elements to freeze, or ``"head"`` for all but the head.
        head: the beginning of the names of the head's parameters.

    Returns:
        The percentage of elements that is frozen now: the closest that whole parameters allow. The
        last parameter is never frozen, so something always trains.
    """
    items = list(named)
    total = sum(p.numel() for _, p in items)
    if share == HEAD:
        frozen = {name for name, _ in items if not name.startswith(head)}
    else:
        wanted = float(share) / 100 * total
        reached, best, count = 0, abs(wanted), 0
        for index, (_, p) in enumerate(items[:-1], start=1):
            reached += p.numel()
            if abs(reached - wanted) < best:
                best, count = abs(reached - wanted), index
        frozen = {name for name, _ in items[:count]}
    for name, p in items:
        p.requires_grad_(name not in frozen)
        p.grad = None
    return 100 * sum(p.numel() for name, p in items if name in frozen) / total


@dataclass
class Workload:
    """A set of parameters to step; with a loss, a whole iteration can be run."""

    key: str
    title: str
    groups: Groups
    hyper: Hyper
    frozen_percent: float = 0.0
    loss: Loss | None = None
    batch: str = ""
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
            if not p.requires_grad:
                p.grad = None
                continue
            p.grad = _shifted(p) if self.shifted_gradients else torch.empty_like(p)
            p.grad.normal_(std=1e-2)


class LoadedModel:
    """A network built once, from which the workloads of all frozen shares are made."""

    def __init__(self, key: str, device: torch.device) -> None:
        self.key, self.device, self.spec = key, device, MODELS[key]
        torch.manual_seed(0)
        self.model = self.spec.build().to(device).train()
        self._start = {k: v.detach().clone() for k, v in self.model.state_dict().items()}

    def workload(self, share: float | str) -> Workload:
        """The network with its first weights back and ``share`` of it frozen."""
        self.model.load_state_dict(self._start)
        reached = freeze_share(self.model.named_parameters(), share, self.spec.head)
        what = "all but the head frozen" if share == HEAD else f"{float(share):g} % frozen"
        return Workload(
            key=f"{self.key}/{share if share == HEAD else f'{float(share):g}'}",
            title=f"{self.spec.title}, {what}",
            groups=[list(self.model.parameters())],
            hyper=Hyper(weight_decay=1e-4),
            frozen_percent=reached,
            loss=self.spec.make_loss(self.model, self.device),
            batch=self.spec.batch,
            bandwidth=True,
        )


def _parameters(count: int, size: int, device: torch.device) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(size, device=device)) for _ in range(count)]


def tiny_trainable(device: torch.device) -> Workload:
    """As many tensors as ResNet-50 has, one element each: this leaves the cost of a call."""
    groups = [_parameters(161, 1, device)]
    return Workload("tiny161", "161 one-element parameters", groups, Hyper())


def mostly_frozen(device: torch.device, frozen: int = 998) -> Workload:
    """Two trainable parameters at the end of many frozen ones, one element each."""
    parameters = _parameters(frozen + 2, 1, device)
    for p in parameters[:frozen]:
        p.requires_grad_(False)
    title = f"{frozen + 2} one-element parameters, {frozen} frozen"
    percent = 100 * frozen / (frozen + 2)
    return Workload(f"frozen{frozen}", title, [parameters], Hyper(), frozen_percent=percent)


def many_groups(device: torch.device, groups: int = 50, tensors: int = 10) -> Workload:
    """Many param groups, as layer-wise learning rates make them."""
    return Workload(
        f"groups{groups}",
        f"{groups} param groups of {tensors} tensor{'s' if tensors > 1 else ''} of 64 elements",
        [_parameters(tensors, 64, device) for _ in range(groups)],
        Hyper(),
    )


def _shifted(like: Tensor) -> Tensor:
    room = torch.empty(like.numel() + 1, dtype=like.dtype, device=like.device)
    return room[1:].view(like.shape)


Place = Literal["aligned", "odd sizes", "gradients shifted", "parameters shifted"]


def flat_set(
    device: torch.device,
    elements: int,
    tensors: int,
    dtype: torch.dtype = torch.float32,
    place: Place = "aligned",
) -> Workload:
    """Equal tensors with momentum and decay: what a step costs in arithmetic and memory traffic.

    Args:
        device: where they are.
        elements: of all tensors together.
        tensors: how many.
        dtype: of parameters, gradients and momentum.
        place: how they lie in memory. Tensors of odd sizes have one element more. Shifted gradients
            begin one element late, like views into the flat buffer of DistributedDataParallel;
            shifted parameters likewise, as in libraries that keep them in one buffer.
    """
    size = elements // tensors + (place == "odd sizes")
    parameters = []
    for _ in range(tensors):
        values = torch.empty(size, dtype=dtype, device=device)
        if place == "parameters shifted":
            values = _shifted(values)
        parameters.append(nn.Parameter(values.normal_()))
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    count = f"{elements / 1e6:g} M" if elements >= 100_000 else f"{elements:,}"
    title = f"{count} elements in {tensors} {name} tensors"
    return Workload(
        f"flat/{name}/{elements}/{place}",
        title + ("" if place == "aligned" else f"; {place}"),
        [parameters],
        Hyper(lr=0.1, weight_decay=1e-4),  # a rate at which bfloat16 moves
        bandwidth=True,
        shifted_gradients=place == "gradients shifted",
    )
