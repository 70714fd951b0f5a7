"""From stored features, models give the bits of the whole pass; missing libraries skip by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from tests.helpers import optim_cases as cases
from torch_freeze import FeatureCache, freeze, freeze_except

pytestmark = pytest.mark.usefixtures("one_thread")


def without_chance(model: nn.Module) -> nn.Module:
    """No dropout and no stochastic depth, so that two passes are alike."""
    for module in model.modules():
        if isinstance(getattr(module, "p", None), float):
            module.p = 0.0
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(
    model: nn.Module,
    samples: list[Any],
    run: Callable[..., Any],
    loss_of: Callable[[Any, Any], Tensor],
    **options: Any,
) -> FeatureCache:
    """Loss, gradients and buffers of a pass over stored features are those of the whole pass."""
    features = FeatureCache(model, samples, spot_check=0, **options)  # type: ignore[arg-type]
    features.fill(len(samples), progress=False)
    assert features.stored == len(samples)
    buffers = [b.clone() for b in model.buffers()]
    raw = options.get("collate_fn", default_collate)(samples)
    whole = loss_of(run(raw), raw)
    wanted = gradients(model, whole)
    after = [b.clone() for b in model.buffers()]
    for buffer, value in zip(model.buffers(), buffers, strict=True):
        buffer.data = value
    (batch,) = DataLoader(features.dataset, len(samples))
    assert batch.inputs.slots is not None and batch.inputs.raw is None
    cached = loss_of(features(batch.inputs), (None, batch.targets))
    assert torch.equal(cached, whole)
    got = gradients(model, cached)
    assert got.keys() == wanted.keys() and wanted
    for name, gradient in wanted.items():
        cases.assert_same_bits(got[name], gradient, name)
    for buffer, value in zip(model.buffers(), after, strict=True):
        assert torch.equal(buffer, value)
    return features


# ------------------------------------------------------------------------------------- torchvision

# A family's smallest member, and the size of an image that it takes.
FAMILIES = {
    "alexnet": ("alexnet", 64),
    "vgg": ("vgg11_bn", 32),
    "resnet": ("resnet18", 64),
    "resnext": ("resnext50_32x4d", 64),
    "wide resnet": ("wide_resnet50_2", 64),
    "densenet": ("densenet121", 64),
    "squeezenet": ("squeezenet1_1", 64),
    "googlenet": ("googlenet", 64),
    "inception": ("inception_v3", 128),
    "mobilenet v2": ("mobilenet_v2", 64),
    "mobilenet v3": ("mobilenet_v3_small", 64),
    "shufflenet": ("shufflenet_v2_x0_5", 64),
    "mnasnet": ("mnasnet0_5", 64),
    "efficientnet": ("efficientnet_b0", 64),
    "regnet": ("regnet_y_400mf", 64),
    "convnext": ("convnext_tiny", 64),
    "vit": ("vit", 32),
    "swin": ("swin", 32),
    "swin v2": ("swin_v2", 32),
    "maxvit": ("maxvit", 64),
}


def vision_model(name: str) -> Any:
    """Of the families of transformers, the full models would take too long."""
    models = pytest.importorskip("torchvision").models
    if name == "vit":
        return models.VisionTransformer(32, 8, 4, 4, 32, 64, num_classes=10)
    if name in ("swin", "swin_v2"):
        new = name == "swin_v2"
        block = models.swin_transformer.SwinTransformerBlockV2 if new else None
        merge = models.swin_transformer.PatchMergingV2 if new else None
        more = {"block": block, "downsample_layer": merge} if new else {}
        return models.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=10, **more)
    if name == "maxvit":
        return models.MaxVit((64, 64), 8, 4, [8, 16], [2, 2], 4, 0.0, num_classes=10)
    options = {"aux_logits": False} if name == "inception_v3" else {}
    options |= {"aux_logits": False} if name == "googlenet" else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return getattr(models, name)(num_classes=10, **options)


@pytest.mark.parametrize("part", ["head", "half"])
@pytest.mark.parametrize(("name", "size"), cases.ids(FAMILIES))
def test_torchvision(name: str, size: int, part: str) -> None:
    torch.manual_seed(0)
    model = without_chance(vision_model(name))
    params = [*model.parameters()]
    if part == "head":
        owner = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))][-1]
        freeze_except(model, owner)
    else:
        freeze(model, *params[: len(params) // 2])
    for p in model.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)  # a head of zeros would hide everything
    samples = [(torch.randn(3, size, size), i) for i in range(4)]
    features = assert_same_bits(
        model,
        samples,
        lambda raw: model(raw[0]),
        lambda out, raw: nn.functional.cross_entropy(out, raw[1]),
    )
    assert features.boundary
    if part == "head":
        assert " 100.0 %" in str(features) or " 99." in str(features)


# ------------------------------------------------------------------------------------ Transformers

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
IMAGES = {"image_size": 32, "patch_size": 8, **SMALL}
TEXT = {"vocab_size": 100, **SMALL}
GPT2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}


def text(i: int, n: int = 12) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(i)
    mask = torch.ones(n, dtype=torch.long)
    mask[n - i - 1 :] = 0
    return {"input_ids": torch.randint(5, 90, (n,), generator=gen), "attention_mask": mask}


def sentence(i: int) -> dict[str, Tensor]:
    return {**text(i), "labels": torch.tensor(i % 2)}


def tokens(i: int) -> dict[str, Tensor]:
    sample = text(i)
    return {**sample, "labels": sample["input_ids"].clone()}


def image(i: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(i)
    return {"pixel_values": torch.randn(3, 32, 32, generator=gen), "labels": torch.tensor(i % 2)}


def wave(i: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(i)
    return {"input_values": torch.randn(1600, generator=gen), "labels": torch.tensor(i % 2)}


def spectrum(i: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(i)
    return {"input_features": torch.randn(16, 40, generator=gen), "labels": torch.tensor(i % 2)}


def image_and_text(i: int) -> dict[str, Tensor]:
    return {**text(i), "pixel_values": image(i)["pixel_values"]}


def contrastive(samples: list[Any]) -> dict[str, Any]:
    return {**default_collate(samples), "return_loss": True}


# class, config, what is frozen, a sample, and the module whose output is stored
LANGUAGE: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...], Any, str]] = {
    "BERT": (
        "BertForSequenceClassification",
        "BertConfig",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **TEXT},
        ("bert.embeddings", "*.layer.0", "*.layer.1"),
        sentence,
        "bert.encoder.layer.1",
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **GPT2},
        ("*.wte", "*.wpe", "*.h.0", "*.h.1"),
        tokens,
        "transformer.h.1",
    ),
    "Llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"num_key_value_heads": 2, **TEXT},
        ("*.embed_tokens", "*.layers.0", "*.layers.1"),
        tokens,
        "model.layers.1",
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **IMAGES},
        ("vit.embeddings", "vit.*.0", "vit.*.1"),
        image,
        ".1",
    ),
    "CLIP": (
        "CLIPModel",
        "CLIPConfig",
        {"vision_config": IMAGES, "text_config": {"max_position_embeddings": 20, **TEXT}},
        ("vision_model", "text_model.embeddings", "text_model.*.layers.0"),
        image_and_text,
        "text_model.encoder.layers.0",
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {
            "vocab_size": 30,
            "conv_dim": (16, 16, 16),
            "conv_stride": (5, 4, 4),
            "conv_kernel": (10, 4, 4),
            "num_feat_extract_layers": 3,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 16,
            "layerdrop": 0.0,
            "apply_spec_augment": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            **SMALL,
        },
        (
            "wav2vec2.feature_*",
            "*.pos_conv_embed",
            "wav2vec2.encoder.layer_norm",
            "*.layers.0",
            "*.layers.1",
        ),
        wave,
        "wav2vec2.encoder.layers.1",
    ),
    "Whisper encoder": (
        "WhisperForAudioClassification",
        "WhisperConfig",
        {
            "vocab_size": 100,
            "d_model": 32,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "num_mel_bins": 16,
            "max_source_positions": 20,
            "classifier_proj_size": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        ("encoder.conv*", "encoder.embed_positions", "*.layers.0", "*.layers.1"),
        spectrum,
        "encoder.layers.1",
    ),
}


def language_model(name: str) -> tuple[Any, tuple[str, ...], Any, str]:
    transformers = pytest.importorskip("transformers")
    model, config, options, frozen, sample, boundary = LANGUAGE[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**options))
    return made.train(), frozen, sample, boundary


@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers(name: str) -> None:
    model, frozen, sample, boundary = language_model(name)
    freeze(model, *frozen)
    options = {"collate_fn": contrastive} if name == "CLIP" else {}
    features = assert_same_bits(
        model,
        [sample(i) for i in range(4)],
        lambda raw: model(**raw),
        lambda out, raw: out.loss,
        **options,
    )
    assert features.boundary[-1].endswith(boundary)


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "Llama"])
def test_texts_without_padding_where_the_boundary_is_found(name: str) -> None:
    """Transformers leaves out a mask of ones, so that only `mask.all()` asks for it there."""
    model, frozen, sample, boundary = language_model(name)
    freeze(model, *frozen)
    samples = [sample(i) for i in range(7)]
    for i in (0, 3, 6):
        samples[i]["attention_mask"].fill_(1)
    features = assert_same_bits(model, samples, lambda raw: model(**raw), lambda out, raw: out.loss)
    assert features.boundary == (boundary,)


def test_gradient_checkpointing_of_the_trainable_part() -> None:
    model, frozen, sample, _ = language_model("BERT")
    freeze(model, *frozen)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same_bits(
        model,
        [sample(i) for i in range(4)],
        lambda raw: model(**raw),
        lambda out, raw: out.loss,
    )


def test_dropout_of_the_prefix_is_refused_or_put_into_eval_mode() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)).train()
    freeze(model, "bert.embeddings", "*.layer.0")
    samples: Any = [sentence(i) for i in range(4)]
    with pytest.raises(ValueError, match=r"bert\.embeddings\.dropout.*eval_frozen=True"):
        FeatureCache(model, samples)
    features = FeatureCache(model, samples, eval_frozen=True)
    losses = []
    for _ in range(2):  # the whole pass, and the one from stored features
        (batch,) = DataLoader(features.dataset, 4)
        torch.manual_seed(1)
        losses.append(features(batch.inputs).loss)
    assert batch.inputs.slots is not None
    assert torch.equal(*losses)
    assert all(m.training for m in model.modules())
