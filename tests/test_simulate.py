"""Missing tables: exact counts, the same on every machine, and files that come back as they were."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

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


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100, 101])
@pytest.mark.parametrize("rate", [0, 0.01, 0.3, 0.7, 0.95, 1])
@pytest.mark.parametrize("names", [PAIR, TRIO, ("a", "b", "c", "d")])
def test_equal_shares(count, rate, names):
    gone = Counter(lacking(missing_table(count, names, rate)))
    complete = gone.pop("", 0)
    assert complete == count - round(rate * count)
    assert "+".join(names) not in gone
    cases = 2 ** len(names) - 2
    assert set(gone.values()) <= {(count - complete) // cases, (count - complete) // cases + 1}
    assert len(gone) == min(cases, count - complete)


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
    shares = {"image+audio": 3, "text": 1}
    assert Counter(lacking(missing_table(100, TRIO, 0.4, shares))) == {"": 60, "image+audio": 30, "text": 10}
    assert Counter(lacking(missing_table(9, TRIO, 1, "text"))) == {"text": 9}


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 0.99])
def test_shares_are_rounded(share):
    shares = {"image": share, "text": 1 - share}
    for count in range(1, 40):
        images = lacking(missing_table(count, PAIR, 1, shares)).count("image")
        assert abs(images - share * count) <= 0.5 + 1e-9


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


@pytest.mark.parametrize("weights", [None, torch.arange(1, 201)])
@pytest.mark.parametrize("missing", ["all", "text", {"image": 0.3, "text+audio": 0.7}])
def test_a_higher_rate_adds_rows(weights, missing):
    rates = [i / 20 for i in range(21)]
    tables = [lacking(missing_table(200, TRIO, rate, missing, seed=3, weights=weights)) for rate in rates]
    for low, high in pairwise(tables):
        assert all(before in ("", after) for before, after in zip(low, high, strict=True))


@pytest.mark.parametrize("count", [0, 1, 10, 101])
@pytest.mark.parametrize("rates", [(0, 0), (0.3, 0.5), (1, 0), (0.5, 0.5), (0.2, 0.3, 0), (0.9, 0.1, 1), (2 / 3,) * 3])
def test_rates_by_modality(count, rates):
    names = TRIO[: len(rates)]
    wanted = [round(rate * count) for rate in rates]
    if sum(wanted) > count * (len(names) - 1):
        with pytest.raises(ValueError, match="leave each of"):
            missing_table(count, names, dict(zip(names, rates, strict=True)))
        return
    for seed in range(20):
        present = missing_table(count, names, dict(zip(names, rates, strict=True)), seed=seed).present
        assert (~present).sum(0).tolist() == wanted
        assert present.any(1).all()


def test_rates_by_modality_that_are_only_just_possible():
    """All counts for five rows: there is a table if and only if the counts leave each row one modality."""
    for a in range(6):
        for b in range(6):
            for c in range(6):
                rates = {"image": a / 5, "text": b / 5, "audio": c / 5}
                if a + b + c <= 10:
                    for seed in range(3):
                        present = missing_table(5, TRIO, rates, seed=seed).present
                        assert (~present).sum(0).tolist() == [a, b, c]
                        assert present.any(1).all()
                else:
                    with pytest.raises(ValueError, match="5 rows a modality"):
                        missing_table(5, TRIO, rates)


def test_rates_by_modality_are_independent():
    rows, rates = 20000, {"image": 0.3, "text": 0.2, "audio": 0.1}
    gone = Counter(lacking(missing_table(rows, TRIO, rates)))
    for pair, chance in (("image+text", 0.06 * 0.9), ("image+audio", 0.03 * 0.8), ("text+audio", 0.02 * 0.7)):
        assert abs(gone[pair] / rows - chance) < 0.006  # The 0.6 % that would lose all three are elsewhere.


def test_a_modality_without_a_rate_stays():
    assert Counter(lacking(missing_table(10, TRIO, {"text": 0.4}))) == {"": 6, "text": 4}


def test_given_gaps_stay_and_only_complete_rows_lose_something():
    given = torch.ones(100, 3, dtype=torch.bool)
    given[:20, 0] = given[:5, 1] = given[0, 2] = False
    before = given.clone()
    for rate in (0.5, {"image": 0.5, "text": 0.25}):
        table = missing_table(100, TRIO, rate, given=given)
        assert torch.equal(given, before)
        assert torch.equal(table.present[:20], given[:20])
        lost = ~table.present[20:]
        if rate == 0.5:
            assert lost.any(1).sum() == 40
        else:
            assert lost.sum(0).tolist() == [40, 20, 0]
    assert not missing_table(100, TRIO, 1, given=given).present[20:].all(1).any()
    assert torch.equal(missing_table(100, TRIO, 1, given=torch.zeros_like(given)).present, torch.zeros_like(given))
    assert torch.equal(missing_table(100, TRIO, 0, given=given).present, given)


def test_missingness_depends_on_the_label():
    labels = torch.arange(1000) % 4
    table = missing_table(1000, PAIR, 0.3, weights=1 + 4 * (labels == 3))
    rate = [(~table.present.all(1))[labels == k].double().mean().item() for k in range(4)]
    assert sum(rate) == pytest.approx(1.2)
    assert max(rate[:3]) < 0.27
    assert rate[3] > 0.6
    # With few rows drawn, the odds are the weights: 5 to 1.
    draws = [missing_table(40, PAIR, 1 / 40, seed=s, weights=1 + 4 * (labels[:40] == 3)) for s in range(1000)]
    chosen = torch.stack([~table.present.all(1) for table in draws]).double().mean(0)
    assert chosen[labels[:40] == 3].sum().item() == pytest.approx(5 / 8, abs=0.04)
    assert torch.allclose(chosen[:3], torch.full((3,), 1 / 80).double(), atol=0.015)


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
        ({"missing": []}, ValueError, "a positive share"),
        ({"missing": {"image": 0, "text": 0.0}}, ValueError, "a positive share"),
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
        ({"given": torch.ones(4, 2)}, TypeError, r"`given` to be a bool tensor, but got torch.float32"),
        ({"given": np.ones((4, 2), dtype=bool)}, TypeError, "but got ndarray"),
        ({"given": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"of shape \(4, 2\) .* but got \(3, 2\)"),
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
    rows = [[True, True, True]] * 5 + [[True, True, False], [False, True, True], [True, False, False], [False] * 3]
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
    assert "65 % image / 65 % text present" in missing_table(200, PAIR, 0.7).describe()
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


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "table.jsonl"
    missing_table(2, PAIR, 0).save(path)
    before = path.read_bytes()
    with pytest.raises(UnicodeEncodeError):
        missing_table([*range(5000), "\ud800"], PAIR, 0.5).save(path)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64])
@pytest.mark.parametrize("legacy", [False, True])
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


def test_not_imported_unless_asked_for():
    code = "import sys, protohead; assert 'protohead.simulate' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
