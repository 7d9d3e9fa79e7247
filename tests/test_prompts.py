"""Prompts of DCP and MAP on open_clip's towers, against slow transcriptions of the two papers' algorithms."""

import copy
import pickle
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from roads import UNTRAINED
from torch import nn

from protohead import attach
from protohead.adapters.towers import tower_widths
from protohead.prompts import DcpPrompts, MapPrompts

pytestmark = UNTRAINED

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 32, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 9, "vocab_size": 64, "width": 24, "heads": 2, "layers": 4},
}
WIDTHS = {"image": 32, "text": 24}
PRESENT = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 0], [0, 1]]).bool()
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
MAKE = {
    "dcp": partial(DcpPrompts, WIDTHS, length=6, depth=3),
    "map": partial(MapPrompts, WIDTHS, length=2, depth=3),
}
BOTH = pytest.mark.parametrize("kind", MAKE)


def tiny(seed=0, **text):
    """A CLIP whose frozen weights are not special anywhere: norms have weights, and so have zero biases."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(**{**SIZES, "text_cfg": {**SIZES["text_cfg"], **text}})
    with torch.no_grad():
        for p in clip.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return clip


def prompted(kind="dcp", clip=None, **options):
    clip = tiny() if clip is None else clip
    torch.manual_seed(1)
    prompts = MAKE[kind]() if isinstance(kind, str) else kind
    with torch.no_grad():
        for p in prompts.parameters():  # Larger than they start, so that they show.
            p.add_(0.3 * torch.randn_like(p))
    return attach(clip, 5, prompts=prompts, **options)


def batch(rows=6, seed=2):
    torch.manual_seed(seed)
    text = torch.randint(1, 60, (rows, 9))
    text[torch.arange(rows), torch.randint(2, 9, (rows,))] = 63  # The end of the text: the highest id.
    return {"image": torch.randn(rows, 3, 32, 32), "text": text}


# -- the algorithms, one row at a time --------------------------------------------------------------------------------


def mlp(x, first, second):
    return second(F.gelu(first(x)))


def attend(query, tokens, attention):
    """One head: softmax(q k' / sqrt(d)) v."""
    q, k, v = (
        x @ w.T + b
        for x, w, b in zip(
            (query, tokens, tokens), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
        )
    )
    weights = (q @ k.T / q.shape[1] ** 0.5).softmax(1)
    return attention.out_proj(weights @ v)


def image_tokens(visual, image):
    patches = visual.conv1(image[None])[0].flatten(1).T
    return visual.ln_pre(torch.cat([visual.class_embedding[None], patches]) + visual.positional_embedding)


def text_tokens(clip, ids):
    return clip.token_embedding(ids) + clip.positional_embedding


def lower_triangular(size):
    return torch.full((size, size), -torch.inf).triu(1)


def image_feature(visual, x, position):
    return visual.ln_post(x[position]) @ visual.proj


def text_feature(clip, x, ids, skip):
    return (clip.ln_final(x[skip:])[ids.argmax()]) @ clip.text_projection


def dcp_row(clip, p, modality, missing, row):
    """DCP.md, section Algorithm: the feature of one row whose other modality is missing, or not."""
    t, depth = p.length // 3, p.depth
    text_missing, image_missing = missing == "text", missing == "image"
    v = p.static["image"][1 if image_missing else 0]
    s = p.static["text"][1 if text_missing else 0]
    c = p.common[1 if text_missing else 2 if image_missing else 0]
    staged = []
    for j in range(depth):
        z = torch.cat([v, s], dim=1)
        norm_v, *layers_v = p.stages["image"][j]
        norm_s, *layers_s = p.stages["text"][j]
        v, s = mlp(norm_v(z), layers_v[0], layers_v[2]), mlp(norm_s(z), layers_s[0], layers_s[2])
        staged.append(v if modality == "image" else s)
    common = mlp(c, p.common_projection[modality][0], p.common_projection[modality][2])
    tokens = image_tokens(clip.visual, row) if modality == "image" else text_tokens(clip, row)
    query = p.dynamic[modality][0 if missing is None else 1]
    dynamic = attend(query, tokens, p.attention[modality])
    x = torch.cat([staged[0], common, dynamic, tokens])
    mask = None if modality == "image" else lower_triangular(len(x))
    tower = clip.visual.transformer if modality == "image" else clip.transformer
    lengths = []
    for j, block in enumerate(tower.resblocks):
        if 1 <= j < depth:
            x = torch.cat([staged[j], x[t:]])
        x = block(x[None], attn_mask=mask)[0]
        lengths.append(len(x))
    if modality == "image":
        return image_feature(clip.visual, x, 3 * t), lengths
    return text_feature(clip, x, row, 3 * t), lengths


def map_row(clip, p, modality, missing, row):
    """MAP.md, section On open_clip towers: the same at the input level."""
    table = p.prompts[modality][0 if missing is None else 1]
    x = image_tokens(clip.visual, row) if modality == "image" else text_tokens(clip, row)
    tower = clip.visual.transformer if modality == "image" else clip.transformer
    lengths = []
    for j, block in enumerate(tower.resblocks):
        if j < len(table):
            x = torch.cat([table[j], x])
        x = block(x[None], attn_mask=None if modality == "image" else lower_triangular(len(x)))[0]
        lengths.append(len(x))
    added = table.shape[0] * table.shape[1]
    if modality == "image":
        return image_feature(clip.visual, x, added), lengths
    return text_feature(clip, x, row, added), lengths


ROWS = {"dcp": dcp_row, "map": map_row}


def slow_features(model, kind, inputs, present):
    clip, p = model.encoders["image+text"].towers.clip, model.encoders["image+text"].prompts
    features = {name: torch.zeros(len(present), 16) for name in ("image", "text")}
    lengths = {}
    for i, (has_image, has_text) in enumerate(present.tolist()):
        if has_image:
            features["image"][i], lengths["image"] = ROWS[kind](
                clip, p, "image", None if has_text else "text", inputs["image"][i]
            )
        if has_text:
            features["text"][i], lengths["text"] = ROWS[kind](
                clip, p, "text", None if has_image else "image", inputs["text"][i]
            )
    return features, lengths


def gradients(model, features):
    model.zero_grad()
    torch.manual_seed(3)
    sum((x * torch.randn_like(x)).sum() for x in features.values()).backward()
    return {name: p.grad.clone() for name, p in model.encoders.named_parameters() if p.grad is not None}


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@BOTH
def test_features_and_gradients_are_those_of_the_paper(kind):
    model, inputs = prompted(kind), batch()
    expected, _ = slow_features(model, kind, inputs, PRESENT)
    slow = gradients(model, expected)
    got = model.encode(inputs, PRESENT)
    fast = gradients(model, got)
    assert all(grad.abs().sum() > 0 for grad in slow.values())
    close({name: x.detach() for name, x in got.items()}, {name: x.detach() for name, x in expected.items()})
    assert fast.keys() == slow.keys()
    for name, grad in slow.items():
        torch.testing.assert_close(fast[name], grad, rtol=1e-4, atol=1e-4, msg=name)


def sequence_lengths(blocks, run):
    """How many tokens each block was given, and which mask."""
    seen = []
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0].shape[1], kwargs["attn_mask"])), with_kwargs=True
        )
        for block in blocks
    ]
    run()
    for hook in hooks:
        hook.remove()
    return seen


