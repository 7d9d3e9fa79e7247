"""What `present` may be, and masks that the features contradict."""

import pandas as pd
import pytest
import torch
from roads import UNTRAINED

from protohead import DecoupledPrototypeHead

pytestmark = UNTRAINED

NAMES = ("image", "text", "audio")
MASK = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1], [0, 1, 0]]).bool()


def build(modalities=3):
    torch.manual_seed(0)
    return DecoupledPrototypeHead({name: 4 + m for m, name in enumerate(NAMES[:modalities])}, 5, cases="all")


def zero_padded(mask, fill=0.0):
    """Features of a head by name, `fill` where they are missing."""
    generator = torch.Generator().manual_seed(1)
    rows = {name: torch.randn(len(mask), 4 + m, generator=generator) for m, name in enumerate(NAMES[: mask.shape[1]])}
    return {name: torch.where(mask[:, m, None], x, fill) for m, (name, x) in enumerate(rows.items())}


@pytest.mark.parametrize("missing", [False, None, float("nan"), pd.NA])
@pytest.mark.parametrize("kind", [dict, pd.DataFrame, "boolean"])
def test_columns_by_name(kind, missing):
    head, features = build(), zero_padded(MASK)
    flags = {
        name: [True if here else missing for here in column]
        for name, column in zip(NAMES, MASK.T.tolist(), strict=True)
    }
    flags = {name: flags[name] for name in ("text", "audio", "image")}  # Nobody has to know the order.
    present = pd.DataFrame(flags, dtype="boolean") if kind == "boolean" else kind(flags)
    assert torch.equal(head(features, present), head(features, MASK))
    assert torch.equal(head.contributions(features, present), head.contributions(features, MASK))
    assert torch.equal(head.case_index(present), head.case_index(MASK))
    labels = torch.arange(8) % 5
    losses = []
    for each in (present, MASK):
        torch.manual_seed(0)
        losses.append(build().loss(features, each, labels))
    assert losses[0] == losses[1]
    twins = [build(), build()]
    for twin, each in zip(twins, (present, MASK), strict=True):
        twin.imprint(features, torch.linspace(0.1, 1, 40).view(8, 5), each)
    assert torch.equal(twins[0].prototypes["audio"], twins[1].prototypes["audio"])


def test_columns_that_are_left_out_are_missing():
    head, features = build(), zero_padded(torch.ones_like(MASK))
    expected = head(features, torch.tensor([[True, False, False]]).expand(8, 3))
    assert torch.equal(head(features, {"image": [True] * 8}), expected)
    assert torch.equal(head(features, {"image": [True] * 8, "text": None}), expected)
    assert torch.equal(head(features, pd.DataFrame({"image": [True] * 8})), expected)


@pytest.mark.parametrize(
    ("present", "match"),
    [
        ({"img": [True] * 8}, r"flags for the modalities .*, but got \['img'\]"),
        ({"image": [1] * 8}, "Expected True, False or None, but got 1 for 'image' in row 0"),
        ({"image": [True] * 7}, "'present': 7"),
        ({"image": [True] * 8, "text": [True]}, "'text': 1"),
        ({}, "at least one column"),
        (pd.DataFrame({"image": [1.0] * 8}), "got 1.0"),
        (pd.DataFrame({"id": range(8), "image": [True] * 8}), r"got \['id'\]"),
    ],
    ids=lambda x: None,
)
def test_wrong_columns(present, match):
    with pytest.raises(ValueError, match=match):
        build()(zero_padded(MASK), present)


METHODS = {
    "forward": lambda head, x, present: head(x, present),
    "loss": lambda head, x, present: head.loss(x, present, torch.zeros(len(present), dtype=torch.int64)),
    "contributions": lambda head, x, present: head.contributions(x, present),
    "imprint": lambda head, x, present: head.imprint(x, torch.zeros(len(present), dtype=torch.int64), present),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("modalities", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_an_inverted_mask_is_refused(modalities, training, method):
    mask = MASK[:, :modalities]
    head = build(modalities).train(training)
    with pytest.raises(
        ValueError,
        match=r"is all zeros in \d+ rows that have it by `present`, .*: the mask is inverted, or its columns",
    ):
        METHODS[method](head, zero_padded(mask), ~mask)
    assert head.seen_cases == ()
    assert not head.center.any()


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 1, 0], [0, 2, 1]])
def test_swapped_columns_are_refused(order):
    mask = torch.tensor([[0, 1, 1]] * 4 + [[1, 0, 1]] * 4 + [[1, 1, 0]] * 4 + [[1, 1, 1]] * 9).bool()
    with pytest.raises(ValueError, match="inverted, or its columns are swapped"):
        build()(zero_padded(mask), mask[:, order])


