"""Prompts on the kinds of towers that open_clip and transformers have, against hooks that do the same in a slow way."""

import copy
import pickle

import open_clip
import pytest
import torch
from roads import UNTRAINED
from test_attach import PATCHES, TEXT, VISION, create
from torch import nn

from protohead import attach
from protohead.adapters.towers import tower_widths
from protohead.prompts import Blocks, DcpPrompts, MapPrompts

pytestmark = UNTRAINED

PRESENT = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]]).bool()
IMAGE = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
WORDS = {"context_length": 9, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2}
# What differs from CLIP's usual towers: of the image, of the text, and which model.
KINDS = {
    "CLIP": ({}, {}, "CLIP"),
    "average pooling": ({"pool_type": "avg", "final_ln_after_pool": True}, {}, "CLIP"),
    "no first norm": ({"no_ln_pre": True, "pos_embed_type": "sin_cos_2d"}, {}, "CLIP"),
    "layer scale": ({"ls_init_value": 0.5}, {"ls_init_value": 0.5}, "CLIP"),
    "patch dropout": ({"patch_dropout": 0.5}, {}, "CLIP"),
    "attentional pooling": ({"attentional_pool": True, "attn_pooler_heads": 2, "pool_type": "tok"}, {}, "CLIP"),
    "custom blocks": ({"qk_norm": True}, {"qk_norm": True}, "CLIP"),
    "last token": ({}, {"pool_type": "last"}, "CLIP"),
    "first token": ({}, {"pool_type": "first", "no_causal_mask": True}, "CLIP"),
    "end token": ({}, {"pool_type": "eos", "eos_id": 63}, "CLIP"),
    "apart": ({}, {}, "CustomTextCLIP"),
    "padding": ({}, {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "first"}, "CustomTextCLIP"),
    "CoCa": ({"output_tokens": True}, {"embed_cls": True, "output_tokens": True}, "CoCa"),
}


def build(kind):
    image, text, family = KINDS[kind]
    text = dict(text)
    padded = text.pop("use_pad_mask", False)  # Of TextTransformer alone: no configuration has it.
    torch.manual_seed(0)
    options = {"quick_gelu": True, "vision_cfg": {**IMAGE, **image}, "text_cfg": {**WORDS, **text}}
    if family == "CoCa":
        options["multimodal_cfg"] = {"context_length": 9, "vocab_size": 64, "width": 24, "heads": 2, "layers": 1}
    clip = getattr(open_clip, family)(16, **options)
    if padded:
        clip.text.use_pad_mask = True
    with torch.no_grad():
        for p in clip.parameters():
            p.copy_(p.nan_to_num() + 0.1 * torch.randn_like(p))
    return clip


def batch():
    torch.manual_seed(2)
    text = torch.randint(1, 60, (4, 9))
    for row, end in enumerate((4, 8, 2, 6)):
        text[row, end], text[row, end + 1 :] = 63, 0
    return {"image": torch.randn(4, 3, 32, 32), "text": text}


