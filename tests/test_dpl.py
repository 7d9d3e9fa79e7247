"""Prototypes from DPL's checkpoints and back, against a transcription of the published head."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from protohead import DecoupledPrototypeHead
from protohead.adapters.dpl import dpl_names, load_dpl, to_dpl

# Most of these heads are scored as they were made.
pytestmark = pytest.mark.filterwarnings("ignore:This head is in eval mode")

K, D = 5, 8
SLOTS = ("complete_image", "complete_text", "text_missing", "image_missing")
DPL = ("w_mi_c", "w_mt_c", "w_mi_tm", "w_mt_im")


def matrices(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {slot: torch.randn(K, D, generator=generator).to(dtype) for slot in SLOTS}


def checkpoint(naming=DPL, values=None, prefix="", transpose=False, others=True):
    values = values or matrices()
    state = {"visual.proj": torch.randn(3, 3), "food101_pl_head.image": torch.randn(K, D)} if others else {}
    for name, matrix in zip(naming, values.values(), strict=True):
        state[f"{prefix}hatememes_pl_head.{name}"] = matrix.T.contiguous() if transpose else matrix
    return state


def published_logits(values, features, missing_type, scale):
    """One row at a time."""
    image, text = features.split(D, dim=1)
    rows = []
    for i, code in enumerate(missing_type):
        cosine = {
            slot: F.cosine_similarity((text if slot in ("complete_text", "image_missing") else image)[i], matrix)
            for slot, matrix in values.items()
        }
        if code == 0:
            rows.append((cosine["complete_image"] + cosine["complete_text"]) / 2 * scale[0])
        else:
            rows.append(cosine[{1: "text_missing", 2: "image_missing"}[code]] * scale[code])
    return torch.stack(rows)


@pytest.mark.parametrize("transpose", [False, True])
def test_logits_are_those_of_the_published_head(transpose):
    values = matrices()
    scale = {"image+text": 32.0, "image": 16.0, "text": 8.0}
    margin = {"image+text": 0.1, "image": 0.2, "text": 0.3}
    head = load_dpl(checkpoint(transpose=transpose), "hatememes", K, scale=scale, margin=margin).eval()
    missing_type = [0, 1, 2, 2, 1, 0]
    features = torch.randn(6, 2 * D)
    present = torch.tensor([[True, True], [True, False], [False, True]])[missing_type]
    expected = published_logits(values, features, missing_type, list(scale.values()))
    torch.testing.assert_close(head(features, present), expected, rtol=0, atol=1e-5)
    head, double = head.double(), {slot: matrix.double() for slot, matrix in values.items()}
    expected = published_logits(double, features.double(), missing_type, list(scale.values()))
    torch.testing.assert_close(head(features.double(), present), expected, rtol=0, atol=1e-6)

    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    logits = head(features.double(), present, labels)
    for i, (code, k) in enumerate(zip(missing_type, labels.tolist(), strict=True)):
        s, mu = list(scale.values())[code], list(margin.values())[code]
        assert logits[i, k].item() == pytest.approx(s * math.cos(math.acos(expected[i, k] / s) + mu), abs=1e-6)
    assert head.seen_cases == head.cases
    assert head.shared_space


@pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
def test_the_order_of_the_keys_does_not_count(order):
    state = checkpoint()
    items = list(state.items())[2:]
    assert dpl_names(dict(items[i] for i in order), "hatememes") == {
        slot: f"hatememes_pl_head.{name}" for slot, name in zip(SLOTS, DPL, strict=True)
    }


@pytest.mark.parametrize("prefix", ["", "model.", "module.net."])
def test_lightning_checkpoints_and_prefixes(prefix):
    state = checkpoint(prefix=prefix)
    plain, whole = load_dpl(state, "hatememes", K), load_dpl({"state_dict": state, "epoch": 3}, "hatememes", K)
    for name in ("image", "text"):
        assert torch.equal(plain.prototypes[name], whole.prototypes[name])


@pytest.mark.parametrize("transpose", [False, True])
def test_round_trip(transpose):
    state = checkpoint(prefix="model.", transpose=transpose)
    head = load_dpl(state, "hatememes", K)
    blank = {name: torch.zeros_like(value).half() for name, value in state.items()}
    back = to_dpl(head, {"state_dict": blank}, "hatememes")
    assert set(back) == {name for name in state if "hatememes_pl_head" in name}
    for name, matrix in back.items():
        assert torch.equal(matrix, state[name].half())
        assert not blank[name].any()
    back = to_dpl(head, state, "hatememes")
    assert all(torch.equal(matrix, state[name]) for name, matrix in back.items())
    next(iter(back.values())).zero_()  # The head's own are not touched.
    assert head.prototypes["image"].all()


def test_modalities_in_the_other_order():
    torch.manual_seed(0)
    head = DecoupledPrototypeHead({"text": D, "image": D}, K, cases="all", scale=32)
    state = to_dpl(head, checkpoint(), "hatememes")
    other = load_dpl(state, "hatememes", K).eval()
    x = {name: torch.randn(3, D) for name in ("image", "text")}
    present = torch.tensor([[True, True], [True, False], [False, True]])
    torch.testing.assert_close(other(x, present), head.eval()(x, present.flip(1)))


def test_names_by_hand():
    names = {slot: f"hatememes_pl_head.w{i}" for i, slot in enumerate(SLOTS)}
    state = checkpoint(["w0", "w1", "w2", "w3"])
    head = load_dpl(state, "hatememes", K, names=names)
    expected = load_dpl(checkpoint(), "hatememes", K)
    for name in ("image", "text"):
        assert torch.equal(head.prototypes[name], expected.prototypes[name])
    assert all(torch.equal(matrix, state[name]) for name, matrix in to_dpl(head, state, "hatememes", names).items())


@pytest.mark.parametrize(
    "naming",
    [
        ("w1", "w2", "w3", "w4"),
        ("image", "text", "image_only", "text_only"),  # Plain as it may be: names are not guessed.
        ("w_mi_c", "w_mt_c", "w_mi_tm", "w_mt"),
        ("w_mi_c.weight", "w_mt_c.weight", "w_mi_tm.weight", "w_mt_im.weight"),
    ],
)
def test_other_names_are_not_guessed(naming):
    state = checkpoint(naming)
    with pytest.raises(ValueError, match=r"four matrices \['w_mi_c', 'w_mt_c', 'w_mi_tm', 'w_mt_im'\]") as error:
        load_dpl(state, "hatememes", K)
    for name in naming:
        assert f"'hatememes_pl_head.{name}': ({K}, {D})" in str(error.value)
    assert "names={'complete_image': key, 'complete_text': key, 'text_missing': key, 'image_missing': key}" in str(
        error.value
    )
    names = {slot: f"hatememes_pl_head.{name}" for slot, name in zip(SLOTS, naming, strict=True)}
    assert load_dpl(state, "hatememes", K, names=names).num_classes == K


def test_a_type3_head_is_refused():
    state = checkpoint() | {f"hatememes_pl_head.{name}": torch.ones(D, K) for name in ("w_mi_im", "w_mt_tm")}
    for call in (dpl_names, lambda *args: load_dpl(*args, K)):
        with pytest.raises(ValueError, match=r"four matrices \(DPL's Type4\), but got one of Type3: .*w_mt_tm"):
            call(state, "hatememes")


def test_more_or_fewer_matrices():
    state = checkpoint() | {"hatememes_pl_head.scale": torch.tensor(32.0)}
    load_dpl(state, "hatememes", K)  # A number is no matrix.
    for others in ({"hatememes_pl_head.extra": torch.ones(K, D)}, {"net.hatememes_pl_head.w_mi_c": torch.ones(K, D)}):
        with pytest.raises(ValueError, match="four matrices"):
            load_dpl(state | others, "hatememes", K)
    del state["hatememes_pl_head.w_mi_c"]
    with pytest.raises(ValueError, match="four matrices"):
        load_dpl(state, "hatememes", K)


def test_other_errors():
    good, names = checkpoint(), dpl_names(checkpoint(), "hatememes")
    with pytest.raises(ValueError, match=r"keys like mmimdb_pl_head\.\*, but got heads of .*'food101', 'hatememes'"):
        load_dpl(good, "mmimdb", K)
    with pytest.raises(ValueError, match=r"\(K, D\) or \(D, K\) with K = 6, but got .*\(5, 8\)"):
        load_dpl(good, "hatememes", 6)
    with pytest.raises(ValueError, match="square ones do not tell"):
        load_dpl(checkpoint(DPL, {slot: torch.ones(K, K) for slot in SLOTS}), "hatememes", K)
    with pytest.raises(ValueError, match="of one shape"):
        load_dpl(good | {"hatememes_pl_head.w_mt_c": torch.ones(D, K)}, "hatememes", K)
    with pytest.raises(ValueError, match="four different keys"):
        load_dpl(good, "hatememes", K, names=names | {"complete_text": names["complete_image"]})
    with pytest.raises(ValueError, match="four different keys"):
        load_dpl(good, "hatememes", K, names={"image": "a"})
    with pytest.raises(ValueError, match=r"has none under \['typo'\]"):
        load_dpl(good, "hatememes", K, names=names | {"complete_text": "typo"})
    with pytest.raises(ValueError, match="to be of shape"):
        to_dpl(DecoupledPrototypeHead({"image": 9, "text": 9}, K, cases="all"), good, "hatememes")
    with pytest.raises(ValueError, match="all three cases"):
        to_dpl(DecoupledPrototypeHead({"image": D, "text": D}, K, cases=["image", "text"]), good, "hatememes")
    with pytest.raises(ValueError, match="all three cases"):
        to_dpl(DecoupledPrototypeHead({"image": D, "audio": D}, K, cases="all"), good, "hatememes")


def test_parameters_and_dtypes():
    state = {name: nn.Parameter(value.half()) for name, value in checkpoint().items()}
    head = load_dpl(state, "hatememes", K)
    assert {p.dtype for p in head.parameters()} == {torch.float16}
    assert all(p.requires_grad and p.is_leaf for p in head.parameters())


def test_a_center_or_bias_has_no_place_in_dpl():
    head = DecoupledPrototypeHead({"image": 8, "text": 8}, 5, cases="all", shared_space=True)
    checkpoint = {f"food101_pl_head.{name}": torch.zeros(5, 8) for name in DPL}
    to_dpl(head, checkpoint, "food101")  # Zeros are as if there were none.
    for state in (head.bias.data, head.center):
        state[0] = 1.0
        with pytest.raises(ValueError, match="without center and bias"):
            to_dpl(head, checkpoint, "food101")
        state.zero_()
    assert not load_dpl(checkpoint, "food101", num_classes=5).centered
