"""The freeze API on real architectures with random weights; missing libraries skip by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.models import Recurrent
from torch_freeze import (
    FrozenAwareSGD,
    audit,
    freeze,
    freeze_except,
    frozen,
    gradual_unfreeze,
    guard,
    report,
    rotate,
    unfreeze,
)


def resnet50() -> tuple[Any, Any]:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet50(num_classes=10), (torch.randn(2, 3, 32, 32),)


def resnet18() -> tuple[Any, Any]:
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=10), (torch.randn(2, 3, 32, 32),)


def vit_b_16() -> tuple[Any, Any]:
    torchvision = pytest.importorskip("torchvision")
    # One image of 2 x 2 patches keeps the model at full size and the computation small.
    model = torchvision.models.vit_b_16(image_size=32, num_classes=10)
    # torchvision initializes the head to zero, and then no gradient would pass it.
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model, (torch.randn(1, 3, 32, 32),)


def bert() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        tie_word_embeddings=True,
    )
    ids = torch.randint(0, 100, (2, 8))
    return transformers.BertForMaskedLM(config), {"input_ids": ids}


def gpt2() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=100, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 100, (2, 8))}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        out: torch.Tensor = self.head(x.mean(1))
        return out


def attention() -> tuple[Any, Any]:
    return Attention(), (torch.randn(2, 5, 6),)


Maker = Callable[[], tuple[Any, Any]]
# name: (model, what is frozen, how many of its parameters that is, where backward is)
CASES: dict[str, tuple[Maker, list[str], int, str]] = {
    "ResNet-50, all but the head": (resnet50, ["conv1", "bn1", "layer?"], 159, "stops early"),
    "ResNet-50, a frozen tail": (resnet50, ["layer4", "fc"], 32, "runs through"),
    "ResNet-50, biases": (resnet50, ["*.bias"], 54, "runs through"),
    "ViT-B/16, patches and class token": (
        vit_b_16,
        ["conv_proj", "class_token", "encoder.pos_embedding"],
        4,
        "stops early",
    ),
    "ViT-B/16, the first half, class token forgotten": (
        vit_b_16,
        ["conv_proj", "encoder.layers.encoder_layer_[0-5]"],
        74,
        "mixed",
    ),
    "BERT, the encoder": (bert, ["bert.encoder"], 48, "runs through"),
    "BERT, the body": (bert, ["bert"], 53, "mixed"),
    "BERT, all attention": (bert, ["bert.encoder.layer.*.attention"], 30, "runs through"),
    "GPT-2, the first blocks, embeddings forgotten": (
        gpt2,
        ["transformer.h.[01]"],
        24,
        "runs through",
    ),
    "GPT-2, the embeddings": (gpt2, ["transformer.wte", "transformer.wpe"], 2, "mixed"),
    "attention": (attention, ["embed", "attention"], 6, "stops early"),
    "attention, its projection": (attention, ["attention.out_proj"], 2, "runs through"),
}


def loss_of(model: Any, example: Any) -> Any:
    out = model(**example) if isinstance(example, dict) else model(*example)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return out.float().square().mean()


@pytest.mark.parametrize("case", CASES)
def test_freezing_does_what_it_says_on(case: str) -> None:
    make, what, count, kind = CASES[case]
    torch.manual_seed(0)
    model, example = make()
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    loss_of(model, example).backward()
    result = freeze(model, *what)
    assert len(result.matched) == len(result.frozen_names) == count
    model.train()
    said = report(model, optimizer, example=example)
    assert said.flow.kind == kind, said.flow.sentence
    assert max(map(len, str(said).splitlines())) <= 120
    # Two steps: nothing frozen moves, everything trainable that has a gradient does.
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    with guard(model, content=True):
        for _ in range(2):
            loss_of(model, example).backward()
            assert not [f for f in audit(model, optimizer) if f.level == "error"]
            got = {n for n, p in model.named_parameters() if p.grad is not None}
            assert not got & set(result.frozen_names)
            optimizer.step()
    after = model.state_dict()
    moved = {n for n, p in model.named_parameters() if not before[n].equal(after[n])}
    assert moved and moved <= set(said.trainable_names)
    if kind == "stops early":
        assert moved == set(said.trainable_names)
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    assert all(m.training for m in model.modules())


def speech(kind: str) -> Maker:
    """Wav2Vec2 or HuBERT: in training its feature extractor marks its input with requires_grad."""

    def make() -> tuple[Any, Any]:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{kind}Config")(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=[16, 16],
            conv_stride=[5, 2],
            conv_kernel=[10, 3],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            # FlopCounterMode counts the weight gradient of a grouped convolution as if it had one.
            num_conv_pos_embedding_groups=1,
            layerdrop=0.0,
            apply_spec_augment=False,
        )
        model = getattr(transformers, f"{kind}Model")(config)
        return model, {"input_values": torch.randn(2, 400)}

    return make


def vit() -> tuple[Any, Any]:
    torchvision = pytest.importorskip("torchvision")
    vision_transformer = torchvision.models.VisionTransformer
    model = vision_transformer(32, 8, 2, 4, hidden_dim=32, mlp_dim=64, num_classes=10)
    nn.init.normal_(model.heads.head.weight, std=0.1)
    return model, (torch.randn(2, 3, 32, 32),)


def _no_change(model: Any, example: Any) -> None:
    pass


def _input_wants_grad(model: Any, example: Any) -> None:
    example[0].requires_grad_()


def _embeddings_want_grad(model: Any, example: Any) -> None:
    model.enable_input_require_grads()


EXAMPLE = "the example, which requires grad"
ACTIVATION = "an activation that requires grad"
# name: (model, what is frozen, what is done to it, the other leaf that backward runs to)
SAVED: dict[str, tuple[Maker, list[str], Callable[[Any, Any], None], str | None]] = {
    "ResNet-50, all but the head": (resnet50, ["conv1", "bn1", "layer?"], _no_change, None),
    "ResNet-50, the tail": (resnet50, ["layer3", "layer4"], _no_change, None),
    "ResNet-18, all but the head, its input": (
        resnet18,
        ["conv1", "bn1", "layer?"],
        _input_wants_grad,
        EXAMPLE,
    ),
    "ResNet-18, everything, its input": (resnet18, ["*"], _input_wants_grad, EXAMPLE),
    "BERT, the encoder": (
        bert,
        ["bert.encoder.layer.0", "bert.embeddings"],
        _no_change,
        None,
    ),
    "BERT, the body, its embeddings' output": (
        bert,
        ["bert"],
        _embeddings_want_grad,
        ACTIVATION,
    ),
    "BERT, everything, its embeddings' output": (bert, ["*"], _embeddings_want_grad, ACTIVATION),
    "GPT-2, the last block": (gpt2, ["transformer.h.2"], _no_change, None),
    "GPT-2, embeddings and the first block, the embeddings' output": (
        gpt2,
        ["transformer.w?e", "transformer.h.0"],
        _embeddings_want_grad,
        ACTIVATION,
    ),
    "ViT, the first block and all before": (
        vit,
        ["conv_proj", "class_token", "encoder.pos_embedding", "encoder.layers.encoder_layer_0"],
        _no_change,
        None,
    ),
    "Wav2Vec2, the feature extractor": (
        speech("Wav2Vec2"),
        ["feature_extractor"],
        _no_change,
        ACTIVATION,
    ),
    "Wav2Vec2, everything": (speech("Wav2Vec2"), ["*"], _no_change, ACTIVATION),
    "HuBERT, all but the last layer": (
        speech("Hubert"),
        ["feature_*", "encoder.pos_conv_embed", "encoder.layers.0"],
        _no_change,
        ACTIVATION,
    ),
}


def _backward_flops(model: Any, example: Any) -> int:
    """FLOPs of a real backward, after a forward whose attention consists of counted products."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = loss_of(model, example)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("case", SAVED)
