"""Missing cases, and the converters of other projects' codes."""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from roads import every_block

from protohead import present_from_flags, present_from_missing_mask, present_from_missing_type, present_from_ragpt
from protohead.cases import block_index, case_masks, case_names, nearest_case

PAIR = ("image", "text")
COMPLETE, NO_TEXT, NO_IMAGE = [True, True], [True, False], [False, True]


def test_order_of_the_cases():
    assert case_names(["x"]) == ("x",)
    assert case_names(["image", "text", "audio"]) == (
        "image+text+audio",
        "image+text",
        "image+audio",
        "text+audio",
        "image",
        "text",
        "audio",
    )
    assert case_masks("image").tolist() == [[True]]
    assert len(case_names([f"m{i}" for i in range(8)])) == 255


@pytest.mark.parametrize("names", [[], ["a", "a"], ["a+b"], ["a.b"], ["a,b"], [""], [3]])
def test_wrong_modality_names(names):
    with pytest.raises(ValueError, match="modality"):
        case_names(names)


@pytest.mark.parametrize(
    ("cases", "match"),
    [
        (["text+image"], r"got \['text\+image'\]"),
        (["image", "image"], "twice"),
        (["image"], "'text' is in none"),
        ([], "'image' is in none"),
        ("image+text", r"'shared', 'all' or a list of names, such as \['image.text'\], but got 'image.text'"),
        ("everything", "but got 'everything'"),
    ],
)
def test_wrong_cases(cases, match):
    with pytest.raises(ValueError, match=match):
        case_masks(PAIR, cases)


@pytest.mark.parametrize("modalities", [1, 2, 3, 5])
def test_each_case_is_its_own_nearest(modalities):
    masks = case_masks([f"m{i}" for i in range(modalities)])
    present = torch.cat([masks, torch.zeros(1, modalities, dtype=torch.bool)])
    assert nearest_case(present, masks).tolist() == list(range(2**modalities))
    assert nearest_case(present[:0], masks).shape == (0,)


def test_two_modalities_are_numbered_as_in_map():
    present = present_from_missing_type([0, 1, 2], PAIR)
    assert nearest_case(present, case_masks(PAIR)).tolist() == [0, 1, 2]


def test_nearest_case_for_every_row_and_every_allowed_subset():
    names = ["a", "b", "c"]
    cases = reference.cases_of(names)
    masks = case_masks(names)
    for pattern in range(1, 2 ** len(cases)):
        allowed = [bool(pattern >> c & 1) for c in range(len(cases))]
        declared = [case for case, is_in in zip(cases, allowed, strict=True) if is_in]
        expected = [cases.index(reference.nearest(case, declared)) for case in cases]
        assert nearest_case(masks, masks, torch.tensor(allowed)).tolist() == expected


@pytest.mark.parametrize(
    "wrap", [list, torch.tensor, lambda c: torch.tensor(c).float().numpy(), lambda c: map(float, c)]
)
def test_missing_types(wrap):
    codes = wrap([0, 1, 2, 0])
    codes = list(codes) if isinstance(codes, map) else codes
    assert present_from_missing_type(codes, PAIR).tolist() == [COMPLETE, NO_TEXT, NO_IMAGE, COMPLETE]


def test_columns_follow_the_order_of_the_modalities():
    assert present_from_missing_type([1], ["text", "image"]).tolist() == [[False, True]]
    assert present_from_ragpt([1], "both", ["text", "image"]).tolist() == [[True, False]]
    assert present_from_flags({"image": [True], "text": [False]}, ["text", "image"]).tolist() == [[False, True]]


def test_ragpt_codes_mean_other_things_in_each_table():
    assert present_from_ragpt([0, 1], "text", PAIR).tolist() == [NO_TEXT, COMPLETE]
    assert present_from_ragpt([0, 1], "image", PAIR).tolist() == [NO_IMAGE, COMPLETE]
    assert present_from_ragpt([0.0, 1.0, 2.0], "both", PAIR).tolist() == [NO_TEXT, NO_IMAGE, COMPLETE]