class Slow:
    """Prompts before the first block alone, by hooks on a stack of blocks that is as its library made it."""

    def __init__(self, stack, prompts, causal, valid):
        self.prompts, self.causal, self.valid = prompts, causal, valid
        self.hooks = [
            stack.register_forward_pre_hook(self.before, with_kwargs=True),
            stack.register_forward_hook(self.after),
        ]

    def before(self, _, args, kwargs):
        key = "inputs_embeds" if "inputs_embeds" in kwargs else "x"
        tokens = kwargs[key] if key in kwargs else args[0]
        count, size = len(self.prompts), tokens.shape[1]
        valid = [True] * size if self.valid is None else self.valid
        # By definition: what each sees. Prompts come first; all see them but the prompts before them in a causal tower.
        mask = torch.full((count + size, count + size), -torch.inf)
        for q in range(count + size):
            for k in range(count + size):
                if (k < count or valid[k - count]) and (not self.causal or k <= q):
                    mask[q, k] = 0.0
        tokens = torch.cat([self.prompts[None], tokens], dim=1)
        if key == "x":
            return (tokens, mask), {}
        kwargs = {k: x for k, x in kwargs.items() if k != "causal_attention_mask"}  # Of transformers 4: `mask` has it.
        return (), {**kwargs, "inputs_embeds": tokens, "attention_mask": mask[None, None]}

    def after(self, _, args, out):
        if isinstance(out, torch.Tensor):
            return out[:, len(self.prompts) :]
        out.last_hidden_state = out.last_hidden_state[:, len(self.prompts) :]
        return out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def check(model, plain, inputs, stacks, causal, valid):
    """The features of prompts in the first block against those of the hooks, row by row."""
    prompts = model.encoders["image+text"].prompts.prompts
    got = model.eval().encode(inputs, PRESENT)
    for m, (name, stack) in enumerate(stacks.items()):
        for row in range(4):
            if not PRESENT[row, m]:
                assert not got[name][row].any()
                continue
            case = 0 if PRESENT[row].all() else 1
            kept = valid(inputs[name], row) if name == "text" else None
            with Slow(stack, prompts[name][case, 0], causal and name == "text", kept), torch.no_grad():
                x = inputs[name]
                one = {k: v[row : row + 1] for k, v in x.items()} if isinstance(x, dict) else x[row : row + 1]
                expected = plain.encode({name: one}, torch.tensor([[name == "image", name == "text"]]))[name]
            torch.testing.assert_close(got[name][row].detach(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_open_clip(kind):
    clip, inputs = build(kind), batch()
    plain = attach(copy.deepcopy(clip), 5).eval()
    twin = plain.encoders["image+text"].clip
    torch.manual_seed(1)
    prompts = MapPrompts(tower_widths(clip), length=3, depth=1)
    model = attach(clip, 5, prompts=prompts)
    trained = {name.removeprefix("text.") for name, p in clip.named_parameters() if p.requires_grad}
    norms = {f"{norm}.{p}" for norm in ("visual.ln_post", "ln_final") for p in ("weight", "bias")}
    assert trained == norms | {"visual.proj"}
    with torch.no_grad():
        for p in prompts.parameters():
            p.mul_(30)
    text = getattr(twin, "text", twin)
    causal = text.attn_mask is not None
    sees_padding = not getattr(text, "use_pad_mask", False) and getattr(text, "cls_emb", None) is None

    def valid(ids, row):
        if sees_padding:
            return None
        there = (ids[row] != 0).tolist()
        return [True, *there] if getattr(text, "cls_emb", None) is not None else there  # CoCa's own slip of one place.

    stacks = {"image": twin.visual.transformer, "text": text.transformer}
    check(model, plain, inputs, stacks, causal, valid)
    # Deeper prompts, gradients, and checkpointing.
    model = attach(clip, 5, prompts=DcpPrompts(tower_widths(clip), length=3, depth=2))
    if kind == "patch dropout":
        model.encoders["image+text"].towers.clip.visual.patch_dropout.prob = 0.0
    found = []
    for checkpointing in (False, True):
        clip.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        model.train()(inputs, PRESENT)[:, 0].sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 20
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("name", ["RN50", "convnext_tiny", "ViT-B-16-SigLIP"])
def test_towers_of_other_kinds_are_refused(name):
    with torch.device("meta"):
        clip = create(name, device="meta")
    with pytest.raises(ValueError, match=r"CoCa whose towers are its own transformers .*SigLIP|.*but got C.*with .*M"):
        attach(clip, 5, prompts="dcp")


def test_masks_of_other_forms_grow():
    blocks = Blocks()
    short = torch.tensor([[1, 1, 0]])  # Of flash attention.
    assert blocks._grow(short, 2).tolist() == [[1, 1, 1, 1, 0]]
    assert blocks._grow(short.bool()[:, None, None], 2)[0, 0].int().tolist() == [[1, 1, 1, 1, 0]]
    assert blocks._grow(short.bool()[:, None].expand(1, 3, 3), 1).int().tolist() == [[[1, 1, 1, 0]] * 4]


# -- transformers -----------------------------------------------------------------------------------------------------


def two_towers(family, attention="sdpa"):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, "hidden_size": 24, "projection_size": 32, "num_attention_heads": 2},
        vision_config=PATCHES if family == "Siglip2" else VISION,
        projection_dim=16,
        attn_implementation=attention,
    )
    model = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def hf_batch(family):
    torch.manual_seed(3)
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0], [1, 5, 8, 2, 0], [1, 7, 3, 9, 2]])
    text = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    if family != "Siglip2":
        return {"image": {"pixel_values": torch.randn(4, 3, 32, 32)}, "text": text}
    mask = torch.ones(4, 16, dtype=torch.long)
    shapes = torch.tensor([[4, 4], [2, 8], [4, 4], [4, 4]])
    return {
        "image": {"pixel_values": torch.randn(4, 16, 48), "pixel_attention_mask": mask, "spatial_shapes": shapes},
        "text": text,
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["CLIP", "Siglip", "Siglip2"])
def test_transformers(family, attention):
    backbone, inputs = two_towers(family, attention), hf_batch(family)
    plain = attach(copy.deepcopy(backbone), 5).eval()
    twin = plain.encoders["image+text"]
    prompts = MapPrompts(tower_widths(backbone), length=3, depth=1)
    model = attach(backbone, 5, prompts=prompts)
    with torch.no_grad():
        for p in prompts.parameters():
            p.mul_(30)
    stacks = {"image": twin.vision_model.encoder, "text": twin.text_model.encoder}

    def valid(x, row):
        return x["attention_mask"][row].bool().tolist()

    check(model, plain, inputs, stacks, family == "CLIP", valid)
    if family == "CLIP":  # Without a mask transformers makes none: is_causal must hold for the longer sequence.
        inputs["text"] = {"input_ids": inputs["text"]["input_ids"]}
        check(model, plain, inputs, stacks, True, lambda x, row: None)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    norms = {f"vision_model.post_layernorm.{p}" for p in ("weight", "bias")}
    norms |= {f"text_model.final_layer_norm.{p}" for p in ("weight", "bias")}
    assert trained == norms | ({"visual_projection.weight"} if family == "CLIP" else set())


