"""attach() on real open_clip and transformers classes with random weights, and on mappings of encoders."""

import copy
from types import SimpleNamespace

import open_clip
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from torch import nn

from protohead import DecoupledPrototypeHead, PrototypeClassifier, attach, replace_module

# Most of these heads are scored as they were made, or trained through their logits.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This head is in eval mode"),
    pytest.mark.filterwarnings("ignore:This head is trained through its logits"),
]

PRESENT = torch.tensor([[True, True], [True, False], [False, True]])

# The small ones of each kind: towers of open_clip's own (ViT, ResNet), of timm (ConvNeXt, ViTamin, FastViT, PE),
# CLIP, CustomTextCLIP (SigLIP among them) and CoCa.
OPEN_CLIP = {
    "ViT-S-32": 384,
    "RN50": 1024,
    "convnext_tiny": 1024,
    "vit_medium_patch16_gap_256": 512,
    "MobileCLIP-S1": 512,
    "ViTamin-S": 384,
    "PE-Core-T-16-384": 512,
    "ViT-B-16-SigLIP": 768,
    "coca_ViT-B-32": 512,
}
NEVER_REACHED = ("logit_scale", "logit_bias", "text_decoder.")


def create(name, **options):
    """The model with two layers where it says how many."""
    config = open_clip.get_model_config(name)
    for part in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        if isinstance(config.get(part, {}).get("layers"), int):
            options[part] = {**config[part], "layers": 2}
    return open_clip.create_model(name, **options)


def inputs_of(clip, rows=3):
    torch.manual_seed(0)
    size = clip.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    text = torch.randint(1, 1000, (rows, clip.context_length))
    return {"image": torch.randn(rows, 3, height, width), "text": text}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(name):
    clip = create(name)
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    model = attach(clip, 5, trainable="*")
    assert model.head.in_features == {"image": OPEN_CLIP[name], "text": OPEN_CLIP[name]}
    assert model.head.shared_space
    assert list(model.encoders) == ["image+text"]
    # What the head never reaches stays frozen, and nothing else does.
    frozen = {key for key, p in clip.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, _ in clip.named_parameters() if key.startswith(NEVER_REACHED)}
    assert "logit_scale" in frozen
    inputs = inputs_of(clip)
    model.eval()
    clip.requires_grad_(False)
    with torch.no_grad():
        expected = {"image": clip.encode_image(inputs["image"]), "text": clip.encode_text(inputs["text"])}
        logits = model(inputs, PRESENT)
        torch.testing.assert_close(logits, model.head(expected, PRESENT), rtol=1e-5, atol=2e-5)
    # CoCa leaves a parameter uninitialised, which may be NaN.
    torch.testing.assert_close(dict(clip.state_dict()), before, rtol=0, atol=0, equal_nan=True)