@pytest.mark.parametrize("wrong", [-1, 3, 0.5, float("nan"), None, "1", [1]])
def test_a_code_outside_the_convention_is_named_with_its_row(wrong):
    with pytest.raises(ValueError, match=r"among \[0, 1, 2\], but got .* in row 2.*2 \(image missing\)") as error:
        present_from_missing_type([0, 1, wrong, -7], PAIR)
    assert repr(wrong) in str(error.value)
    with pytest.raises(ValueError, match="row 0"):
        present_from_ragpt([2], "text", PAIR)


@pytest.mark.parametrize("mask", [[True, False], torch.tensor([True, False]), torch.tensor([True]).numpy()])
def test_a_mask_is_not_read_as_codes(mask):
    with pytest.raises(TypeError, match="boolean mask"):
        present_from_missing_type(mask, PAIR)
    with pytest.raises(TypeError, match="boolean mask"):
        present_from_ragpt(mask, "image", PAIR)


def test_other_wrong_arguments_of_the_converters():
    with pytest.raises(ValueError, match="'image' and 'text'"):
        present_from_missing_type([0], ["img", "text"])
    with pytest.raises(ValueError, match="'both'"):
        present_from_ragpt([0], "audio", PAIR)
    for wrong, shown in ((torch.zeros(2, 2), r"shape \(2, 2\)"), ("012", "'012'"), (1, "got 1"), (None, "got None")):
        with pytest.raises(ValueError, match=f"one-dimensional.*{shown}"):
            present_from_missing_type(wrong, PAIR)
    for wrong in ("image", ["image", "image"], ["image", 2]):
        with pytest.raises(ValueError, match="modalit"):
            present_from_missing_type([0], wrong)
    with pytest.raises(ValueError, match="no name twice"):
        present_from_flags({"image": [True]}, ["image", "image"])
    assert present_from_flags({"image": [True]}, "image").shape == (1, 1)


def test_empty_and_device():
    assert present_from_missing_type([], PAIR).shape == (0, 2)
    assert present_from_flags({"image": [], "text": []}, PAIR).shape == (0, 2)
    assert present_from_missing_type([0.0], PAIR, device="meta").is_meta
    assert present_from_missing_type(torch.tensor([0]), PAIR).device.type == "cpu"


def test_flags():
    flags = {"image": torch.tensor([True, False]), "audio": [None, True], "video": None}
    present = present_from_flags(flags, ["image", "text", "audio", "video"])
    assert present.tolist() == [[True, False, False, False], [False, False, True, False]]
    assert present.is_contiguous()


@pytest.mark.parametrize(
    "column",
    [
        [True, None, False, True],
        [True, float("nan"), None, True],
        [True, pd.NA, False, True],
        (True, np.False_, np.nan, np.True_),
        np.array([True, None, np.nan, True], dtype=object),
        pd.Series([True, None, False, True]),
        pd.Series([True, pd.NA, False, True], dtype="boolean"),
        pd.Series([True, False, False, True], index=list("wxyz")),
        torch.tensor([True, False, False, True]),
    ],
    ids=lambda x: None,
)
def test_columns_of_flags(column):
    assert present_from_flags({"image": column}, PAIR)[:, 0].tolist() == [True, False, False, True]


@pytest.mark.parametrize("columns", [["text", "image"], ["image"]])
def test_a_data_frame_of_flags(columns):
    frame = pd.DataFrame({"text": [True, None, True], "image": [None, True, True]}, index=[7, 3, 5])[columns]
    expected = torch.tensor([[False, True], [True, False], [True, True]]) & torch.tensor([True, "text" in columns])
    assert torch.equal(present_from_flags(frame, PAIR), expected)
    with pytest.raises(ValueError, match=r"but got \['id'\]"):
        present_from_flags(frame.assign(id=[1, 2, 3]), PAIR)


