"""Missing tables: exact counts, the same on every machine, and files that come back as they were."""

import json
import math
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from protohead.simulate import MissingTable, load_map_table, missing_table

PAIR = ("image", "text")
TRIO = ("image", "text", "audio")


def lacking(table):
    """What each row lacks, as a string."""
    rows = table.present.tolist()
    return ["+".join(n for n, has in zip(table.modalities, row, strict=True) if not has) for row in rows]


@pytest.mark.parametrize("names", [PAIR, TRIO, ("a", "b", "c", "d")])
def test_equal_proportions(names):
    combinations = 2 ** len(names) - 2
    for count, rate in product((0, 1, 2, 7, 100, 101), (0, 0.01, 0.3, 0.7, 0.95, 1)):
        gone = Counter(lacking(missing_table(count, names, rate)))
        incomplete = count - gone.pop("", 0)
        assert incomplete == round(rate * count)
        assert "+".join(names) not in gone
        assert set(gone.values()) <= {incomplete // combinations, incomplete // combinations + 1}
        assert len(gone) == min(combinations, incomplete)


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ("all", {"image": 35, "text": 35}),
        ("both", {"image": 35, "text": 35}),
        ("image", {"image": 70}),
        (["text", "image"], {"image": 35, "text": 35}),
        ({"image": 0.3, "text": 0.7}, {"image": 21, "text": 49}),
        ({"image": 0, "text": 2}, {"text": 70}),
    ],
)
def test_what_goes_missing(missing, expected):
    assert Counter(lacking(missing_table(100, PAIR, 0.7, missing))) == {"": 30, **expected}


def test_sets_of_modalities_go_missing():
    proportions = {"image+audio": 3, "text": 1}
    assert Counter(lacking(missing_table(100, TRIO, 0.4, proportions))) == {"": 60, "image+audio": 30, "text": 10}


@pytest.mark.parametrize("proportion", [0.5, 0.3, 0.1, 0.99])
def test_proportions_are_rounded(proportion):
    missing = {"image": proportion, "text": 1 - proportion}
    for count in range(1, 40):
        images = lacking(missing_table(count, PAIR, 1, missing)).count("image")
        assert abs(images - proportion * count) <= 0.5 + 1e-9


def test_odd_rows_go_to_missing_text_as_in_map():
    assert Counter(lacking(missing_table(3, PAIR, 1))) == {"text": 2, "image": 1}


def test_one_modality():
    assert missing_table(3, ["image"], 0).present.tolist() == [[True]] * 3
    assert missing_table(3, ["image"], {"image": 0.0}).present.all()
    with pytest.raises(ValueError, match="2 rows incomplete, but none could keep a modality"):
        missing_table(3, ["image"], 0.5)
    with pytest.raises(ValueError, match=r"leave each of 3 rows a modality.*'image': 2"):
        missing_table(3, ["image"], {"image": 0.5})


def test_known_tables():
    """The same on every machine and version: a change here breaks the tables that people have published."""
    codes = {"": 0, "text": 1, "image": 2}
    weights = [1, 1, 1, 1, 1, 1, 5, 5, 5, 5, 5, 0.5]
    for options, expected in (
        ({"rate": 0.7}, "002111021202"),
        ({"rate": 0.7, "seed": 1}, "100212202101"),
        ({"rate": {"image": 0.25, "text": 0.5}}, "111202021101"),
        ({"rate": 0.5, "weights": weights}, "000200112120"),
    ):
        table = missing_table(12, PAIR, **options)
        assert "".join(str(codes[gone]) for gone in lacking(table)) == expected, options
    trio = missing_table(12, TRIO, dict.fromkeys(TRIO, 0.5))
    assert "".join("01"[has] for row in trio.present.tolist() for has in row) == "100110001001111011110010001100110001"


def test_nothing_else_that_is_random_matters():
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.random.get_rng_state()
    first = missing_table(50, TRIO, 0.5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.present, missing_table(50, TRIO, 0.5).present)
    tables = {tuple(lacking(missing_table(50, PAIR, 0.5, seed=seed))) for seed in range(20)}
    assert len(tables) == 20