@BOTH
def test_sequence_lengths_and_masks(kind):
    model, inputs = prompted(kind), batch()
    clip = model.encoders["image+text"].towers.clip
    _, lengths = slow_features(model, kind, inputs, PRESENT)
    run = partial(model.encode, inputs, PRESENT)
    images = sequence_lengths(clip.visual.transformer.resblocks, run)
    texts = sequence_lengths(clip.transformer.resblocks, run)
    assert images == [(length, None) for length in lengths["image"]]
    assert [length for length, _ in texts] == lengths["text"]
    assert all(torch.equal(mask, lower_triangular(length)) for length, mask in texts)
    assert (
        lengths
        == {
            "dcp": {"image": [11] * 4, "text": [15] * 4},
            "map": {"image": [7, 9, 11, 11], "text": [11, 13, 15, 15]},
        }[kind]
    )


@pytest.mark.parametrize(("kind", "added"), [("dcp", [36] * 6), ("map", [16, 32, 48, 64, 80, 96])])
def test_published_lengths(kind, added):
    """Of ViT-B/16's depth and lengths, with narrow towers: text 77 -> 113, image + 36; MAP + 96."""
    clip = open_clip.CLIP(
        16,
        {"image_size": 32, "layers": 7, "width": 8, "head_width": 8, "patch_size": 8},
        {"context_length": 77, "vocab_size": 64, "width": 8, "heads": 1, "layers": 7},
    )
    model = attach(clip, 5, prompts=kind)
    text = torch.randint(1, 60, (2, 77))
    run = partial(model.encode, {"image": torch.randn(2, 3, 32, 32), "text": text})
    images = sequence_lengths(clip.visual.transformer.resblocks, run)
    texts = sequence_lengths(clip.transformer.resblocks, run)
    assert [length for length, _ in images] == [17 + n for n in [*added, added[-1]]]
    assert [length for length, _ in texts] == [77 + n for n in [*added, added[-1]]]