def test_open_clip_trains_what_the_papers_train(tmp_path):
    clip = create("ViT-S-32")
    twin = copy.deepcopy(clip)
    model = attach(clip, 5, trainable=("visual.proj", "*ln_post*", "ln_final.*"))
    names = [name for name, p in clip.named_parameters() if p.requires_grad]
    assert names == [
        "visual.proj",
        "visual.ln_post.weight",
        "visual.ln_post.bias",
        "ln_final.weight",
        "ln_final.bias",
    ]
    assert [m.training for m in (model, clip, clip.visual, clip.visual.ln_post)] == [True] * 4
    assert not any(m.training for m in (*clip.transformer.modules(), *clip.visual.transformer.modules()))
    before = {name: p.clone() for name, p in clip.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs, labels = inputs_of(clip), torch.tensor([0, 1, 2])
    for _ in range(8):
        loss = F.cross_entropy(model(inputs, PRESENT, labels), labels) + 0.9 * model.head.prototype_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) == (name not in names) for name, p in clip.named_parameters())
    assert model.eval()(inputs, PRESENT).argmax(1).tolist() == [0, 1, 2]
    model.save(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 2e6
    other = attach(twin, 5)
    other.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(other.eval()(inputs, PRESENT), model(inputs, PRESENT))
    with pytest.raises(ValueError, match="frozen weights"):
        attach(create("ViT-S-32"), 5).load(tmp_path / "model.safetensors")


def test_frozen_by_default_and_in_eval_mode():
    clip = create("RN50")  # batch norms
    model = attach(clip, 5, margin=0.3)
    assert not any(p.requires_grad for p in clip.parameters())
    assert not any(m.training for m in clip.modules())
    assert model.training
    assert model.head.training
    assert model.head.margin.tolist() == [0.3]
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    model(inputs_of(clip), PRESENT, torch.tensor([0, 1, 2])).sum().backward()
    torch.testing.assert_close(dict(clip.state_dict()), before, rtol=0, atol=0)


def test_rectangular_pictures():
    model = attach(create("ViT-S-32", force_image_size=(64, 96)), 5)
    assert model.head.in_features == {"image": 384, "text": 384}


def test_the_users_order_of_modalities():
    clip = create("ViT-S-32")
    model = attach(clip, 5, in_features={"text": 384, "image": 384}).eval()
    assert model.head.modalities == ("text", "image")
    inputs = inputs_of(clip)
    inputs["text"][1], inputs["image"][2] = 0, float("nan")
    features = model.encode(inputs, PRESENT[:, [1, 0]])
    assert features["image"].isfinite().all()
    assert [bool(x.any()) for x in features["text"]] == [True, False, True]
    with torch.inference_mode():
        assert attach(clip, 5, trainable="visual.proj").encoders["image+text"].clip.visual.proj.requires_grad


def test_class_names_as_prototypes():
    torch.manual_seed(0)
    clip = create("ViT-S-32").eval()
    model = attach(clip, 3)
    prompts = torch.randint(1, 1000, (6, clip.context_length))  # two templates of three names
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    inputs = inputs_of(clip)
    with torch.no_grad():
        names = clip.encode_text(prompts)
        model.head.imprint({"image": names, "text": names}, labels, shrinkage=1)
        model.eval()
        picture_only = torch.tensor([True, False]).expand(3, 2)
        logits = model(inputs, picture_only)
        # As open_clip's own recipe has it: the normalised mean of a class's normalised templates.
        weights = F.normalize(F.normalize(names, dim=1).view(2, 3, -1).mean(0), dim=1)
        expected = F.normalize(clip.encode_image(inputs["image"]), dim=1) @ weights.T
    torch.testing.assert_close(logits, 20 * expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("prompts", [None, "dcp"])
def test_pictures_in_bytes_are_refused(prompts):
    clip = tiny_clip.tiny_clip()[0]
    model = attach(clip, 5, prompts=prompts)
    with pytest.raises(TypeError, match=r"as open_clip's transform makes them, but got torch.uint8"):
        model.encode({"image": torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)})


def test_half_precision_and_gradient_checkpointing_of_open_clip():
    clip = create("ViT-S-32", precision="bf16")
    clip.set_grad_checkpointing()
    model = attach(clip, 5, trainable="visual.proj")
    inputs = inputs_of(clip)
    logits = model(inputs, PRESENT, torch.tensor([0, 1, 2]))
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert clip.visual.proj.grad.abs().sum() > 0


def test_on_the_meta_device():
    with torch.device("meta"):
        clip = create("ViT-S-32", device="meta")
    model = attach(clip, 5)
    assert model.head.in_features == {"image": 384, "text": 384}
    assert all(p.is_meta for p in model.parameters())


# -- transformers -----------------------------------------------------------------------------------------------------

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "projection_size": 32,
    "project_dim": 32,
    "encoder_hidden_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
PATCHES = {**VISION, "num_patches": 16, "patch_size": 4}
GROUPS = {**VISION, "depths": [1, 1], "num_group_tokens": [4, 2], "num_output_groups": [4, 2]}
EFFICIENT = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 32}
TOWERS = {
    "CLIP": (VISION, 16),
    "Siglip": (VISION, 32),
    "Siglip2": (PATCHES, 32),
    "AltCLIP": (VISION, 16),
    "ChineseCLIP": (VISION, 16),
    "CLIPSeg": (VISION, 16),
    "Blip": (VISION, 16),
    "Align": (EFFICIENT, {"image": 32, "text": 16}),
    "Flava": (VISION, 16),
    "GroupViT": (GROUPS, 16),
    "OwlViT": (VISION, 16),
    "Owlv2": (VISION, 16),
    "VisionTextDualEncoder": (VISION, 16),
    "MetaClip2": (VISION, 16),  # transformers 5
    "Aimv2": (VISION, 16),  # transformers 5
}