@pytest.mark.parametrize("weights", [None, torch.arange(1, 61)])
@pytest.mark.parametrize("missing", ["all", "text", {"image": 0.3, "text+audio": 0.7}])
def test_a_higher_rate_adds_rows(weights, missing):
    rates = [i / 10 for i in range(11)]
    tables = [lacking(missing_table(60, TRIO, rate, missing, seed=3, weights=weights)) for rate in rates]
    for low, high in pairwise(tables):
        assert all(before in ("", after) for before, after in zip(low, high, strict=True))


@pytest.mark.parametrize("rates", [(0, 0), (0.3, 0.5), (1, 0), (0.5, 0.5), (0.2, 0.3, 0), (0.9, 0.1, 1), (2 / 3,) * 3])
def test_rates_by_modality(rates):
    rate = dict(zip(TRIO, rates, strict=False))
    for count in (0, 1, 10, 101):
        wanted = [round(r * count) for r in rates]
        if sum(wanted) > count * (len(rates) - 1):
            with pytest.raises(ValueError, match="leave each of"):
                missing_table(count, list(rate), rate)
            continue
        for seed in range(5):
            present = missing_table(count, list(rate), rate, seed=seed).present
            assert (~present).sum(0).tolist() == wanted
            assert present.any(1).all()


def test_rates_by_modality_that_are_only_just_possible():
    """All counts for five rows: there is a table if and only if the counts leave each row one modality."""
    for counts in product(range(6), repeat=3):
        rates = {name: count / 5 for name, count in zip(TRIO, counts, strict=True)}
        if sum(counts) > 10:
            with pytest.raises(ValueError, match="5 rows a modality"):
                missing_table(5, TRIO, rates)
            continue
        for seed in range(2):
            present = missing_table(5, TRIO, rates, seed=seed).present
            assert (~present).sum(0).tolist() == list(counts)
            assert present.any(1).all()


def test_rates_by_modality_are_independent():
    rows, rates = 5000, {"image": 0.3, "text": 0.2, "audio": 0.1}
    gone = Counter(lacking(missing_table(rows, TRIO, rates)))
    for pair, chance in (("image+text", 0.06 * 0.9), ("image+audio", 0.03 * 0.8), ("text+audio", 0.02 * 0.7)):
        assert abs(gone[pair] / rows - chance) < 0.01  # The 0.6 % that would lose all three are elsewhere.


def test_gaps_stay_and_only_complete_rows_lose_something():
    present = torch.ones(100, 3, dtype=torch.bool)
    present[:20, 0] = present[:5, 1] = present[0, 2] = False
    before = present.clone()
    by_rate = missing_table(100, TRIO, 0.5, present=present).present
    assert (~by_rate[20:].all(1)).sum() == 40
    by_modality = missing_table(100, TRIO, {"image": 0.5, "text": 0.25}, present=present).present
    assert (~by_modality[20:]).sum(0).tolist() == [40, 20, 0]
    assert torch.equal(by_rate[:20], present[:20])
    assert torch.equal(by_modality[:20], present[:20])
    assert not missing_table(100, TRIO, 1, present=present).present[20:].all(1).any()
    assert torch.equal(missing_table(100, TRIO, 0, present=present).present, present)
    assert torch.equal(present, before)
    nothing = torch.zeros_like(present)
    assert torch.equal(missing_table(100, TRIO, 1, present=nothing).present, nothing)


def test_missingness_depends_on_the_label():
    labels = torch.arange(400) % 4
    table = missing_table(400, PAIR, 0.3, weights=1 + 4 * (labels == 3))
    rate = [(~table.present.all(1))[labels == k].double().mean().item() for k in range(4)]
    assert sum(rate) == pytest.approx(1.2)
    assert max(rate[:3]) < 0.27
    assert rate[3] > 0.6


