"""What is updated: real networks with random weights, and synthetic sets of parameters."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from contestants import Groups, Hyper
from torch import Tensor, nn

HEAD = "head"
"""The frozen share that means: everything but the last layer."""


class MissingPackageError(RuntimeError):
    """A package that is needed is not installed; the message says how to fix that."""


class NotEnoughMemoryError(RuntimeError):
    """The device cannot hold what was asked for; the message says how much that is."""


def require(package: str, pip_name: str, purpose: str) -> Any:
    """Import ``package``, or say what needs it and the command that installs it.

    Raises:
        MissingPackageError: it is not there, or was built for another torch.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        why = f"{purpose} needs {package}"
    except RuntimeError as error:  # torchvision's operators do not fit the installed torch
        why = f"{purpose} needs a {package} that fits torch {torch.__version__} ({error})"
    raise MissingPackageError(f"{why}: pip install {pip_name}")


@dataclass(frozen=True)
class ModelSpec:
    """How to build one network, which parameters are its head, and how to get a loss out of it."""

    title: str
    head: str
    needs: str | None
    """The package it comes from."""
    build: Callable[[], nn.Module]
    make_loss: Callable[[nn.Module, torch.device], Callable[[], Tensor]]
    """Takes the network and returns a function that runs it on one small batch."""
    batch: str
    blocks: str = ""
    """What the names of a block's parameters begin with, as a pattern; for training by turns."""
    large: bool = False
    """Too large for everything a CPU could be asked to do with it."""


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
    torch.set_default_dtype(torch.bfloat16)  # never to hold it in twice the memory
    try:
        model: nn.Module = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    return model


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))


def _classify(
    shape: tuple[int, ...], classes: int, on_cpu: int, on_cuda: int
) -> Callable[[nn.Module, torch.device], Callable[[], Tensor]]:
    def make(model: nn.Module, device: torch.device) -> Callable[[], Tensor]:
        count = on_cuda if device.type == "cuda" else on_cpu
        inputs = torch.randn(count, *shape, device=device)
        labels = torch.randint(classes, (count,), device=device)
        return lambda: nn.functional.cross_entropy(model(inputs), labels)

    return make


def _classify_tokens(
    on_cpu: tuple[int, int], on_cuda: tuple[int, int]
) -> Callable[[nn.Module, torch.device], Callable[[], Tensor]]:
    def make(model: nn.Module, device: torch.device) -> Callable[[], Tensor]:
        shape = on_cuda if device.type == "cuda" else on_cpu
        tokens = torch.randint(1000, 30000, shape, device=device)
        labels = torch.randint(2, shape[:1], device=device)

        def loss() -> Tensor:
            value: Tensor = model(input_ids=tokens, labels=labels).loss
            return value

        return loss

    return make


def _predict_tokens(model: nn.Module, device: torch.device) -> Callable[[], Tensor]:
    shape = (4, 512) if device.type == "cuda" else (1, 16)
    tokens = torch.randint(1000, 30000, shape, device=device)

    def loss() -> Tensor:
        value: Tensor = model(input_ids=tokens, labels=tokens).loss
        return value

    return loss


_IMAGE = (3, 224, 224)

MODELS: dict[str, ModelSpec] = {
    "resnet50": ModelSpec(
        "ResNet-50",
        "fc.",
        "torchvision",
        _vision("resnet50"),
        _classify(_IMAGE, 1000, 2, 32),
        "2 images of 224x224 (32 on a GPU)",
        r"layer\d+\.",
    ),
    "vit_b_16": ModelSpec(
        "ViT-B/16",
        "heads.",
        "torchvision",
        _vision("vit_b_16"),
        _classify(_IMAGE, 1000, 1, 32),
        "1 image of 224x224 (32 on a GPU)",
        r"encoder\.layers\.encoder_layer_\d+\.",
    ),
    "mobilenet_v3_small": ModelSpec(
        "MobileNetV3-small",
        "classifier.3.",
        "torchvision",
        _vision("mobilenet_v3_small"),
        _classify(_IMAGE, 1000, 4, 32),
        "4 images of 224x224 (32 on a GPU)",
        r"features\.\d+\.",
    ),
    "bert_base": ModelSpec(
        "BERT-base",
        "classifier.",
        "transformers",
        _bert,
        _classify_tokens((2, 32), (32, 128)),
        "2 texts of 32 tokens (32 of 128 on a GPU)",
        r"bert\.encoder\.layer\.\d+\.",
    ),
    "decoder_1b": ModelSpec(
        "1.07B decoder in bf16",
        "lm_head.",
        "transformers",
        _decoder,
        _predict_tokens,
        "1 text of 16 tokens (4 of 512 on a GPU)",
        r"model\.layers\.\d+\.",
        large=True,
    ),
    "resnet18_batch_8": ModelSpec(
        "ResNet-18 at batch 8",
        "fc.",
        "torchvision",
        _vision("resnet18"),
        _classify(_IMAGE, 1000, 8, 8),
        "8 images of 224x224",
        r"layer\d+\.",
    ),
    "bert_base_batch_4": ModelSpec(
        "BERT-base at batch 4",
        "classifier.",
        "transformers",
        _bert,
        _classify_tokens((4, 128), (4, 128)),
        "4 texts of 128 tokens",
        r"bert\.encoder\.layer\.\d+\.",
    ),
    "tiny": ModelSpec(
        "three linear layers",
        "3.",
        None,
        _tiny,
        _classify((16,), 4, 8, 8),
        "8 rows of 16 numbers",
        r"\d+\.",
    ),
}
"""Those that are not in ``ALL_MODELS`` are run when named, by a suite or an option. ``tiny`` needs
no further package: it tries the script itself."""