def test_the_backward_work_saved_agrees_with_counted_flops_on(case: str) -> None:
    make, what, prepare, leaf = SAVED[case]
    torch.manual_seed(0)
    model, example = make()
    prepare(model, example)
    everything = _backward_flops(model, example)
    freeze(model, *what)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        result = report(model, example=example)
    flow = result.flow
    # Exact to the operation; the tolerance covers the division alone.
    counted = 1 - _backward_flops(model, example) / everything
    assert flow.backward_saved == pytest.approx(counted, abs=1e-9)
    assert flow.other_leaf == leaf if leaf != ACTIVATION else leaf in str(flow.other_leaf)
    assert (leaf is not None and leaf in flow.sentence) == (leaf is not None)
    if not result.trainable_names:
        assert "runs though everything is frozen" in flow.sentence
        assert flow.kind != "everything frozen" and "raises" not in str(result)


def test_attention_counts_the_same_in_one_operation_and_in_several() -> None:
    """Where torch has no formula for its fused attention (on the CPU), the report counts it."""
    model, example = gpt2()
    model.eval()  # with dropout it is always several operations
    freeze(model, "transformer.h.2", "transformer.w?e")
    fused = report(model, example=example).flow
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        apart = report(model, example=example).flow
    # Fused attention computes the scores twice; the other form does not.
    assert fused.weight_gradient_saved == apart.weight_gradient_saved > 0
    assert fused.backward_saved == pytest.approx(apart.backward_saved, rel=0.05)
    assert fused.backward_saved != apart.backward_saved