def test_the_first_row_is_drawn_in_proportion_to_the_weights():
    weights = [1, 1, 5, 1, 3, 1]
    draws = [missing_table(6, PAIR, 1 / 6, seed=seed, weights=weights).present for seed in range(1000)]
    chosen = torch.stack([~present.all(1) for present in draws]).double().mean(0)
    assert torch.allclose(chosen, torch.tensor(weights).double() / 12, atol=0.03)


def test_weights_of_every_kind():
    weights = [0.5, 0.0, 3.0, 1.0, 0.0, 7.0]
    tables = [missing_table(6, PAIR, 0.5, weights=w) for w in (weights, np.array(weights), torch.tensor(weights))]
    assert lacking(tables[0]) == lacking(tables[1]) == lacking(tables[2])
    assert tables[0].present[[1, 4]].all()
    mask = torch.tensor(weights) > 0
    assert missing_table(6, PAIR, 4 / 6, weights=mask).present.all(1).tolist() == (~mask).tolist()
    rates = {"image": 1 / 3, "text": 1 / 3}
    assert missing_table(6, PAIR, rates, weights=mask).present.all(1).tolist() == (~mask).tolist()
    same = [missing_table(300, PAIR, 0.5, weights=w) for w in (None, [1] * 300)]
    assert lacking(same[0]) == lacking(same[1])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ids": -1}, ValueError, "number of rows, or ids, but got -1"),
        ({"ids": True}, ValueError, "'ids' to be one-dimensional"),
        ({"ids": 1.5}, ValueError, "'ids' to be one-dimensional"),
        ({"ids": "abcd"}, ValueError, "'ids' to be one-dimensional"),
        ({"ids": {"a", "b"}}, TypeError, "a set"),
        ({"ids": ["a", None]}, TypeError, "strings or integers, but got None"),
        ({"ids": ["a", True]}, TypeError, "but got True"),
        ({"ids": ["1", 1]}, ValueError, r"no id twice, but got \['1'\]"),
        ({"modalities": []}, ValueError, "at least one modality"),
        ({"modalities": ["image", "image"]}, ValueError, "no name twice"),
        ({"modalities": ["image", "id"]}, ValueError, "no modality named 'id'"),
        ({"rate": 70}, ValueError, r"`rate` to be in \[0, 1\], but got 70"),
        ({"rate": -0.1}, ValueError, r"in \[0, 1\], but got -0.1"),
        ({"rate": math.nan}, ValueError, r"in \[0, 1\], but got nan"),
        ({"rate": "0.7"}, TypeError, "a number for `rate`, but got '0.7'"),
        ({"rate": None}, TypeError, "but got None"),
        ({"rate": {"image": 1.5}}, ValueError, r"in \[0, 1\], but got 1.5"),
        ({"rate": {"image": None}}, TypeError, "but got None"),
        ({"rate": {"audio": 0.5}}, ValueError, r"some of \('image', 'text'\), but got \['audio'\]"),
        ({"rate": {"image": 0.5}, "missing": "text"}, ValueError, "left out where `rate` names modalities"),
        (
            {"rate": {"image": 0.75, "text": 0.5}},
            ValueError,
            "leave each of 4 rows a modality, .*'image': 3, 'text': 2",
        ),
        ({"rate": {"image": 0.5}, "weights": [1, 0, 0, 0]}, ValueError, "each of 1 rows a modality"),
        (
            {"modalities": TRIO, "rate": {"text": 0.75}, "weights": [1, 1, 0, 0]},
            ValueError,
            "each of 2 rows a modality",
        ),
        ({"missing": "audio"}, ValueError, r"of \('all', 'both', 'image', 'text'\), but got \['audio'\]"),
        ({"missing": "image+text"}, ValueError, r"got \['image\+text'\]"),
        ({"missing": "both", "modalities": TRIO}, ValueError, r"of \('all', 'image\+text', .* got \['both'\]"),
        ({"missing": ["image", "image"]}, ValueError, "nothing twice"),
        ({"missing": {"image", "text"}}, TypeError, "a string, a list or a mapping, but got {"),
        ({"missing": None}, TypeError, "but got None"),
        ({"missing": []}, ValueError, "a positive proportion"),
        ({"missing": {"image": 0, "text": 0.0}}, ValueError, "a positive proportion"),
        ({"missing": {"image": -1, "text": 1}}, ValueError, "`missing` to be finite and not negative, but got -1"),
        ({"missing": {"image": "1"}}, TypeError, "a number for `missing`"),
        ({"seed": -1}, TypeError, "non-negative integer, but got -1"),
        ({"seed": None}, TypeError, "but got None"),
        ({"seed": True}, TypeError, "but got True"),
        ({"seed": 1.0}, TypeError, "but got 1.0"),
        ({"weights": [1, 2, 3]}, ValueError, "of length 4, one a row, but got 3"),
        ({"weights": [1, 2, 3, math.nan]}, ValueError, "finite and not negative, but got nan"),
        ({"weights": [1, 2, 3, math.inf]}, ValueError, "but got inf"),
        ({"weights": [1, 2, 3, -1]}, ValueError, "but got -1"),
        ({"weights": ["1"] * 4}, TypeError, "a number for `weights`"),
        ({"weights": 2.0}, ValueError, "'weights' to be one-dimensional"),
        ({"weights": torch.ones(4, 1)}, ValueError, r"\(4, 1\)"),
        (
            {"weights": [0, 0, 0, 1]},
            ValueError,
            "make 2 rows incomplete, but only 1 are complete and of positive weight",
        ),
        ({"present": torch.ones(4, 2)}, TypeError, r"`present` to be a bool tensor, but got torch.float32"),
        ({"present": np.ones((4, 2), dtype=bool)}, TypeError, "but got ndarray"),
        ({"present": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"of shape \(4, 2\) .* but got \(3, 2\)"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        missing_table(**{"ids": 4, "modalities": PAIR, "rate": 0.5, **options})


def test_ids_become_strings():
    for ids in ([3, 1], np.array([3, 1]), torch.tensor([3, 1]), ("3", "1"), dict.fromkeys(["3", "1"]).keys()):
        assert missing_table(ids, PAIR, 0).ids == ("3", "1")
    assert missing_table(2, PAIR, 0).ids == ("0", "1")
    assert missing_table(np.int64(2), PAIR, 0).ids == ("0", "1")


def test_select():
    table = missing_table(["a", "b", "c", "7"], PAIR, 0.5)
    order = ["c", "a", 7, "c"]
    assert torch.equal(table.select(order), table.present[[2, 0, 3, 2]])
    assert torch.equal(table.select(torch.tensor([7])), table.present[3:])
    assert table.select([]).shape == (0, 2)
    with pytest.raises(KeyError, match=r"of the 4 rows of the table, but got others: \['d'\]"):
        table.select(["a", "d"])
    with pytest.raises(KeyError, match=r"'4'\], 6 in all"):
        table.select(range(6))
    for wrong in ("a", 7):
        with pytest.raises(ValueError, match="'ids' to be one-dimensional"):
            table.select(wrong)


def test_describe():
    rows = [[True, True, True]] * 5 + [[False, True, True], [True, True, False], [True, False, False], [False] * 3]
    table = MissingTable(9, TRIO, torch.tensor(rows))
    text = table.describe()
    assert text.splitlines() == [
        "9 rows, η = 44.4 %: 77.8 % image / 77.8 % text / 66.7 % audio present",
        "image+text+audio: 55.6 % (5)",
        "image+text: 11.1 % (1), audio missing",
        "text+audio: 11.1 % (1), image missing",
        "image: 11.1 % (1), text, audio missing",
        "nothing: 11.1 % (1), image, text, audio missing",
    ]
    assert repr(table) == str(table) == f"MissingTable({text.splitlines()[0]})"
    assert "30 % image / 100 % text present" in missing_table(200, PAIR, 0.7, "image").describe()
    assert repr(missing_table(0, PAIR, 0.7)) == "MissingTable(0 rows of image / text)"


@pytest.mark.parametrize(
    ("ids", "present", "error", "match"),
    [
        (2, torch.ones(2, 2), TypeError, "`present` to be a bool tensor, but got torch.float32"),
        (2, [[True, True]] * 2, TypeError, "but got list"),
        (
            2,
            torch.ones(2, 3, dtype=torch.bool),
            ValueError,
            r"of shape \(2, 2\) for \('image', 'text'\), but got \(2, 3\)",
        ),
        (["a", "a"], torch.ones(2, 2, dtype=torch.bool), ValueError, "no id twice"),
    ],
)
def test_wrong_tables(ids, present, error, match):
    with pytest.raises(error, match=match):
        MissingTable(ids, PAIR, present)


def test_save_and_load(tmp_path):
    ids = ["a", "7", 'Käse, "blau"', "写真\n\u2028", ""]
    rows = [[True, False, True], [True, True, True], [False, True, True], [False, False, False], [True, True, False]]
    table = MissingTable(ids, ("text", "Bild", "audio"), torch.tensor(rows))
    table.save(tmp_path / "table.jsonl")
    assert os.listdir(tmp_path) == ["table.jsonl"]
    written = (tmp_path / "table.jsonl").read_bytes()
    assert written.startswith(b'{"id": "a", "text": true, "Bild": false, "audio": true}\n')
    assert "Käse" in written.decode()
    assert written.count(b"\n") == 5
    again = MissingTable.load(tmp_path / "table.jsonl")
    assert again.ids == tuple(ids)
    assert again.modalities == ("text", "Bild", "audio")
    assert torch.equal(again.present, table.present)
    again.save(str(tmp_path / "table.jsonl"))
    assert (tmp_path / "table.jsonl").read_bytes() == written


def test_files_written_by_hand(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_bytes(
        '\ufeff{"id": 7, "text": true, "image": false}\r\n\r\n{"image": true, "text": false, "id": "x"}\n\n'.encode()
    )
    table = MissingTable.load(path)
    assert table.ids == ("7", "x")
    assert table.modalities == ("text", "image")
    assert table.present.tolist() == [[True, False], [False, True]]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path):
    missing_table(2, PAIR, 0).save(tmp_path / "table.jsonl")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "table.jsonl").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_threads_save_to_one_path(tmp_path, monkeypatch):
    """So do containers that share a disk, each with the same process id."""
    path, replace, both_written = tmp_path / "table.jsonl", os.replace, threading.Barrier(2, timeout=10)

    def replace_when_both_are_written(*paths):
        both_written.wait()
        replace(*paths)

    tables = [missing_table(50, PAIR, rate) for rate in (0, 1)]
    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(os, "replace", replace_when_both_are_written)
        list(pool.map(lambda table: table.save(path), tables))
    assert os.listdir(tmp_path) == ["table.jsonl"]
    assert lacking(MissingTable.load(path)) in [lacking(table) for table in tables]


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "table.jsonl"
    missing_table(2, PAIR, 0).save(path)
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        missing_table([*range(500), "\ud800"], PAIR, 0.5).save(path)
    with pytest.raises(ValueError, match="at least one row to save"):
        missing_table(0, PAIR, 0).save(path)

    def full(*_):
        raise OSError("full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="full"):
        missing_table(2, PAIR, 1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["table.jsonl"]


FIRST = {"id": "a", "image": True, "text": False}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{'id': 'b'}", 'line 3: Expected JSON, but got b"{'),
        (b'{"id": "\xff", "image": true, "text": true}', "line 3: Expected JSON"),
        ('["b", true]', "line 3: Expected an object with an 'id'"),
        ('{"image": true, "text": true}', "line 3: Expected an object with an 'id'"),
        ({**FIRST, "id": None}, "line 3: Expected ids to be strings or integers, but got None"),
        ({**FIRST, "id": True}, "line 3: Expected ids .* got True"),
        ({**FIRST, "id": ["b"]}, "line 3: Expected ids"),
        ({**FIRST, "id": "b", "text": 1}, "line 3: Expected true or false for 'text', but got 1"),
        ({**FIRST, "id": "b", "text": "true"}, "line 3: Expected true or false for 'text', but got 'true'"),
        ({**FIRST, "id": "b", "text": None}, "line 3: Expected true or false for 'text', but got None"),
        (
            '{"id": "b", "image": true, "image": false, "text": true}',
            "line 3: Expected no key twice, .* 'image', 'image'",
        ),
        ('{"id": "b", "id": "c", "image": true, "text": true}', "line 3: Expected no key twice, but got .'id', 'id'"),
        ({"id": "b", "image": True}, r"line 3: Expected the modalities \('image', 'text'\), but got \('image',\)"),
        ({**FIRST, "id": "b", "audio": True}, "line 3: Expected the modalities .*'audio'"),
        (FIRST, "line 3: Expected no id twice, but got 'a' again"),
    ],
)
def test_wrong_files(tmp_path, line, match):
    path = tmp_path / "bad.jsonl"
    line = json.dumps(line) if isinstance(line, dict) else line
    path.write_bytes(json.dumps(FIRST).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ValueError, match=r"bad\.jsonl, " + match):
        MissingTable.load(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"at least one row in .*bad\.jsonl"),
        ("\n\n", "at least one row"),
        ('{"id": "a"}', r"bad\.jsonl, line 1: Expected at least one modality"),
        ('{"id": "a", "image+text": true}', "line 1: Expected modality names"),
    ],
)
def test_files_without_modalities(tmp_path, text, match):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(ValueError, match=match):
        MissingTable.load(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(("dtype", "legacy"), [(torch.float32, False), (torch.float32, True), (torch.int64, False)])
def test_tables_of_map(tmp_path, dtype, legacy):
    codes = torch.tensor([0, 1, 2, 2], dtype=dtype)
    torch.save(codes, tmp_path / "map.pt", _use_new_zipfile_serialization=not legacy)
    table = load_map_table(tmp_path / "map.pt", ["a", "b", "c", "d"])
    assert table.ids == ("a", "b", "c", "d")
    assert lacking(table) == ["", "text", "image", "image"]
    assert load_map_table(str(tmp_path / "map.pt")).ids == ("0", "1", "2", "3")
    swapped = load_map_table(tmp_path / "map.pt", modalities=("text", "image"))
    assert torch.equal(swapped.present, table.present.flip(1))


class Code:
    """What a file that runs code when it is loaded would hold."""

    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (torch.tensor([0.0, 1.0, 3.0]), r"map\.pt: Expected codes among \[0, 1, 2\], but got 3\.0 in row 2"),
        (torch.tensor([True]), r"map\.pt: Expected codes, but got a boolean mask"),
        (torch.zeros(4, 2), r"map\.pt to hold a tensor of shape \(N,\), but got shape \(4, 2\)"),
        (torch.tensor(1.0), r"map\.pt .* but got shape \(\)"),
        ([0, 1, 2], r"map\.pt .* but got list"),
        ({"train": torch.zeros(3)}, r"map\.pt .* but got dict"),
        (Code(), r"map\.pt .* cannot be read"),
    ],
)
def test_wrong_tables_of_map(tmp_path, content, match):
    torch.save(content, tmp_path / "map.pt")
    with pytest.raises(ValueError, match=match):
        load_map_table(tmp_path / "map.pt")


def test_other_wrong_files_of_map(tmp_path):
    path = tmp_path / "map.pt"
    for content in (b"", b"no pickle", b"PK\x03\x04 no zip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"map\.pt .* cannot be read"):
            load_map_table(path)
    with pytest.raises(FileNotFoundError):
        load_map_table(tmp_path / "none.pt")
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"Expected 3 ids, as .*map\.pt has rows, but got 2"):
        load_map_table(path, ["a", "b"])
    with pytest.raises(ValueError, match=r"map\.pt: Expected `modalities` to be 'image' and 'text'"):
        load_map_table(path, modalities=("image", "audio"))