@pytest.mark.parametrize("family", ["CLIP", "Siglip", "Siglip2"])
def test_transformers_training(family):
    backbone, inputs = two_towers(family), hf_batch(family)
    twin, names = copy.deepcopy(backbone), list(backbone.state_dict())
    model = attach(backbone, 5, prompts=DcpPrompts(tower_widths(backbone), length=3, depth=2))
    model.eval()
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(inputs, PRESENT), model(inputs, PRESENT))
    model.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:  # Its name in transformers 5, and in 4.
            getattr(backbone, "activation_checkpointing_enable", backbone.gradient_checkpointing_enable)()
        calls = []
        layer = backbone.vision_model.encoder.layers[0]
        hook = layer.layer_norm1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.zero_grad()
        model(inputs, PRESENT)[:, 0].sum().backward()
        hook.remove()
        assert len(calls) == 1 + checkpointing  # Although frozen layers are in eval mode.
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 20
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert list(backbone.state_dict()) == names
    with torch.no_grad():
        a, b = (x.requires_grad_(False).eval().get_image_features(**inputs["image"]) for x in (backbone, twin))
    a, b = (getattr(x, "pooler_output", x) for x in (a, b))
    assert torch.equal(a, b)


def test_other_transformers_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.AltCLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)
    with pytest.raises(ValueError, match="Siglip2Model; but got AltCLIPModel"):
        attach(transformers.AltCLIPModel(config), 5, prompts="dcp")
    backbone = two_towers("CLIP")
    backbone.vision_model.encoder = nn.Identity()
    with pytest.raises(ValueError, match="but got CLIPModel"):
        tower_widths(backbone)