def test_counts_of_dcp_on_vit_b_16():
    with torch.device("meta"):
        clip = open_clip.create_model("ViT-B-16", device="meta")
    model = attach(clip, 5, prompts="dcp")
    prompts = model.encoders["image+text"].prompts
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in prompts.named_children()}
    parts["common"] = prompts.common.numel()
    assert parts["attention"] == 3_412_992
    assert parts["dynamic"] == 30_720
    assert sum(parts.values()) - parts["attention"] - parts["dynamic"] == 2_006_784
    trained = {name: p.numel() for name, p in clip.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[0]: trained[name] for name in trained if "weight" in name} == {
        "visual.ln_post": 768,
        "ln_final": 512,
    }
    assert sum(trained.values()) == 393_216 + 1_536 + 1_024  # As published: text_projection is frozen.
    parts = attach(clip, 5, prompts="map").encoders["image+text"].prompts.named_parameters()
    assert {name: tuple(p.shape) for name, p in parts} == {
        "prompts.image": (2, 6, 16, 768),
        "prompts.text": (2, 6, 16, 512),
    }


@pytest.mark.parametrize("prompts", [DcpPrompts(WIDTHS, 0, 2), MapPrompts(WIDTHS, 0, 2)])
def test_no_prompts_are_the_bare_model(prompts):
    plain, model, inputs = attach(tiny(), 5), prompted(copy.deepcopy(prompts)), batch()
    expected = plain.encode(inputs, PRESENT)
    got = model.encode(inputs, PRESENT)
    close({name: x.detach() for name, x in got.items()}, expected, 1e-6)


@BOTH
def test_unprompted_calls_and_names_are_unchanged(kind):
    plain, clip, inputs = attach(tiny(), 5, trainable="visual.proj"), tiny(), batch()
    names, values = list(clip.state_dict()), copy.deepcopy(clip.state_dict())
    model = prompted(kind, clip, trainable="visual.proj")
    assert list(clip.state_dict()) == names
    assert all(torch.equal(x, values[name]) for name, x in clip.state_dict().items())
    twin = plain.encoders["image+text"].clip
    for _ in range(2):
        assert torch.equal(clip.encode_image(inputs["image"]), twin.encode_image(inputs["image"]))
        assert torch.equal(clip.encode_text(inputs["text"]), twin.encode_text(inputs["text"]))
        model.encode(inputs, PRESENT)
    with pytest.raises(RuntimeError):
        model.encode({"image": torch.randn(2, 4, 32, 32)})  # Nothing is left of a call that failed.
    assert torch.equal(clip.encode_image(inputs["image"]), twin.encode_image(inputs["image"]))
    assert isinstance(clip.transformer, open_clip.transformer.Transformer)