def test_a_reentrant_checkpoint_is_seen_through() -> None:
    plain, example = bert()
    freeze(plain, "bert.embeddings", "bert.encoder.layer.0")
    expected = report(plain, example=example).flow
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.disable_input_require_grads()
    flow = report(model, example=example).flow
    # No input of the first blocks requires grad, so the checkpoint leaves them out.
    gets = {n for n, p in model.named_parameters() if p.requires_grad}
    loss_of(model, example).backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert f"gives no gradient to {len(gets - got)} trainable parameters" in flow.sentence
    assert gets - got
    # With an input that does, all of them train, as they do without a checkpoint.
    model.enable_input_require_grads()
    plain.enable_input_require_grads()
    flow = report(model, example=example).flow
    assert flow == report(plain, example=example).flow != expected


def test_every_norm_of_a_frozen_resnet_is_held_and_the_eval_output_kept() -> None:
    model, (x,) = resnet50()
    model.eval()
    expected = model(x)
    result = freeze(model)
    assert len(result.held) == 53
    model.train()
    for twin in (model, copy.deepcopy(model)):
        assert torch.equal(twin(x), expected)


def test_the_forgotten_class_token_shows_only_when_measured() -> None:
    model, example = vit_b_16()
    freeze(model, "conv_proj", "encoder.layers.encoder_layer_[0-5]")
    result = report(model, example=example)
    assert result.flow.first_trainable == "class_token"
    freeze(model, "class_token", "encoder.pos_embedding")
    assert report(model, example=example).flow.kind == "stops early"


@pytest.mark.parametrize("alias", ["word_embeddings", "cls.predictions.decoder.weight"])
def test_the_tied_embedding_of_bert(alias: str) -> None:
    model, _ = bert()
    result = freeze(model, f"*{alias}*")
    names = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    assert names in result.tied
    assert any("the same tensor, so it is frozen too" in note for note in result.notes)
    assert not model.get_input_embeddings().weight.requires_grad