def test_swapped_columns_of_two_modalities_are_refused():
    mask = torch.tensor([[True, False]] * 5 + [[True, True]] * 30)  # One is always there.
    both = torch.tensor([[True, False]] * 3 + [[False, True]] * 4 + [[True, True]] * 5)
    for each in (mask, mask.flip(1), both):
        with pytest.raises(
            ValueError, match=r"is all zeros in \d+ rows that have it by `present`, and in no row that lacks it"
        ):
            build(2)(zero_padded(each), each.flip(1))


def test_masks_that_are_right_are_not_refused():
    every = torch.ones(8, 3, dtype=torch.bool)
    garbage = zero_padded(MASK, fill=7.0)
    one_dead = {name: x.clone() for name, x in garbage.items()}
    one_dead["text"][2] = 0  # A dead ReLU, say.
    part_missing = MASK.clone()
    part_missing[0, 0] = False  # Features are there that are not used.
    cases = [
        (zero_padded(MASK), MASK),
        (garbage, MASK),
        (zero_padded(MASK, fill=float("nan")), MASK),
        (one_dead, MASK),
        (zero_padded(MASK), part_missing),
        ({**zero_padded(MASK), "text": torch.zeros(8, 5)}, MASK),  # Dead all over, but zero-padded as it says.
        (zero_padded(MASK), every),  # Zeros may be what a modality says.
        ({name: x * 0 for name, x in garbage.items()}, every),
        (garbage, ~every),
        (garbage, ~MASK),  # Nothing contradicts it.
        ({"image": garbage["image"]}, torch.tensor([[True, False, False]] * 8)),
    ]
    for features, present in cases:
        head = build()
        head(features, present)
        head.eval()(features, present)


def test_few_rows_are_not_refused():
    build()(zero_padded(MASK[:7]), ~MASK[:7])
    with pytest.raises(ValueError, match="inverted"):
        build()(zero_padded(MASK), ~MASK)


@pytest.mark.filterwarnings("ignore")  # torch's own, from inside the compiler
def test_a_compiled_graph_reads_no_values():
    head = build().eval()
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    expected = torch.cat(
        [head({k: x[i : i + 4] for k, x in zero_padded(MASK).items()}, ~MASK[i : i + 4]) for i in (0, 4)]
    )
    torch.testing.assert_close(compiled(zero_padded(MASK), ~MASK), expected)


@pytest.mark.filterwarnings("ignore")
def test_a_modality_that_is_left_out_of_a_compiled_graph_is_missing():
    """Outside a graph `present` must not say that it is there."""
    head, features = build().eval(), zero_padded(MASK)
    torch._dynamo.reset()
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    present = torch.ones_like(MASK)
    for given in ({"image": features["image"]}, {"image": features["image"], "text": None, "audio": features["audio"]}):
        there = torch.tensor([given.get(name) is not None for name in NAMES])
        full = {name: torch.where(there[m], features[name], 0) for m, name in enumerate(NAMES)}
        with pytest.raises(ValueError, match="'text', which `present` says that row 0 has"):
            head(given, present)
        torch.testing.assert_close(compiled(given, present), head(full, present & there))
        torch.testing.assert_close(compiled(given, MASK), head(full, MASK & there))


def test_one_inverted_column_is_refused():
    """As `notna` of one column and `isna` of the other give it, also where no other modality is missing."""
    for others in (torch.tensor([True, False, True] * 4), torch.ones(12, dtype=torch.bool)):
        right = torch.stack([others, torch.arange(12) % 2 == 0], dim=1)
        x = torch.cat([torch.randn(12, 4) * right[:, :1], torch.randn(12, 3) * right[:, 1:]], dim=1)
        head = DecoupledPrototypeHead({"image": 4, "text": 3}, 5)
        head(x, right)
        with pytest.raises(ValueError, match="'text' is all zeros in 6 rows that have it"):
            head(x, torch.stack([right[:, 0], ~right[:, 1]], dim=1))


@pytest.mark.parametrize("modalities", [2, 3])
def test_features_that_are_zeros_by_nature_contradict_nothing(modalities):
    torch.manual_seed(0)
    head = DecoupledPrototypeHead(dict.fromkeys("abc"[:modalities], 4), 5)
    for _ in range(300):
        x = torch.randn(64, modalities, 4) * (torch.rand(64, modalities, 1) > 0.2)
        present = torch.rand(64, modalities) > 0.05
        head(x.flatten(1), present | ~present.any(1, keepdim=True))  # What is missing is not always zeros.