ALL_MODELS = ("resnet50", "vit_b_16", "mobilenet_v3_small", "bert_base")


def freeze_share(named: Iterable[tuple[str, nn.Parameter]], share: float | str, head: str) -> float:
    """Freeze from the input side, parameter by parameter in the order of registration.

    Args:
        named: the network's ``named_parameters()``.
        share: percent of the elements to freeze, or ``"head"`` for all but the head.
        head: what the names of the head's parameters begin with.

    Returns:
        The percentage of elements that is frozen now: the closest whole number of parameters.
        Nothing is frozen beyond the parameter before the last one, so something always trains.
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
    """One set of parameters to step; with a model and a loss, a whole iteration can be run."""

    key: str
    title: str
    groups: Groups
    hyper: Hyper
    frozen_percent: float = 0.0
    model: nn.Module | None = None
    loss: Callable[[], Tensor] | None = None
    batch: str = ""
    bandwidth: bool = False
    """Whether it is large enough to be held against what the memory can do."""
    shifted_gradients: bool = False
    """Whether gradients begin one element after where they would, as in a flat buffer."""

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
        return any(not p.requires_grad for p in self.parameters)

    @property
    def step_bytes(self) -> int:
        """Bytes an update must move: reads p, g, m, writes p, m; without momentum no m."""
        streams = 5 if self.hyper.momentum else 3
        return sum(streams * p.numel() * p.element_size() for p in self.trainable)

    def fill_gradients(self) -> None:
        """Give each trainable parameter a random gradient and each frozen one none."""
        for p in self.parameters:
            if not p.requires_grad:
                p.grad = None
                continue
            p.grad = _shifted(p) if self.shifted_gradients else torch.empty_like(p)
            p.grad.normal_(std=1e-2)


@dataclass
class LoadedModel:
    """A network built once, from which the workloads of all frozen shares are made."""

    key: str
    device: torch.device
    spec: ModelSpec = field(init=False)
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.spec = MODELS[self.key]
        torch.manual_seed(0)
        self.model = self.spec.build().to(self.device).train()
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
            hyper=Hyper(momentum=0.9, weight_decay=1e-4),
            frozen_percent=reached,
            model=self.model,
            loss=self.spec.make_loss(self.model, self.device),
            batch=self.spec.batch,
            bandwidth=True,
        )


def _parameters(count: int, size: int, device: torch.device) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(size, device=device)) for _ in range(count)]


def tiny_trainable(device: torch.device) -> Workload:
    """As many tensors as ResNet-50 has, one element each: what is left is the cost of calling."""
    return Workload(
        "tiny161",
        "161 one-element parameters",
        [_parameters(161, 1, device)],
        Hyper(momentum=0.9),
    )


def mostly_frozen(device: torch.device, frozen: int = 998) -> Workload:
    """Two trainable parameters at the end of many frozen ones, one element each."""
    parameters = _parameters(frozen + 2, 1, device)
    for p in parameters[:frozen]:
        p.requires_grad_(False)
    return Workload(
        f"frozen{frozen}",
        f"{frozen + 2} one-element parameters, {frozen} frozen",
        [parameters],
        Hyper(momentum=0.9),
        frozen_percent=100 * frozen / (frozen + 2),
    )


def many_groups(device: torch.device, groups: int = 50, tensors: int = 10) -> Workload:
    """Many param groups, as layer-wise learning rates make them."""
    return Workload(
        f"groups{groups}",
        f"{groups} param groups of {tensors} tensor{'s' if tensors > 1 else ''} of 64 elements",
        [_parameters(tensors, 64, device) for _ in range(groups)],
        Hyper(momentum=0.9),
    )


def _shifted(like: Tensor) -> Tensor:
    """Memory of that shape that begins one element after where it would."""
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
        device: where they lie.
        elements: of all tensors together.
        tensors: how many.
        dtype: of parameters, gradients and momentum.
        place: how they lie. Those of odd sizes have one element more; gradients lie one element
            off where they are views into a flat buffer, as DistributedDataParallel's, and
            parameters where a library keeps them in one.
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
    return Workload(
        f"flat/{name}/{elements}/{place}",
        f"{count} elements in {tensors} {name} tensors"
        + ("" if place == "aligned" else f"; {place}"),
        [parameters],
        Hyper(lr=0.1, momentum=0.9, weight_decay=1e-4),  # a rate at which bfloat16 moves
        bandwidth=True,
        shifted_gradients=place == "gradients shifted",
    )