def two_towers(family):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{family}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {family}Model")
    torch.manual_seed(0)
    vision = TOWERS[family][0]
    config_class = getattr(transformers, f"{family}Config")
    if family == "VisionTextDualEncoder":
        text, vision = transformers.BertConfig(**TEXT), transformers.ViTConfig(**vision)
        config = config_class.from_vision_text_configs(vision, text, projection_dim=16)
    elif family == "Flava":
        config = config_class(image_config=vision, text_config=TEXT, multimodal_config=TEXT, projection_dim=16)
    else:
        config = config_class(text_config=TEXT, vision_config=vision, projection_dim=16)
    return getattr(transformers, f"{family}Model")(config).eval()


def tokens():
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0], [1, 5, 8, 2, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def pictures(family):
    torch.manual_seed(0)
    if family != "Siglip2":
        return {"pixel_values": torch.randn(3, 3, 32, 32)}
    mask = torch.ones(3, 16, dtype=torch.long)
    shapes = torch.tensor([[4, 4], [2, 8], [4, 4]])
    return {"pixel_values": torch.randn(3, 16, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def plain(out):
    out = getattr(out, "pooler_output", out)
    return out if out.dim() == 2 else out[:, 0]


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.filterwarnings("ignore:The `device` argument is deprecated")  # FLAVA in transformers 4
def test_transformers(family):
    backbone = two_towers(family)
    model = attach(backbone, 5, trainable=["*"]).eval()
    wanted = TOWERS[family][1]
    wanted = wanted if isinstance(wanted, dict) else {"image": wanted, "text": wanted}
    assert model.head.in_features == wanted
    assert model.head.shared_space == (wanted["image"] == wanted["text"])
    text, image = tokens(), pictures(family)
    with torch.no_grad():
        features = {
            "image": plain(backbone.get_image_features(**image)),
            "text": plain(backbone.get_text_features(**text)),
        }
        expected = model.head(features, PRESENT)
    logits = model({"image": image, "text": text}, PRESENT)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    # All that is trainable is reached: DDP would stop at what is not.
    logits[:, 0].sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_transformers_with_plain_tensors(family):
    model = attach(two_towers(family), 5).eval()
    image, ids = pictures(family)["pixel_values"], tokens()["input_ids"]
    expected = model({"image": {"pixel_values": image}, "text": {"input_ids": ids}}, PRESENT)
    assert torch.equal(model({"image": image, "text": ids}, PRESENT), expected)


def test_transformers_gradient_checkpointing():
    backbone = two_towers("CLIP")
    model = attach(backbone, 5, trainable="*_model.*")
    inputs, labels = {"image": pictures("CLIP"), "text": tokens()}, torch.tensor([0, 1, 2])
    F.cross_entropy(model(inputs, PRESENT, labels), labels).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    # Its name in transformers 5, and in 4.
    getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)()
    F.cross_entropy(model(inputs, PRESENT, labels), labels).backward()
    assert len(expected) > 20
    for name, grad in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, grad)


def vilt(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {**VISION, **TEXT, "hidden_dropout_prob": 0.0, **options}
    return transformers.ViltModel(transformers.ViltConfig(**config)).eval()


def test_vilt():
    backbone = vilt()
    model = attach(backbone, 5, trainable="*").eval()
    assert model.head.in_features == {"image": 32, "text": 32}
    text, image = tokens(), pictures("Vilt")["pixel_values"]
    inputs = {"image": {"pixel_values": image}, "text": text}
    features = model.encode(inputs, PRESENT)
    # Row by row, with MAP's stand-ins for what is missing.
    for row, (has_image, has_text) in enumerate(PRESENT.tolist()):
        ids = text["input_ids"][row] if has_text else torch.tensor([101, 102, 0, 0, 0])
        pixels = image[row] if has_image else torch.ones(3, 32, 32)
        with torch.no_grad():
            x = backbone(ids[None], (ids > 0).long()[None], pixel_values=pixels[None]).last_hidden_state[0]
        torch.testing.assert_close(features["text"][row], x[0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(features["image"][row], x[5], rtol=1e-5, atol=2e-6)
    logits = model(inputs, PRESENT)
    torch.testing.assert_close(logits, model.head(features, PRESENT), rtol=1e-5, atol=1e-5)
    logits[:, 0].sum().backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_vilt_forms_of_input():
    model = attach(vilt(), 5).eval()
    text, image = tokens(), pictures("Vilt")["pixel_values"]
    inputs = {"image": {"pixel_values": image}, "text": text}
    expected = model(inputs, PRESENT)
    wrong = {"image": torch.where(PRESENT[:, 0, None, None, None], image, float("nan")), "text": text}
    lists = {"image": [image[0], image[1], None], "text": text}
    masked = {"image": {"pixel_values": image, "pixel_mask": torch.ones(3, 32, 32, dtype=torch.long)}, "text": text}
    for other in (wrong, lists, masked):
        torch.testing.assert_close(model(other, PRESENT), expected, rtol=1e-5, atol=2e-5)
    # A missing row does not depend on what the other pictures of its batch are padded to.
    wide = torch.nn.functional.pad(image, (0, 16))
    mask = torch.nn.functional.pad(torch.ones(3, 32, 32, dtype=torch.long), (0, 16))
    padded = model({"image": {"pixel_values": wide, "pixel_mask": mask}, "text": text}, PRESENT)
    torch.testing.assert_close(padded[2], expected[2], rtol=1e-4, atol=1e-4)
    only_text = torch.tensor([[False, True]] * 3)
    some = model({"text": text}, only_text)
    torch.testing.assert_close(some, model({"image": image, "text": text}, only_text), rtol=1e-5, atol=2e-5)
    only_image = torch.tensor([[True, False]] * 3)
    some = model({"image": image}, only_image)
    torch.testing.assert_close(some, model({"image": image, "text": text}, only_image), rtol=1e-4, atol=1e-4)


def test_vilt_tells_what_it_was_not_given():
    model = attach(vilt(), 5).eval()
    text, image = tokens(), pictures("Vilt")["pixel_values"]
    for inputs, error, match in (
        (
            {"image": {"pixels": image}, "text": text},
            ValueError,
            r"'image' to hold 'pixel_values' .*, but got \['pixels'\]",
        ),
        ({"image": image, "text": {"ids": text["input_ids"]}}, ValueError, "'text' to hold 'input_ids'"),
        (
            {"image": image, "text": ["a", "b", "c"]},
            TypeError,
            "list of tensors, or None, for ViLT's 'text', but got str",
        ),
    ):
        with pytest.raises(error, match=match):
            model(inputs, PRESENT)
    assert model({"image": image[:0], "text": {key: x[:0] for key, x in text.items()}}).shape == (0, 5)


def test_vilt_missing_rows_are_the_same_in_any_batch():
    model = attach(vilt(type_vocab_size=2), 5).eval()
    text, image = tokens(), pictures("Vilt")["pixel_values"]
    kinds = [torch.tensor([[0] * 5, [kind] * 5, [0] * 5]) for kind in (0, 1)]
    a, b = (model({"image": image, "text": {**text, "token_type_ids": kind}}, PRESENT) for kind in kinds)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    alone = model({"text": {key: x[2:] for key, x in text.items()}}, PRESENT[2:])
    for size in (16, 32, 48):  # Smaller and larger than ViLT's own 32.
        other = torch.nn.functional.interpolate(image, size=(size, size))
        mask = torch.ones(3, size, size, dtype=torch.long)
        mask[2] = 0  # What stands in the mask of a missing picture does not matter.
        row = model({"image": {"pixel_values": other, "pixel_mask": mask}, "text": text}, PRESENT)[2]
        torch.testing.assert_close(row, alone[0], rtol=1e-4, atol=1e-4)
    one_word = {key: x[:, :1] for key, x in text.items()}
    only = torch.tensor([[True, False]] * 3)
    expected = model({"image": image, "text": text}, only)
    torch.testing.assert_close(model({"image": image, "text": one_word}, only), expected, rtol=1e-4, atol=1e-4)
    half = model.to(torch.bfloat16)({"image": image, "text": text}, PRESENT)
    torch.testing.assert_close(half, a, rtol=0.1, atol=1.0)


def test_vilt_of_another_vocabulary():
    with pytest.raises(ValueError, match=r"empty text is \(101, 102\), but got 99 words"):
        attach(vilt(vocab_size=99), 5)


# -- mappings of encoders ---------------------------------------------------------------------------------------------


def encoders():
    torch.manual_seed(0)
    return {
        "image": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "text": nn.EmbeddingBag(10, 6),
        "audio": nn.Linear(7, 5),
    }


EXAMPLE = {
    "image": torch.zeros(1, 3, 8, 8),
    "text": torch.zeros(1, 4, dtype=torch.long),
    "audio": torch.zeros(1, 7),
}
WIDTHS = {"image": 4, "text": 6, "audio": 5}


def state(modules):
    return {
        f"{name}.{key}": (value.clone(), module.training)
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


@pytest.mark.parametrize(
    "options", [{"in_features": WIDTHS}, {"example": EXAMPLE}, {"in_features": WIDTHS, "example": EXAMPLE}]
)
def test_a_mapping_of_modules(options):
    parts = encoders()
    before = state(parts)
    model = attach(parts, 3, trainable=["audio.*", "image.0.*"], cases=["image+text+audio", "text"], **options)
    assert isinstance(model, PrototypeClassifier)
    assert model.head.in_features == WIDTHS
    assert model.head.cases == ("image+text+audio", "text")
    assert not model.head.shared_space
    trained = [name for name, p in model.encoders.named_parameters() if p.requires_grad]
    assert trained == ["image.0.weight", "image.0.bias", "audio.weight", "audio.bias"]
    assert all(torch.equal(value, before[key][0]) for key, (value, _) in state(parts).items())  # batch norm's, too
    assert [parts["image"][1].training, parts["text"].training, parts["audio"].training] == [False, False, True]
    assert model({"audio": torch.ones(2, 7)}).shape == (2, 3)


def test_an_example_as_lists():
    parts = {"image": nn.Linear(8, 4), "text": lambda words: torch.tensor([[float(len(word))] for word in words])}
    model = attach(parts, 3, example={"image": [torch.zeros(8)], "text": ["a"]})
    assert model.head.in_features == {"image": 4, "text": 1}


def test_an_example_on_the_meta_device():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(7, 5), nn.Linear(7, 5)

        def forward(self, x):
            return self.used(x)

    towers = {"image": Spare(), "text": Spare()}
    attach(towers, 3, example=dict.fromkeys(towers, torch.zeros(1, 7, device="meta")), trainable="*")
    trained = [name for name, p in towers["image"].named_parameters() if p.requires_grad]
    assert trained == ["used.weight", "used.bias"]
    parts = encoders()
    model = attach(parts, 3, example={name: x.to("meta") for name, x in EXAMPLE.items()}, trainable="audio.weight")
    assert model.head.in_features == WIDTHS
    assert not any(p.is_meta for p in model.parameters())
    assert parts["audio"].weight.requires_grad


def test_functions_and_mappings_as_inputs():
    linear = nn.Linear(7, 5)
    example = {"image": torch.zeros(2, 7), "text": {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}}
    model = attach({"image": linear.forward, "text": lambda a, b: a + b}, 3, example=example)
    assert model.head.in_features == {"image": 5, "text": 3}
    assert [name for name, _ in model.encoders.named_parameters()] == ["image.weight", "image.bias"]
    assert not linear.weight.requires_grad


def test_reentrant_checkpoints_hide_nothing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=True)

    model = attach({"image": Checkpointed()}, 3, example={"image": torch.zeros(1, 8)}, trainable="*")
    assert all(p.requires_grad for p in model.parameters())


def test_functions_that_hide_trainable_parameters_are_refused():
    hidden = nn.Linear(8, 4)
    example = {"image": torch.zeros(1, 8)}
    with pytest.raises(ValueError, match="but a function uses others: pass the module"):
        attach({"image": lambda x: hidden(x)}, 3, example=example)
    hidden.requires_grad_(False)
    attach({"image": lambda x: hidden(x)}, 3, example=example)


def test_parameters_that_have_no_shape_yet():
    parts = {"image": nn.Linear(8, 4), "text": nn.LazyLinear(4)}
    with pytest.raises(ValueError, match=r"wait for a first batch: \['text.weight', 'text.bias'\]"):
        attach(parts, 3, in_features={"image": 4, "text": 4})
    assert parts["image"].weight.requires_grad


def test_integer_parameters_stay_frozen():
    part = nn.Linear(8, 4)
    part.register_parameter("codes", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    for options in ({"in_features": {"image": 4}}, {"example": {"image": torch.zeros(1, 8)}}):
        attach({"image": part}, 3, trainable="*", **options)
        assert [p.requires_grad for p in part.parameters()] == [True, True, False]


def test_parameters_that_no_feature_depends_on():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def image(self, x):
            return self.used(x)

        def text(self, x):
            return 2 * self.used(x)

    towers = Towers()
    example = {"image": torch.zeros(1, 4), "text": torch.zeros(1, 4)}
    attach({"image": towers.image, "text": towers.text}, 3, example=example, trainable="image.*")
    assert [name for name, p in towers.named_parameters() if p.requires_grad] == ["used.weight", "used.bias"]
    with pytest.raises(ValueError, match=r"that the head reaches, but got \['text.unused.weight'\]"):
        attach({"image": towers.image, "text": towers.text}, 3, example=example, trainable="text.unused.weight")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "Expected `in_features` or `example`"),
        ({"example": {"image": EXAMPLE["image"]}}, ValueError, "inputs of 'text' in every row, but it lacks some"),
        ({"example": {**EXAMPLE, "audio": [None]}}, ValueError, "inputs of 'audio' in every row"),
        ({"example": EXAMPLE, "trainable": 3}, TypeError, "`trainable` to be a string or several, but got int"),
        ({"example": EXAMPLE, "trainable": ["*", 3]}, TypeError, "but got list of something else"),
        ({"example": {**EXAMPLE, "audio": torch.zeros(2, 7)}}, ValueError, "'audio': 2"),
        ({"example": {**EXAMPLE, "audio": torch.zeros(1, 6)}}, RuntimeError, "shapes cannot be multiplied"),
        ({"example": EXAMPLE, "in_features": {**WIDTHS, "text": 9}}, ValueError, r"'text': 6.*, but got .*'text': 9"),
        ({"example": EXAMPLE, "in_features": {"image": 6, "text": 4, "audio": 5}}, ValueError, "`in_features` to be"),
        ({"in_features": {"image": 4}}, ValueError, r"\('image',\), but got \('image', 'text', 'audio'\)"),
        ({"example": EXAMPLE, "trainable": "adio.*"}, ValueError, "'adio.*' matches none; nearest: .*'audio.bias'"),
        ({"example": EXAMPLE, "trainable": ["audio.*", "nothing"]}, ValueError, "'nothing' matches none"),
        ({"example": EXAMPLE, "margin": 30}, ValueError, "`margin`"),
        ({"example": EXAMPLE, "prototype_weight": 0.9}, ValueError, "MAP and DCP only"),
        ({"example": EXAMPLE, "color": "red"}, TypeError, "color"),
    ],
)
def test_a_failure_leaves_everything_as_it_was(options, error, match):
    parts = encoders()
    parts["text"].eval()
    parts["audio"].bias.requires_grad_(False)
    before = state(parts)
    with pytest.raises(error, match=match):
        attach(parts, 3, **options)
    assert all(
        torch.equal(value, before[key][0]) and mode == before[key][1] for key, (value, mode) in state(parts).items()
    )
    assert [name for name, p in parts["audio"].named_parameters() if p.requires_grad] == ["weight"]
    assert all(p.requires_grad for p in parts["image"].parameters())


def test_attach_under_no_grad_finds_the_same():
    with torch.no_grad():
        model = attach(encoders(), 3, example=EXAMPLE, trainable="audio.*")
    assert model.encoders.audio.weight.requires_grad


@pytest.mark.parametrize("num_classes", [0, 2.5, None])
def test_number_of_classes(num_classes):
    with pytest.raises(ValueError, match="`num_classes` to be a positive integer"):
        attach(encoders(), num_classes, in_features=WIDTHS)


def test_an_object_that_fits_none_is_told_what_was_looked_for():
    with pytest.raises(TypeError) as caught:
        attach(nn.Linear(3, 3), 5)
    message = str(caught.value)
    assert "but got Linear" in message
    for part in (
        "encode_image",
        "get_image_features",
        "`transformer.norm`",
        "`model.image_encoder`",
        "mapping of modality name to encoder",
    ):
        assert part in message


def test_what_is_not_quite_a_backbone():
    clip = create("ViT-S-32")
    with pytest.raises(TypeError, match=r"but got PrototypeClassifier. It has a head: `model.head.reset"):
        attach(attach(clip, 5), 7)
    with pytest.raises(TypeError, match=r"but got tuple. A function that makes models may return more"):
        attach((clip, None, None), 5)


def test_a_model_whose_own_example_fails():
    broken = SimpleNamespace(
        encode_image=lambda x: x,
        encode_text=lambda x: x,
        visual=SimpleNamespace(image_size=8),
        context_length=4,
        parameters=lambda: iter([torch.zeros(1)]),
        named_parameters=lambda: iter([]),
    )
    with pytest.raises(ValueError, match=r"cannot be tried on inputs made for it .*: give `example`"):
        attach(broken, 5)


# -- replace_module ---------------------------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    parts = {"body": nn.Sequential(nn.Linear(9, 7), nn.Sequential(nn.ReLU(), nn.Linear(7, 4)))}
    return nn.ModuleDict({**parts, "heads": nn.ModuleList([nn.Linear(4, 2), nn.Linear(7, 5)])})


@pytest.mark.parametrize("path", ["body.1.1", "heads.1"])
def test_replace_module(path):
    model = classifier().eval()
    old, others = model.get_submodule(path), dict(model.named_modules())
    head = DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5)
    assert replace_module(model, path, head) is old
    assert model.get_submodule(path) is head
    assert not head.training
    assert next(name for name, m in model.named_modules() if m is not others.get(name)) == path
    assert set(dict(model.named_children())) == {"body", "heads"}


def test_replace_module_in_a_model_that_runs():
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
    replace_module(model, "1", DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5))
    x = torch.randn(2, 9)
    assert torch.equal(model(x), model[1](model[0](x)))


@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("heds.1", ValueError, r"in ModuleDict, but got 'heds.1'; nearest: \['heads.1'"),
        ("heads.2", ValueError, "nearest: .*'heads.1'"),
        ("heads.1.weight", ValueError, "nearest"),
        ("", ValueError, "got ''"),
        ("body.1.1.x", ValueError, "'body.1.1'"),
        ("heads.0", ValueError, r"a head of 4 features at 'heads.0', but got \{'image': 4, 'text': 3\}"),
    ],
)
def test_replace_module_wrong_paths(path, error, match):
    model = classifier()
    before = repr(model)
    with pytest.raises(error, match=match):
        replace_module(model, path, DecoupledPrototypeHead({"image": 4, "text": 3}, num_classes=5))
    assert repr(model) == before
    with pytest.raises(TypeError, match="to be a module and a string, but got function and str"):
        replace_module(model, "heads.1", lambda x: x)