def test_the_tied_head_of_gpt2() -> None:
    model, example = gpt2()
    freeze_except(model, "lm_head")
    assert model.transformer.wte.weight.requires_grad
    kinds = {finding.kind for finding in audit(model)}
    assert "tied half" in kinds and "all frozen" not in kinds
    loss_of(model, example).backward()
    grads = [n for n, p in model.named_parameters() if p.grad is not None]
    assert grads == ["transformer.wte.weight"]


def test_lisa_on_gpt2_trains_the_drawn_blocks_with_embedding_and_head() -> None:
    model, example = gpt2()
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.1)
    schedule = rotate(model, "transformer.h.*", k=1, every=1, always=["lm_head", "*.wpe"], seed=1)
    drawn = set()
    for _ in range(6):
        schedule.step()
        with guard(model):
            loss_of(model, example).backward()
            optimizer.step()
        drawn.add(schedule.active)
        names = {n for n, p in model.named_parameters() if p.grad is not None}
        expected = {
            n for n, _ in model.named_parameters() if n.startswith(f"{schedule.active[0]}.")
        }
        assert names == expected | {"transformer.wte.weight", "transformer.wpe.weight"}
        optimizer.zero_grad()
    assert len(drawn) > 1


def test_a_generator_step_through_a_frozen_critic_keeps_the_critic() -> None:
    model, example = resnet50()
    generator = nn.Conv2d(3, 3, 1)
    loss_of(model, example).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    with guard(model), frozen(model):
        loss_of(model, (generator(example[0]),)).backward()
    assert generator.weight.grad is not None
    assert all(p.grad is grads[n] for n, p in model.named_parameters())


# --- audit and report on a zoo -------------------------------------------------------------------


def _vision(name: str, **options: Any) -> Maker:
    def make() -> tuple[Any, Any]:
        models = pytest.importorskip("torchvision.models")
        return getattr(models, name)(num_classes=5, **options), (torch.randn(2, 3, 64, 64),)

    return make


def fpn() -> tuple[Any, Any]:
    models = pytest.importorskip("torchvision.models")
    ops = pytest.importorskip("torchvision.ops")
    backbone = models.detection.backbone_utils.resnet_fpn_backbone
    model = backbone(
        backbone_name="resnet18", weights=None, norm_layer=ops.FrozenBatchNorm2d, trainable_layers=3
    )
    return model, (torch.randn(1, 3, 64, 64),)


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
IDS = torch.arange(3, 19).view(2, 8)


def _language(kind: str, head: str, **options: Any) -> Maker:
    def make() -> tuple[Any, Any]:
        transformers = pytest.importorskip("transformers")
        config = getattr(transformers, f"{kind}Config")(vocab_size=100, **options)
        example = {"input_ids": IDS}
        if config.is_encoder_decoder:
            example["decoder_input_ids"] = IDS[:, :4]
        return getattr(transformers, f"{kind}{head}")(config), example

    return make


def whisper() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=100,
        max_source_positions=20,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    example = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": IDS[:, :4]}
    return transformers.WhisperForConditionalGeneration(config), example