@BOTH
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(kind, twin):
    model, inputs = prompted(kind).eval(), batch()
    expected, other = model(inputs, PRESENT), twin(model)
    assert torch.equal(other(inputs, PRESENT), expected)
    with torch.no_grad():
        for p in other.encoders["image+text"].prompts.parameters():
            p.zero_()
    assert not torch.equal(other(inputs, PRESENT), expected)
    assert torch.equal(model(inputs, PRESENT), expected)


@BOTH
def test_gradient_checkpointing_changes_nothing(kind):
    found = []
    for checkpointing in (False, True):
        model, inputs = prompted(kind), batch()
        model.encoders["image+text"].towers.clip.set_grad_checkpointing(checkpointing)
        first = model.encode(inputs, PRESENT)
        second = model.encode(inputs, PRESENT[[2, 1, 0, 3, 4, 5]])  # Two forwards before a backward.
        found.append((first, gradients(model, {**first, "second": second["image"]})))
    close({name: x.detach() for name, x in found[0][0].items()}, {name: x.detach() for name, x in found[1][0].items()})
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


def test_checkpointing_runs_the_blocks_again_but_not_the_edits():
    model, inputs = prompted(), batch()
    clip, prompts = (getattr(model.encoders["image+text"], name) for name in ("towers", "prompts"))
    clip.clip.set_grad_checkpointing()
    calls = []
    clip.clip.visual.transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append("block"))
    prompts.attention["image"].register_forward_hook(lambda *_: calls.append("edit"))
    model.encode(inputs, PRESENT)["image"].sum().backward()
    assert calls == ["edit", "edit", "block", "block"]


@BOTH
def test_half_precision_towers_and_autocast(kind):
    model, inputs = prompted(kind), batch()
    expected = model(inputs, PRESENT, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs, PRESENT, LABELS)
        F.cross_entropy(logits, LABELS).backward()
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=1.5)
    model.zero_grad()
    model.encoders["image+text"].towers.to(torch.bfloat16)
    prompts = model.encoders["image+text"].prompts
    assert {p.dtype for p in prompts.parameters()} == {torch.float32}
    logits = model(inputs, PRESENT, LABELS)
    assert model.encode(inputs, PRESENT)["image"].dtype == torch.bfloat16
    F.cross_entropy(logits, LABELS).backward()
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=1.5)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in prompts.parameters())


@pytest.mark.filterwarnings("ignore")  # torch's own, from inside the compiler
def test_compile():
    """A tower as one graph; and, as the page in docs says, block by block."""
    model, inputs = prompted(DcpPrompts(WIDTHS, length=3, depth=2), tiny(layers=2)), batch()
    towers = model.encoders["image+text"]
    encode = partial(towers._encode, "text", inputs, None, [2, 4])
    expected, slow = encode(), gradients(model, {"text": encode()})
    compiled = torch.compile(encode, fullgraph=True, backend="aot_eager")()
    close(compiled.detach(), expected.detach())
    torch.testing.assert_close(gradients(model, {"text": compiled}), slow, rtol=1e-4, atol=1e-5)
    logits = model(inputs, PRESENT)
    for block in towers.towers.clip.transformer.resblocks:
        block.compile(fullgraph=True, backend="eager")
    for rows in (6, 4, 5):
        some = {name: x[:rows] for name, x in inputs.items()}
        close(model(some, PRESENT[:rows]).detach(), logits[:rows].detach(), 1e-4)


# -- prompts of one's own ---------------------------------------------------------------------------------------------


class Shallow(nn.Module):
    """Some tokens in front of the first block, others where the other modality is missing."""

    def __init__(self, widths, length=4):
        super().__init__()
        for name, width in widths.items():
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(2, length, width)))

    def forward(self, modality, case):
        prompts = getattr(self, modality)[int(case == modality)]
        return [lambda tokens: torch.cat([prompts.expand(len(tokens), -1, -1), tokens], dim=1)]


