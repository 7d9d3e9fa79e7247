"""Whole models from DPL's checkpoints, against a stand-in of the published model, row by row, with random weights."""

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from roads import UNTRAINED
from test_prompts import attend, image_feature, image_tokens, lower_triangular, mlp, text_feature, text_tokens
from torch import nn

from protohead.adapters.dpl import dpl_names, load_dpl_model

pytestmark = UNTRAINED

K, T, DEPTH = 5, 2, 2
IMAGE, TEXT, OUT = 128, 64, 32
CLIP = {
    "embed_dim": OUT,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": IMAGE, "patch_size": 16},
    "text_cfg": {"context_length": 9, "vocab_size": 50, "width": TEXT, "heads": 1, "layers": 3},
    "quick_gelu": True,
}
MISSING = {0: None, 1: "text", 2: "image"}
MISSING_TYPE = [0, 1, 2, 0, 2, 1]
PRESENT = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1], [0, 1], [1, 0]]).bool()


def table(*shape):
    return nn.Parameter(0.5 * torch.randn(shape))


def layers(width, hidden, out):
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class PromptLearner(nn.Module):
    """Parameters as in DCP: one of each prompt for complete and for missing, and a list of layers for each depth."""

    def __init__(self):
        super().__init__()
        both = IMAGE + TEXT
        self.visual_prompt_complete, self.visual_prompt_missing = table(T, IMAGE), table(T, IMAGE)
        self.text_prompt_complete, self.text_prompt_missing = table(T, TEXT), table(T, TEXT)
        for case in ("complete", "image", "text"):
            setattr(self, f"common_prompt_{case}", table(T, TEXT))
        for name, width in (("image", IMAGE), ("text", TEXT)):
            projections = nn.ModuleList(layers(both, both // 16, width) for _ in range(DEPTH))
            setattr(self, f"compound_prompt_projections_{name}", projections)
            setattr(self, f"layernorm_{name}", nn.ModuleList(nn.LayerNorm(both) for _ in range(DEPTH)))
            setattr(self, f"common_prompt_projection_{name}", layers(TEXT, TEXT // 16, width))


class Published(nn.Module):
    """DPL_DCP, or with no prompts DPL_NoPrompt: (image, ids, missing types) to features, zeros where one is missing."""

    def __init__(self, prompts):
        super().__init__()
        torch.manual_seed(0)
        clip = open_clip.CLIP(**CLIP)
        with torch.no_grad():
            for p in clip.parameters():
                p.add_(0.05 * torch.randn_like(p))
        self.model = nn.Module()
        self.model.image_encoder = clip.visual
        text = nn.Module()
        text.transformer, text.token_embedding, text.ln_final = clip.transformer, clip.token_embedding, clip.ln_final
        text.positional_embedding, text.text_projection = clip.positional_embedding, clip.text_projection
        self.model.text_encoder, self.model.logit_scale = text, clip.logit_scale
        self.has_prompts = prompts
        if prompts:
            self.model.prompt_learner = PromptLearner()
            self.dynamic = {}  # Plain tensors: in no state_dict.
            for modality, width in (("image", IMAGE), ("text", TEXT)):
                stack = clip.visual.transformer if modality == "image" else clip.transformer
                stack.resblocks[0].attn_prompt = nn.MultiheadAttention(width, 1)
                for case in ("complete", "image", "text"):
                    self.dynamic[modality, case] = 0.5 * torch.randn(T, width)
        self.food101_pl_head = nn.Module()
        for name in ("w_mi_c", "w_mt_c", "w_mi_tm", "w_mt_im"):
            setattr(self.food101_pl_head, name, table(OUT, K))

    def prompts(self, modality, missing):
        p = self.model.prompt_learner
        case = {None: "complete", "text": "image", "image": "text"}[missing]
        v = p.visual_prompt_missing if missing == "image" else p.visual_prompt_complete
        s = p.text_prompt_missing if missing == "text" else p.text_prompt_complete
        staged = []
        for j in range(DEPTH):
            z = torch.cat([v, s], dim=1)
            projections = p.compound_prompt_projections_image[j], p.compound_prompt_projections_text[j]
            v, s = (
                mlp(norm[j](z), layer[0], layer[2])
                for norm, layer in zip((p.layernorm_image, p.layernorm_text), projections, strict=True)
            )
            staged.append({"image": v, "text": s}[modality])
        layer = getattr(p, f"common_prompt_projection_{modality}")
        common = mlp(getattr(p, f"common_prompt_{case}"), layer[0], layer[2])
        return staged, common, self.dynamic[modality, case]

    def feature(self, modality, missing, row):
        text = self.model.text_encoder
        x = image_tokens(self.model.image_encoder, row) if modality == "image" else text_tokens(text, row)
        stack = self.model.image_encoder.transformer if modality == "image" else text.transformer
        count = 0
        if self.has_prompts:
            staged, common, dynamic = self.prompts(modality, missing)
            count = 3 * T
            x = torch.cat([staged[0], common, attend(dynamic, x, stack.resblocks[0].attn_prompt), x])
        mask = None if modality == "image" else lower_triangular(len(x))
        for j, block in enumerate(stack.resblocks):
            if self.has_prompts and 1 <= j < DEPTH:
                x = torch.cat([staged[j], x[T:]])
            x = block(x[None], attn_mask=mask)[0]
        if modality == "image":
            return image_feature(self.model.image_encoder, x, count)
        return text_feature(text, x, row, count)

    def forward(self, image, ids, missing_type):
        rows = []
        for pixels, row, code in zip(image, ids, missing_type, strict=True):
            missing = MISSING[code]
            # As published, what is missing is encoded, too, as ones or an empty text, and then set to zero.
            pixels = torch.ones_like(pixels) if missing == "image" else pixels
            row = torch.tensor([48, 49, *[0] * 7]) if missing == "text" else row
            h = {"image": self.feature("image", missing, pixels), "text": self.feature("text", missing, row)}
            rows.append(torch.cat([torch.zeros(OUT) if missing == name else x for name, x in h.items()]))
        return torch.stack(rows)

    def logits(self, features, missing_type):
        head, rows = self.food101_pl_head, []
        for h, code in zip(features, missing_type, strict=True):
            h_i, h_t = (F.normalize(x, dim=0) for x in h.split(OUT))
            w = {name: F.normalize(p, dim=0) for name, p in head.named_parameters()}
            z = {0: (h_i @ w["w_mi_c"] + h_t @ w["w_mt_c"]) / 2, 1: h_i @ w["w_mi_tm"], 2: h_t @ w["w_mt_im"]}
            rows.append(32 * z[code])
        return torch.stack(rows)


def inputs():
    torch.manual_seed(1)
    ids = torch.randint(1, 48, (6, 9))
    ids[torch.arange(6), torch.randint(2, 9, (6,))] = 49
    return {"image": torch.randn(6, 3, 32, 32), "text": ids}


def with_dynamic(published, state):
    for (modality, case), x in published.dynamic.items():
        state[f"model.{modality}_encoder.transformer.resblocks.0.prompts_dynamic_{case}"] = x
    return state


def in_double(published, model, batch):
    """The same weights in float64, where rounding does not show: features and logits agree far below 1e-5."""
    published, model = copy.deepcopy(published).double(), copy.deepcopy(model).double()
    published.dynamic = {key: x.double() for key, x in getattr(published, "dynamic", {}).items()}
    batch = {**batch, "image": batch["image"].double()}
    with torch.no_grad():
        expected = published(batch["image"], batch["text"], MISSING_TYPE)
        features = model.encode(batch, PRESENT)
        torch.testing.assert_close(torch.cat([*features.values()], 1), expected, rtol=0, atol=1e-9)
        logits = published.logits(expected, MISSING_TYPE)
        torch.testing.assert_close(model(batch, PRESENT), logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prompts", [True, False], ids=["DPL_DCP", "DPL_NoPrompt"])
def test_features_and_logits_are_those_of_the_published_model(prompts):
    published, batch = Published(prompts).eval(), inputs()
    state = published.state_dict()
    checkpoint = {"epoch": 3, "state_dict": with_dynamic(published, state) if prompts else state}
    model = load_dpl_model(checkpoint, "food101", K)
    with torch.no_grad():
        expected = published(batch["image"], batch["text"], MISSING_TYPE)
        features = model.encode(batch, PRESENT)
        torch.testing.assert_close(torch.cat([*features.values()], 1), expected, rtol=1e-5, atol=1e-5)
        logits = published.logits(expected, MISSING_TYPE)  # Up to 13; they agree to 3e-6.
        torch.testing.assert_close(model(batch, PRESENT), logits, rtol=1e-6, atol=1e-5)
    in_double(published, model, batch)
    assert model.head.cases == ("image+text", "image", "text")
    assert not prompts or next(iter(model.encoders.values())).seen.all()
    trained = {name.rpartition("clip.")[2] for name, p in model.encoders.named_parameters() if p.requires_grad}
    assert {name for name in trained if "prompts" not in name} == {
        "visual.proj", "visual.ln_post.weight", "visual.ln_post.bias", "ln_final.weight", "ln_final.bias"
    }  # fmt: skip
    model.train().loss(batch, PRESENT, torch.arange(6) % K, subcase_weight=0).backward()


def test_dynamic_prompts_that_were_never_saved():
    state = Published(True).state_dict()
    assert not any("dynamic" in key for key in state)
    with pytest.warns(UserWarning, match="does not hold DCP's dynamic prompts"):
        model = load_dpl_model(state, "food101", K)
    (towers,) = model.encoders.values()
    assert 0.01 < towers.prompts.dynamic["image"].std() < 0.03
    assert (towers.prompts.length, towers.prompts.depth) == (6, 2)


def test_other_names_of_the_same():
    published = Published(True)
    state = with_dynamic(published, published.state_dict())
    expected = load_dpl_model(state, "food101", K)(inputs(), PRESENT)
    swaps = {"compound_prompt_projections_image": "visual_mlp", "layernorm_text": "txt_ln", "common_prompt_": "common."}
    for old, new in swaps.items():
        state = {key.replace(old, new): x for key, x in state.items()}
    state = {key.replace("model.", "net.model.", 1): x for key, x in state.items()}
    assert torch.equal(load_dpl_model(state, "food101", K)(inputs(), PRESENT), expected)


def test_dpls_names():
    names = dpl_names({f"mmimdb_pl_head.{name}": torch.ones(4, 3) for name in ("w_mi_c", "w_mt_c", "w_mi_tm", "w_mt_im")}, "mmimdb")  # fmt: skip # noqa: E501
    assert names == {
        "complete_image": "mmimdb_pl_head.w_mi_c",
        "complete_text": "mmimdb_pl_head.w_mt_c",
        "text_missing": "mmimdb_pl_head.w_mi_tm",
        "image_missing": "mmimdb_pl_head.w_mt_im",
    }


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: [s.pop(key) for key in list(s) if "image_encoder" in key], "one '...image_encoder.conv1.weight'"),
        (lambda s: s.pop("model.text_encoder.token_embedding.weight"), "lacks 'token_embedding.weight'"),
        (lambda s: s.pop("model.text_encoder.ln_final.bias"), r'the towers .*Missing key.*"ln_final.bias"'),
        (lambda s: s.update({"model.image_encoder.extra": torch.ones(2)}), r"Unexpected key.*visual.extra"),
        (lambda s: s.pop("model.prompt_learner.text_prompt_missing"), r"lacks \['static.text/1'\]"),
        (lambda s: s.update({"model.prompt_learner.gate": torch.ones(2)}), "'model.prompt_learner.gate' does not tell"),
        (lambda s: s.update({"model.prompt_learner.gate.weight": torch.ones(2)}), "does not tell which"),
        (lambda s: s.pop("model.prompt_learner.layernorm_text.1.bias"), "DCP's prompts of a DPL checkpoint, but"),
    ],
)
def test_other_checkpoints_are_refused(change, match):
    published = Published(True)
    state = dict(with_dynamic(published, published.state_dict()))
    change(state)
    with pytest.raises(ValueError, match=r"(?s)" + match):
        load_dpl_model(state, "food101", K)