def masked_autoencoder() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        **SMALL,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    )
    return transformers.ViTMAEForPreTraining(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def clip() -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    text = {**SMALL, "vocab_size": 100, "max_position_embeddings": 16, "projection_dim": 16}
    vision = {**SMALL, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    example = {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 32, 32)}
    return transformers.CLIPModel(config), example


# Wav2Vec2 and HuBERT learn this for masked time steps, and here nothing is masked.
UNMASKED = {("no gradient", "masked_spec_embed")}
# The frozen embedding is the weight of the head's decoder, which otherwise trains.
HALF = {("tied half", "bert.embeddings.word_embeddings.weight")}
# name: (model, what is frozen, the errors and warnings to expect: kind and what it is about)
ZOO: dict[str, tuple[Maker, list[str], set[tuple[str, str]]]] = {
    "ResNet-18": (resnet18, ["conv1", "bn1", "layer[1-3]"], set()),
    "MobileNetV3": (_vision("mobilenet_v3_small"), ["features"], set()),
    "DenseNet": (
        _vision("DenseNet", growth_rate=8, block_config=(2, 2), num_init_features=16),
        ["features.denseblock1", "features.conv0", "features.norm0"],
        set(),
    ),
    "EfficientNet, a frozen tail": (_vision("efficientnet_b0"), ["features.[5-8]"], set()),
    "Swin": (
        _vision(
            "SwinTransformer",
            patch_size=[4, 4],
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=[4, 4],
        ),
        ["features.[0-2]"],
        set(),
    ),
    "ViT": (vit, ["conv_proj", "class_token", "encoder"], set()),
    "a feature pyramid on a ResNet with frozen norms": (fpn, ["body"], set()),
    "BERT, masked words": (bert, ["bert"], HALF),
    "BERT, classes": (
        _language("Bert", "ForSequenceClassification", **SMALL),
        ["bert.embeddings", "bert.encoder.layer.0"],
        set(),
    ),
    "DistilBERT": (
        _language(
            "DistilBert", "ForSequenceClassification", dim=32, n_layers=2, n_heads=4, hidden_dim=64
        ),
        ["distilbert"],
        set(),
    ),
    "GPT-2": (gpt2, ["transformer.w?e", "transformer.h.0"], set()),
    "Llama": (
        _language("Llama", "ForCausalLM", num_key_value_heads=2, **SMALL),
        ["model.embed_tokens", "model.layers.0"],
        set(),
    ),
    "T5": (
        _language(
            "T5",
            "ForConditionalGeneration",
            d_model=32,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            d_kv=8,
            decoder_start_token_id=0,
        ),
        ["encoder.block"],
        set(),
    ),
    "Whisper": (whisper, ["model.encoder"], set()),
    "Wav2Vec2": (speech("Wav2Vec2"), ["feature_extractor"], UNMASKED),
    "HuBERT": (speech("Hubert"), ["feature_extractor", "feature_projection"], UNMASKED),
    "ViTMAE": (masked_autoencoder, ["vit"], set()),
    "CLIP": (clip, ["vision_model"], set()),
    "LSTM": (
        lambda: (Recurrent(nn.LSTM, num_layers=2, dropout=0.1), (IDS,)),
        ["embed", "cell"],
        set(),
    ),
}


def _loss_of_all(model: Any, example: Any) -> Any:
    """A loss over every output of the model, so that everything that can train does."""
    out = model(**example) if isinstance(example, dict) else model(*example)
    tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
    return sum(t.float().square().mean() for t in tensors)


def _told(model: Any, optimizer: Any) -> set[tuple[str, str]]:
    return {(f.kind, f.parameter) for f in audit(model, optimizer) if f.level != "info"}


@pytest.mark.parametrize("case", ZOO)
def test_a_correct_freeze_raises_no_alarm_on(case: str) -> None:
    make, what, expected = ZOO[case]
    torch.manual_seed(0)
    model, example = make()
    model.train()
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.01, momentum=0.9)
    result = freeze(model, *what)
    for _ in range(2):
        optimizer.zero_grad()
        _loss_of_all(model, example).backward()
        assert _told(model, optimizer) == expected
        optimizer.step()
    assert _told(model, optimizer) == expected
    flow = report(model, optimizer, example=example).flow
    unused = {name for kind, name in expected if kind == "no gradient"}
    assert all(name in flow.sentence for name in unused)
    assert ("trainable parameter" in flow.sentence) == bool(unused)
    assert "raises" not in flow.sentence and flow.skipped + flow.crossed > 0
    # Unfrozen parameters have no gradient until the next backward.
    unfreeze(model, *(p for n, p in model.named_parameters() if n in result.changed))
    expected = expected - HALF
    assert _told(model, optimizer) == expected
    optimizer.zero_grad()
    _loss_of_all(model, example).backward()
    assert _told(model, optimizer) == expected