@pytest.mark.parametrize("road", [nullcontext, every_block])
def test_blocks(road):
    masks = case_masks(["a", "b", "c"], ["a+b+c", "a+b", "c"])
    present = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()
    with road():
        case, block = block_index(present, masks)
        assert case[:4].tolist() == [0, 1, 2, 0]
        assert block.tolist() == [[0, 0, 0], [1, -1, -1], [-1, -1, 1], [-1, 0, 0], [-1, -1, -1]]
        seen = torch.tensor([[True, False, True], [False, False, False], [False, False, False]])
        case, block = block_index(present, masks, seen)
        assert case[:4].tolist() == [0, 0, 0, 0]
        assert block.tolist() == [[0, -1, 0], [0, -1, -1], [-1, -1, 0], [-1, -1, 0], [-1, -1, -1]]
        nothing = block_index(present, masks, torch.zeros_like(seen))
        assert torch.equal(nothing[1], block_index(present, masks)[1])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"image": [True, 1]}, "got 1 for 'image' in row 1"),
        ({"image": ["a.png"]}, "got 'a.png' for 'image' in row 0"),
        ({"image": [True, 1.0]}, "got 1.0 for 'image' in row 1"),
        ({"image": ["nan"]}, "got 'nan'"),
        ({"img": [True]}, r"\['img'\]"),
        ({"image": [True], "text": [True, False]}, "'image': 1, 'text': 2"),
        ({"image": None}, "at least one column"),
        ({}, "at least one column"),
    ],
)
def test_wrong_flags(flags, match):
    with pytest.raises(ValueError, match=match):
        present_from_flags(flags, PAIR)


def test_of_equals_the_case_of_training_is_taken():
    """A case of which only some modalities have been seen is no nearer than the row's own."""
    masks, seen = case_masks(PAIR), torch.tensor([[True, False], [True, False], [False, False]])
    rows = torch.tensor([[True, False], [True, True]])
    case, block = block_index(rows, masks, seen)
    assert case.tolist() == [1, 0]
    assert block.tolist() == [[1, -1], [0, -1]]


@pytest.mark.parametrize("wrap", [torch.tensor, np.array, list, lambda x: torch.tensor(x).long(), lambda x: torch.tensor(x).half()])  # fmt: skip # noqa: E501
def test_inverted_masks(wrap):
    mask = wrap([[False, False], [True, False], [False, True]])  # As in AOEPT: True is missing, the text first.
    assert present_from_missing_mask(mask, ["text", "image"], PAIR).tolist() == [COMPLETE, NO_TEXT, NO_IMAGE]
    assert present_from_missing_mask(mask, PAIR, PAIR).tolist() == [COMPLETE, NO_IMAGE, NO_TEXT]
    assert present_from_missing_mask(mask, PAIR, PAIR).dtype == torch.bool


def test_inverted_masks_of_other_sizes():
    mask = torch.tensor([[True, False, False]])
    assert present_from_missing_mask(mask, ["a", "b", "c"], ["c", "a", "b"]).tolist() == [[True, False, True]]
    assert present_from_missing_mask(mask[:0], ["a", "b", "c"], ["c", "a", "b"]).shape == (0, 3)
    assert present_from_missing_mask(mask, ["a", "b", "c"], ["c", "a", "b"], device="meta").is_meta


@pytest.mark.parametrize(
    ("mask", "columns", "match"),
    [
        ([[0, 1], [2, 0]], PAIR, "True or 1 where one is missing, but got 2 in row 1"),
        ([[0.0, float("nan")]], PAIR, "got nan in row 0"),
        ([0, 1, 2], PAIR, r"`missing_mask` to be of shape \(B, 2\) for .*, but got \(3,\)"),
        ([[0, 1, 0]], PAIR, r"got \(1, 3\)"),
        ([[0, 1]], ["image", "txt"], r"`columns` to be \('image', 'text'\), in any order, but got \('image', 'txt'\)"),
        ([[0, 1]], ["image", "image"], "no name twice"),
    ],
)
def test_wrong_inverted_masks(mask, columns, match):
    with pytest.raises(ValueError, match=match):
        present_from_missing_mask(mask, columns, PAIR)