def test_a_module_of_ones_own():
    model, inputs = prompted(Shallow(WIDTHS)), batch()
    features = model.encode(inputs, PRESENT)
    visual, table = model.encoders["image+text"].towers.clip.visual, model.encoders["image+text"].prompts.image
    for row, kind in ((0, 0), (1, 1)):
        x = torch.cat([table[kind], image_tokens(visual, inputs["image"][row])])[None]
        for block in visual.transformer.resblocks:
            x = block(x)
        torch.testing.assert_close(features["image"][row], image_feature(visual, x[0], 4), rtol=1e-5, atol=1e-5)
    # With another head, on the features.
    other = nn.Linear(32, 5)
    F.cross_entropy(other(torch.cat([*features.values()], 1)), LABELS).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.encoders["image+text"].prompts.parameters())


class Wrong(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, modality, case):
        return self.function(modality, case)


def more(tokens, count=1):
    return F.pad(tokens, (0, 0, count, 0))


@pytest.mark.parametrize(
    ("prompts", "error", "match"),
    [
        ("dpc", ValueError, r"`prompts` to be among \['dcp', 'map'\], or a module, but got 'dpc'"),
        (more, TypeError, "a name or a module, but got function"),
        ("dcp", ValueError, "at most the 4 blocks of the image tower, but got 6"),
        ("map", ValueError, "at most the 4 blocks of the image tower, but got 6"),
        (DcpPrompts({"image": 24, "text": 32}, 6, 2), ValueError, "'image': 32, 'text': 24.*but got .*'image': 24"),
        (Wrong(lambda m, c: more), TypeError, "return a list of functions, but got function"),
        (Wrong(lambda m, c: [more] * 5), ValueError, "at most the 4 blocks"),
        (Wrong(lambda m, c: [lambda x: x[:, 1:]]), ValueError, r"not fewer than before, but got \(3, 1, 32\)"),
        (Wrong(lambda m, c: [lambda x: x.sum(0)]), ValueError, r"\(n, L, 32\) tokens"),
        (Wrong(lambda m, c: [lambda x: None]), ValueError, "but got NoneType"),
        (Wrong(lambda m, c: [partial(more, count=len(c))]), ValueError, "add as many tokens in both cases"),
    ],
)
def test_refusals(prompts, error, match):
    clip = tiny()
    flags = {name: p.requires_grad for name, p in clip.named_parameters()}
    with pytest.raises(error, match=match):
        attach(clip, 5, prompts=prompts)
    assert type(clip.transformer) is type(clip.visual.transformer) is open_clip.transformer.Transformer
    assert {name: p.requires_grad for name, p in clip.named_parameters()} == flags


def test_other_refusals():
    clip, good = tiny(), MAKE["dcp"]()
    for options in ({"trainable": "nothing"}, {"scale": -1}, {"in_features": {"image": 9, "text": 9}}):
        with pytest.raises(ValueError, match="Expected"):
            attach(clip, 5, prompts=good, **options)
    assert type(clip.transformer) is open_clip.transformer.Transformer
    encoders = {name: nn.Linear(3, 4) for name in ("image", "text", "audio")}
    example = {name: torch.ones(1, 3) for name in encoders}
    with pytest.raises(ValueError, match=r"CLIP, CustomTextCLIP and CoCa .*CLIPModel, SiglipModel.*but got dict"):
        attach(encoders, 5, example=example, prompts="dcp")
    for wrong, match in (
        ({"length": 7}, "multiple of three for DCP, but got 7"),
        ({"length": -3}, "`length` to be a positive integer"),
        ({"depth": 0}, "`depth` to be a positive integer"),
        ({"widths": {"image": 4}}, "'image' and 'text', but got"),
        ({"widths": {"image": 4, "text": 0}}, "positive integer, but got 0"),
    ):
        with pytest.raises(ValueError, match=match):
            DcpPrompts(**{"widths": WIDTHS, **wrong})


def test_widths():
    clip = tiny()
    assert tower_widths(clip) == WIDTHS
    clip.transformer.batch_first = False
    with pytest.raises(ValueError, match="but got CLIP with VisionTransformer"):
        tower_widths(clip)