# name: (model, what the optimizer owns, how many parameters it does not)
PARTLY_OWNED: dict[str, tuple[Maker, str, int]] = {
    "ResNet-50, of which the head is owned": (resnet50, "fc.", 159),
    "BERT of two layers, of which the head is owned": (
        _language("Bert", "ForSequenceClassification", **SMALL),
        "classifier.",
        39,
    ),
    "ResNet-50, of which all but the biases is owned": (resnet50, ".weight", 54),
}


@pytest.mark.parametrize("case", PARTLY_OWNED)
def test_audit_says_in_a_few_lines_what_is_wrong_with_many_parameters_of(case: str) -> None:
    make, owned, count = PARTLY_OWNED[case]
    model, _ = make()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if owned in n], lr=0.1)
    found = [f for f in audit(model, optimizer) if f.kind == "unowned"]
    assert 1 <= len(found) <= 8
    names = [name for finding in found for name in finding.names]
    assert set(names) == {n for n, _ in model.named_parameters() if owned not in n}
    assert len(names) == count
    modules = dict(model.named_modules())
    for finding in found:
        if len(finding.names) > 1:
            assert finding.parameter in modules
            assert f"has {len(finding.names)}" in finding.sentence


def whisper() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=20,
        num_mel_bins=4, max_source_positions=8, max_target_positions=8, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    example = {"input_features": torch.randn(1, 4, 16), "labels": torch.arange(3, 8)[None]}
    return transformers.WhisperForConditionalGeneration(config), lambda m: m(**example).loss


def vit_mae() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=16,
    )  # fmt: skip
    image = torch.randn(1, 3, 8, 8)
    return transformers.ViTMAEForPreTraining(config), lambda m: m(image).loss


def faster_rcnn() -> Any:
    detection = pytest.importorskip("torchvision").models.detection
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=3
    )
    model = detection.FasterRCNN(backbone, num_classes=2, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    image = torch.rand(3, 64, 64)
    return model, lambda m: sum(m([image], [target]).values())


# name: (model and loss, how many parameters it keeps frozen, groups that a schedule may take)
KEEPING: dict[str, tuple[Callable[[], Any], int, list[Any]]] = {
    "Whisper": (
        whisper,
        1,
        [
            [f"model.encoder.{part}" for part in ("conv1", "conv2", "embed_positions")],
            ["model.encoder.layers", "model.encoder.layer_norm"],
            "model.decoder",
        ],
    ),
    "ViTMAE": (vit_mae, 2, ["vit", "decoder"]),
    "Faster R-CNN": (faster_rcnn, 5, ["backbone", ["rpn", "roi_heads"]]),
}


@pytest.mark.parametrize("case", KEEPING)
def test_what_the_model_itself_keeps_frozen_stays_frozen_on(case: str) -> None:
    make, count, groups = KEEPING[case]
    torch.manual_seed(0)
    model, loss = make()
    own = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(own) == count
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = FrozenAwareSGD(model.parameters(), lr=0.01, weight_decay=0.1)

    def check_and_step() -> None:
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == own
        optimizer.zero_grad()
        loss(model.train()).backward()
        optimizer.step()
        assert {n for n, p in model.named_parameters() if torch.equal(p, before[n])} >= own

    freeze(model)
    noted = unfreeze(model).notes[0]
    assert min(own) in noted or " more were frozen before" in noted
    check_and_step()
    schedule = gradual_unfreeze(model, groups)
    for _ in groups:
        schedule.step()
        assert not own & {n for n, p in model.named_parameters() if p.requires_grad}
    check_and_step()
    freeze_except(model, groups[-1])
    with frozen(model):
        unfreeze(model)
        check_and_step()
    unfreeze(copy.deepcopy(model), groups)
    unfreeze(model, groups)
    check_and_step()
    unfreeze(model, *own)
    assert all(p.requires_grad for p in model.parameters())
