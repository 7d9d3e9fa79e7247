"""The readers of examples/datasets on tiny folders in their owners' layouts; presets; tables of what is missing."""

import csv
import importlib.util
import json
import sys

import clip_finetune
import clip_training
import files as files_module
import presets
import pytest
import rows as rows_module
import torch
from PIL import Image
from test_examples import TINY, call, load_program, one_thread, table  # noqa: F401

from protohead.simulate import MissingTable

TEXTS = ["a red fox", "two old maps", "one fish", "a film", "rain", "sun"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY))
    return f"local-dir:{folder}"


def picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (40 * number % 256, 90, 10)).save(path)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def hatememes(folder):
    for place, name in enumerate(("train", "dev_seen", "test_seen", "dev_unseen")):
        lines = []
        for number in range(6):
            id = 1000 * place + number
            picture(folder / "img" / f"{id:05}.png", number)
            lines.append({"id": id, "img": f"img/{id:05}.png", "label": number % 2, "text": TEXTS[number]})
        write_lines(folder / f"{name}.jsonl", lines)
    return folder


GENRES = [
    ["Drama", "Film-Noir"],
    ["Comedy"],
    ["Drama", "News"],
    ["Adult"],
    ["Sci-Fi", "Comedy"],
    ["Film-Noir", "Sci-Fi"],
]


def mmimdb(folder):
    split = {}
    for place, name in enumerate(("test", "train", "dev")):  # The order in the file does not matter.
        split[name] = [f"{1000 * place + number:07}" for number in (3, 0, 1, 5, 4, 2)]
        for film in split[name]:
            number = int(film) % 1000
            picture(folder / "dataset" / f"{film}.jpeg", number)
            about = {"title": "x", "genres": GENRES[number], "plot": [TEXTS[number], "a longer second plot"]}
            (folder / "dataset" / f"{film}.json").write_text(json.dumps(about))
    (folder / "split.json").write_text(json.dumps(split))
    return folder


def food101(folder):
    (folder / "texts").mkdir(parents=True)
    for part, count in (("train", 12), ("test", 3)):
        with open(folder / "texts" / f"{part}_titles.csv", "w", newline="") as file:
            for number in range(count):
                for name in ("apple_pie", "ramen"):
                    stem = f"{name}_{number + 100 * (part == 'test')}.jpg"
                    picture(folder / "images" / part / name / stem, number)
                    csv.writer(file).writerow([stem, f'{name}, "the best"', name])
    return folder


LAYOUTS = {"hatememes": hatememes, "mmimdb": mmimdb, "food101": food101}


def finetune(monkeypatch, *arguments):
    call(monkeypatch, clip_finetune, "--workers", 0, "--device", "cpu", "--epochs", 1, *arguments)


# -- what is read -----------------------------------------------------------------------------------------------------


def test_every_reader_is_tested():
    assert set(files_module.READERS) == set(LAYOUTS)


def test_hatememes(tmp_path):
    rows, several = rows_module.read(hatememes(tmp_path), dataset="hatememes")
    assert not several
    assert [row.split for row in rows] == ["train"] * 6 + ["val"] * 6 + ["test"] * 6
    assert [row.id for row in rows[:2] + rows[6:8]] == ["0", "1", "1000", "1001"]
    row = rows[7]
    assert row == (
        f"{tmp_path}/dev_seen.jsonl line 2",
        tmp_path / "img" / "01001.png",
        TEXTS[1],
        ["1"],
        "val",
        "1001",
        "",
    )


def test_mmimdb(tmp_path):
    rows, several = rows_module.read(mmimdb(tmp_path), dataset="mmimdb")
    assert several
    assert [row.split for row in rows] == ["train"] * 6 + ["val"] * 6 + ["test"] * 6
    assert [row.id for row in rows[:6]] == ["0001003", "0001000", "0001001", "0001005", "0001004", "0001002"]
    assert [row.labels for row in rows[:6]] == [[], GENRES[0], GENRES[1], GENRES[5], GENRES[4], ["Drama"]]
    assert [row.text for row in rows[6:8]] == [TEXTS[3], TEXTS[0]]
    assert rows[6].image == tmp_path / "dataset" / "0002003.jpeg"


def test_food101(tmp_path):
    rows, several = rows_module.read(food101(tmp_path), dataset="food101")
    assert not several
    splits = {split: [row.id for row in rows if row.split == split] for split in files_module.SPLITS}
    assert {split: len(ids) for split, ids in splits.items()} == {"train": 20, "val": 4, "test": 6}
    assert splits["val"] == ["apple_pie_1.jpg", "ramen_1.jpg", "apple_pie_11.jpg", "ramen_11.jpg"]
    assert splits["test"][0] == "apple_pie_100.jpg"
    row = rows[-1]
    assert row.where == f"{tmp_path}/texts/test_titles.csv line 6"
    assert row.image == tmp_path / "images" / "test" / "ramen" / "ramen_102.jpg"
    assert (row.text, row.labels) == ('ramen, "the best"', ["ramen"])


# -- other layouts ----------------------------------------------------------------------------------------------------


def test_the_first_release_of_hatememes(tmp_path):
    folder = hatememes(tmp_path)
    whole, _ = rows_module.read(folder, dataset="hatememes")
    for name in ("dev", "test"):
        (folder / f"{name}_seen.jsonl").rename(folder / f"{name}.jsonl")
    rows, _ = rows_module.read(folder, dataset="hatememes")
    assert [row._replace(where="") for row in rows] == [row._replace(where="") for row in whole]
    lines = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    write_lines(folder / "test.jsonl", [{name: x for name, x in line.items() if name != "label"} for line in lines])
    with pytest.raises(files_module.InputError, match=r"test\.jsonl line 1 has none: the first release has none"):
        rows_module.read(folder, dataset="hatememes")
    assert len(rows_module.read(folder, labelled=False, dataset="hatememes")[0]) == 18
    assert rows_module.map_order(folder, "hatememes")["test"] == [row.id for row in whole[12:]]
    write_lines(folder / "test_seen.jsonl", lines[::-1])  # MAP's tables could be of either.
    with pytest.raises(files_module.InputError, match=r"\['test_seen.jsonl', 'test.jsonl'\] in .* the same order"):
        rows_module.map_order(folder, "hatememes")


def test_mmimdb_as_map_lays_it_out(tmp_path):
    folder = mmimdb(tmp_path)
    whole, _ = rows_module.read(folder, dataset="mmimdb")
    (folder / "images").mkdir()
    (folder / "dataset").rename(folder / "labels")
    with pytest.raises(files_module.InputError, match="a picture that exists, but film"):
        rows_module.read(folder, dataset="mmimdb")
    for path in (folder / "labels").glob("*.jpeg"):
        path.rename(folder / "images" / path.name)
    rows, several = rows_module.read(folder, dataset="mmimdb")
    assert several
    assert [(row.id, row.text, row.labels, row.split) for row in rows] == [
        (row.id, row.text, row.labels, row.split) for row in whole
    ]
    assert rows[6].image == folder / "images" / "0002003.jpeg"
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(files_module.InputError, match="the folder dataset/, or images/ and labels/, in"):
        rows_module.read(folder, dataset="mmimdb")


def test_titles_that_are_no_csv(tmp_path, capsys):
    folder = food101(tmp_path)
    path = folder / "texts" / "test_titles.csv"
    lines = [
        'ramen_100.jpg,"18 inch ramen, with egg,ramen',
        'ramen_101.jpg,the "best" ramen,ramen',
        'ramen_102.jpg,"a ""good"" one, with egg",ramen',
        'apple_pie_100.jpg,"one" and "two",apple_pie',
        "apple_pie_101.jpg,two\u2028lines\x0b,apple_pie",
        'apple_pie_102.jpg,12",apple_pie',
    ]
    path.write_text("\r\n".join(lines) + "\r\n")
    rows, _ = rows_module.read(folder, dataset="food101")
    assert [(row.text, *row.labels) for row in rows if row.split == "test"] == [
        ('"18 inch ramen, with egg', "ramen"),
        ('the "best" ramen', "ramen"),
        ('a "good" one, with egg', "ramen"),
        ('"one" and "two"', "apple_pie"),
        ("two\u2028lines", "apple_pie"),
        ('12"', "apple_pie"),
    ]
    assert f"{path} has 6 rows, the published one 22716." in capsys.readouterr().out


def test_food101_as_map_splits_it(tmp_path, capsys):
    folder = food101(tmp_path)
    with pytest.raises(files_module.InputError, match=r"Expected MAP's split\.json"):
        rows_module.map_order(folder, "food101")
    names = [f"{name}_{number}.jpg" for number in (5, 3, 4, 0, 1, 2, 7, 6) for name in ("ramen", "apple_pie")]
    split = {"test": ["ramen_101.jpg", "apple_pie_100.jpg"], "val": names[:4], "train": [*names[4:], "none_1.jpg"]}
    (folder / "split.json").write_text(json.dumps(split))
    rows, _ = rows_module.read(folder, dataset="food101")
    printed = capsys.readouterr().out
    assert "left out, as MAP does: 1 names of train without a title" in printed
    order = rows_module.map_order(folder, "food101")
    assert order == {**split, "train": names[4:]}
    assert {name: [row.id for row in rows if row.split == name] for name in order} == order
    assert rows[-1].image == folder / "images" / "test" / "apple_pie" / "apple_pie_100.jpg"
    assert rows[-1].labels == ["apple_pie"]

    (folder / "text.json").write_text(json.dumps({name: f"title of {name}" for name in [*names, *split["test"]]}))
    (folder / "texts" / "train_titles.csv").unlink()
    rows, _ = rows_module.read(folder, dataset="food101")
    assert {row.text for row in rows} == {f"title of {row.id}" for row in rows}
    assert rows_module.map_order(folder, "food101") == order
    (folder / "split.json").write_text(json.dumps({"train": [], "dev": [], "test": []}))
    with pytest.raises(files_module.InputError, match=r"picture names for train, val, test, but .*split\.json"):
        rows_module.read(folder, dataset="food101")


def test_maps_tables_of_another_split_are_refused(tmp_path, tiny, monkeypatch, capsys):
    """Ours has another number of rows than MAP's split, in another order: positions would mix them up."""
    folder, tables = food101(tmp_path / "data"), [tmp_path / f"{split}.pt" for split in files_module.SPLITS]
    for path, count in zip(tables, (20, 4, 6), strict=True):  # As many as the reader has.
        torch.save(torch.arange(count) % 3, path)
    arguments = ("--data", folder, "--dataset", "food101", "--model", tiny, "--missing-table", *tables)
    with pytest.raises(SystemExit):
        finetune(monkeypatch, *arguments, "--output", tmp_path / "run")
    assert "Expected MAP's split.json in" in capsys.readouterr().err
    names = [f"{name}_{number}.jpg" for number in range(12) for name in ("ramen", "apple_pie")]
    split = {"train": names[:18], "val": names[18:], "test": [f"ramen_{number}.jpg" for number in (100, 101, 102)]}
    (folder / "split.json").write_text(json.dumps(split))
    with pytest.raises(SystemExit):
        finetune(monkeypatch, *arguments, "--output", tmp_path / "run")
    assert f"Expected 20 ids, as {tables[0]} has rows, but got 18" in capsys.readouterr().err
    for path, names in zip(tables, split.values(), strict=True):
        torch.save(torch.arange(len(names)) % 3, path)
    given = remember(monkeypatch)
    finetune(monkeypatch, *arguments, "--output", tmp_path / "run")
    codes = {id: number % 3 for names in split.values() for number, id in enumerate(names)}
    for rows, present in given:
        for row, (image, text) in zip(rows, present.tolist(), strict=True):
            assert (image, text) == (codes[row.id] != 2, codes[row.id] != 1)


# -- what is malformed ------------------------------------------------------------------------------------------------


def change(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


FILM = "film 0001001 of train, {folder}/dataset/0001001.json,"


@pytest.mark.parametrize(
    ("dataset", "file", "damage", "message"),
    [
        ("hatememes", "img/00001.png", [], "{folder}/train.jsonl line 2 has {folder}/img/00001.png; --allow-gaps"),
        ("hatememes", "train.jsonl", [TEXTS[2], "  "], "Expected a text, but {folder}/train.jsonl line 3 has an empty"),
        ("hatememes", "dev_seen.jsonl", ['"label": 1', '"label": 7'], "but {folder}/dev_seen.jsonl line 2 has 7"),
        ("hatememes", "test_seen.jsonl", ['"label": 1, ', ""], "{folder}/test_seen.jsonl line 2 has none: the first"),
        ("hatememes", "train.jsonl", ['"text"', '"caption"'], "{folder}/train.jsonl line 1 lacks ['text']"),
        ("hatememes", "train.jsonl", ["}", ""], "Expected {folder}/train.jsonl line 1 to be readable"),
        ("hatememes", "dev_seen.jsonl", [], "{folder}/dev_seen.jsonl"),
        ("mmimdb", "dataset/0001001.jpeg", [], FILM + " has {folder}/dataset/0001001.jpeg; --allow-gaps"),
        ("mmimdb", "dataset/0001001.json", [], "{folder}/dataset/0001001.json to be readable, but got: [Errno 2]"),
        ("mmimdb", "dataset/0001001.json", [TEXTS[1], ""], "Expected a text, but " + FILM + " has an empty"),
        ("mmimdb", "dataset/0001001.json", ['["two old maps", "a longer second plot"]', "[]"], FILM + " has an empty"),
        ("mmimdb", "dataset/0001001.json", ["Comedy", "Comedie"], FILM + " has ['Comedie']"),
        ("mmimdb", "dataset/0001001.json", ["genres", "genre"], FILM + " has other things"),
        ("mmimdb", "dataset/0001001.json", ["{", ""], "Expected " + FILM + " to be readable"),
        ("mmimdb", "split.json", ['"dev"', '"val"'], "for train, dev, test, but {folder}/split.json has other things"),
        ("mmimdb", "split.json", [], "Expected {folder}/split.json to be readable, but got: [Errno 2]"),
        (
            "food101",
            "images/train/ramen/ramen_3.jpg",
            [],
            "{folder}/texts/train_titles.csv line 8 has {folder}/images/train/ramen/ramen_3.jpg; --allow-gaps",
        ),
        (
            "food101",
            "texts/test_titles.csv",
            ['"ramen, ""the best"""', ""],
            "Expected a text, but {folder}/texts/test_titles.csv line 2 has an empty",
        ),
        (
            "food101",
            "texts/test_titles.csv",
            [",ramen\n", ",raman\n"],
            "a folder in {folder}/images/test, but {folder}/texts/test_titles.csv line 2 has 'raman'",
        ),
        (
            "food101",
            "texts/train_titles.csv",
            ['ramen_0.jpg,"ramen, ""the best""",ramen', "ramen_0.jpg,"],
            "{folder}/texts/train_titles.csv line 2 has 2 fields",
        ),
        ("food101", "texts/test_titles.csv", [], "{folder}/texts/test_titles.csv to be readable, but"),
    ],
)  # fmt: skip
def test_malformed(tmp_path, monkeypatch, capsys, dataset, file, damage, message):
    data = LAYOUTS[dataset](tmp_path / "data")
    change(data / file, *damage) if damage else (data / file).unlink()
    with pytest.raises(SystemExit):
        finetune(monkeypatch, "--data", data, "--dataset", dataset, "--output", tmp_path / "run")
    printed = capsys.readouterr().err
    assert message.format(folder=data) in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("dataset", LAYOUTS)
def test_gaps_are_missing_where_that_is_allowed(tmp_path, capsys, dataset):
    data = LAYOUTS[dataset](tmp_path)
    file, text = {
        "hatememes": ("train.jsonl", TEXTS[2]),
        "mmimdb": ("dataset/0001002.json", TEXTS[2]),
        "food101": ("texts/train_titles.csv", '"ramen, ""the best"""'),
    }[dataset]
    whole, _ = rows_module.read(data, dataset=dataset)
    assert "Taken for missing" not in capsys.readouterr().out
    change(data / file, text, "")
    whole[0].image.unlink()
    rows, _ = rows_module.read(data, dataset=dataset, allow_gaps=True)
    printed = capsys.readouterr().out
    assert f"1 pictures that are not there ({whole[0].image})" in printed
    assert "1 empty texts (" in printed
    assert rows[0] == whole[0]._replace(image=None, note=f"not there: {whole[0].image}")
    (changed,) = [row for row in rows if row.text is None]
    assert changed == next(row for row in whole if row.id == changed.id)._replace(text=None)
    assert len(rows) == len(whole)
    assert rows_module.present_of(rows).sum() == 2 * len(rows) - 2


# -- what is published ------------------------------------------------------------------------------------------------


def test_presets():
    for variant in ("DPL_DCP", "DPL_NoPrompt"):
        for dataset in LAYOUTS:
            for missing in ("image", "text", "both"):
                for rate in (0.5, 0.7, 0.9):
                    settings, _ = presets.published(variant, dataset, missing, rate)
                    common = {"scale": 32.0, "lr": 0.01, "batch_size": 256, "epochs": 20}
                    assert settings.items() >= common.items()
                    assert (settings["margin"]["image+text"] == 0.1) == (dataset == "mmimdb")
    assert presets.published("DPL_DCP", "food101", "image", 0.9)[0]["margin"] == {
        "image+text": 0.15, "image": 0.25, "text": 0.25,
    }  # fmt: skip
    assert presets.published("DPL_DCP", "food101", "image", 0.9)[0]["weight"] == 0.6
    assert presets.published("DPL_DCP", "mmimdb", "text", 0.9) == (
        {**common, "weight": 0.9, "margin": {"image+text": 0.1, "image": 0.15, "text": 0.15}}
        | {"encoder_lr": 0.01, "prompts": "dcp", "head": "prototype"}, "",
    )  # fmt: skip
    settings, notes = presets.published("DPL_DCP", "hatememes", "both", 0.7)
    assert (settings["weight"], notes) == (0.5, "Published as well: λ 5.0 (commit 2036c2b).")
    settings, notes = presets.published("DPL_NoPrompt", "hatememes", "both", 0.9)
    assert (settings["weight"], notes) == (0, "Its script says λ 7.0, but its code multiplies this loss by zero.")
    settings, notes = presets.published("DPL_NoPrompt", "mmimdb", "both", 0.7)
    assert (settings["weight"], notes) == (0.9, "Published as well: λ 0.2 (commit f4af831).")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "mmimdb", "--missing-rate", 0.6, "--missing", "text"],
            "published for DPL_DCP on mmimdb with text missing: 0.5, 0.7, 0.9; but got 0.6",
        ),
        (["--dataset", "mmimdb"], "0.5, 0.7, 0.9; but got 0.0"),
        (["--missing-rate", 0.7], "Expected --dataset with --preset"),
        (["--missing", "text"], "Expected --missing-rate or --missing-table with --missing"),
    ],
)
def test_wrong_options(tmp_path, monkeypatch, capsys, arguments, message):
    if arguments[0] != "--missing":
        arguments = ["--preset", "DPL_DCP", *arguments]
    with pytest.raises(SystemExit):
        finetune(monkeypatch, "--data", tmp_path, *arguments, "--output", tmp_path / "run")
    assert message in capsys.readouterr().err


# -- what goes missing ------------------------------------------------------------------------------------------------


def remember(monkeypatch):
    """What the model is given: the rows and present of each split."""
    given = []

    class Remembering(rows_module.Rows):
        def __init__(self, rows, present, *others):
            super().__init__(rows, present, *others)
            given.append((rows, present))

    monkeypatch.setattr(clip_training, "Rows", Remembering)
    return given


def test_preset_and_missing_table(tmp_path, tiny, monkeypatch, capsys):
    data, given, built = mmimdb(tmp_path / "data"), remember(monkeypatch), []
    build = clip_training.build
    monkeypatch.setattr(clip_training, "build", lambda settings: built.append(build(settings)) or built[-1])
    arguments = ("--data", data, "--dataset", "mmimdb", "--model", tiny)
    drawn = (*arguments, "--missing", "text", "--missing-rate", 0.5, "--preset", "DPL_DCP", "--prompts", "none")
    finetune(monkeypatch, *drawn, "--output", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "DPL_DCP: scale 32.0, lr 0.01, batch_size 256, epochs 1, weight 0.4, margin {'image+text': 0.1," in printed
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["weight"] == 0.4
    head = built[0][0].head
    assert head.margin.tolist() == pytest.approx([0.1, 0.15, 0.15])
    assert [len(rows) for rows, _ in given] == [6, 6, 6]
    for _, present in given:
        assert present.sum(0).tolist() == [6, 3]
    assert not torch.equal(given[0][1], given[1][1])  # Of another seed.
    counts = {line["case"]: line["rows"] for line in table(tmp_path / "run" / "scores.csv")}
    assert counts == {"image+text": "3", "image": "3", "all rows": "6", "mean of cases": "6"}
    saved = MissingTable.load(tmp_path / "run" / "missing.jsonl")
    for rows, present in given:
        assert torch.equal(saved.select([row.id for row in rows]), present)

    path = tmp_path / "table.jsonl"  # In another order of rows and of columns.
    write_lines(
        path,
        [
            {"id": id, "text": text, "image": image}
            for id, (image, text) in reversed(list(zip(saved.ids, saved.present.tolist(), strict=True)))
        ],
    )
    finetune(monkeypatch, *drawn, "--weight", 0.7, "--missing-table", path, "--output", tmp_path / "again")
    assert "weight 0.7, margin {'image+text': 0.1," in capsys.readouterr().out
    assert json.loads((tmp_path / "again" / "settings.json").read_text())["weight"] == 0.7
    for (_, present), (_, again) in zip(given[:3], given[3:], strict=True):
        assert torch.equal(present, again)

    finetune(monkeypatch, "--predict", data, "--dataset", "mmimdb", "--output", tmp_path / "run")
    predictions = table(tmp_path / "run" / "data.predictions.csv")
    assert [line["has"] for line in predictions] == ["image+text"] * 18
    assert predictions[0]["row"] == f"film 0001003 of train, {data}/dataset/0001003.json,"


def test_test_rows_without_labels_are_predicted(tmp_path, tiny, monkeypatch):
    data = hatememes(tmp_path / "data")
    run = ("--dataset", "hatememes", "--output", tmp_path / "run")
    finetune(monkeypatch, "--data", data, "--model", tiny, *run)
    path = data / "test_seen.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [{name: x for name, x in line.items() if name != "label"} for line in lines])
    finetune(monkeypatch, "--predict", data, *run)
    assert len(table(tmp_path / "run" / "data.predictions.csv")) == 18


def test_maps_tables_are_joined_by_the_ids_of_their_order(tmp_path):
    rows, _ = rows_module.read(hatememes(tmp_path), dataset="hatememes")
    order = rows_module.map_order(tmp_path, "hatememes")
    splits = rows_module.split_rows(rows[::-1], 0)  # In another order than the tables.
    files = [tmp_path / f"{split}.pt" for split in splits]
    codes = [[0.0, 1, 2, 0, 1, 2], [1.0, 1, 1, 0, 0, 0], [2.0, 2, 0, 0, 0, 0]]  # Complete, text, image missing.
    for file, code in zip(files, codes, strict=True):
        torch.save(torch.tensor(code), file)
    found = rows_module.missing_of(splits, files=files, order=order)
    wanted = {0: [True, True], 1: [True, False], 2: [False, True]}
    for split, code in zip(splits, codes, strict=True):
        assert found.select(order[split]).tolist() == [wanted[x] for x in code]
    gap = splits["train"][4]._replace(image=None)  # Its text is missing as well, in the table.
    assert gap.id == "1"
    splits["train"][4] = gap
    assert rows_module.missing_of(splits, files=files, order=order).select([gap.id]).tolist() == [[False, False]]

    with pytest.raises(files_module.InputError, match=r"a \.jsonl, which has ids, but got .*train\.pt"):
        rows_module.missing_of(splits, files=files)
    torch.save(torch.tensor([0.0, 1]), files[1])
    with pytest.raises(files_module.InputError, match=r"Expected 2 ids, as .*val\.pt has rows, but got 6"):
        rows_module.missing_of(splits, files=files, order=order)


def test_tables_that_do_not_fit(tmp_path):
    rows, _ = rows_module.read(hatememes(tmp_path), dataset="hatememes")
    splits = rows_module.split_rows(rows, 0)
    path = tmp_path / "table.jsonl"
    lines = [{"id": row.id, "image": True, "text": False} for row in rows]

    def refused(match, files, splits=splits):
        with pytest.raises(files_module.InputError, match=match):
            rows_module.missing_of(splits, files=files)

    write_lines(path, lines)
    assert not rows_module.missing_of(splits, files=[path]).present[:, 1].any()
    refused(
        r"one \.jsonl, or a \.pt each of train, val, test, but got .*table\.jsonl .*a\.pt", [path, tmp_path / "a.pt"]
    )
    refused(r"a\.pt: MAP's \.pt have none", [tmp_path / "a.pt"] * 3)
    refused(r"none\.jsonl", [tmp_path / "none.jsonl"])
    twice = {**splits, "val": [rows[1]._replace(id="0")]}
    refused(r"train\.jsonl line 1 and .*train\.jsonl line 2 have '0'", [path], twice)
    write_lines(path, lines[:-1])
    refused(r"table\.jsonl: .*'2005'", [path])
    write_lines(path, [{"id": line["id"], "image": True, "audio": True} for line in lines])
    refused(r"table\.jsonl to be of \('image', 'text'\), but got \('image', 'audio'\)", [path])
    write_lines(path, [*lines, lines[0]])
    refused(r"table\.jsonl", [path])


def test_any_table_of_rows_can_go_missing(tmp_path):
    path = tmp_path / "data.csv"
    picture(tmp_path / "a.png", 1)
    path.write_text("id,image,text,label\n" + "".join(f"row{i},a.png,text {i},{i % 2}\n" for i in range(20)))
    splits = rows_module.split_rows(rows_module.read(path)[0], 0)
    found = rows_module.missing_of(splits, "image", 0.5)
    assert sorted(found.ids) == sorted(f"row{i}" for i in range(20))
    assert found.present.sum(0).tolist() == [20 - sum(round(len(part) / 2) for part in splits.values()), 20]
    path.write_text(path.read_text().replace("id,", "number,", 1))
    assert [row.id for row in rows_module.read(path)[0]][:3] == ["0", "1", "2"]


# -- the folder's name ------------------------------------------------------------------------------------------------


def test_the_folder_is_not_taken_for_hugging_faces_package(monkeypatch):
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    if importlib.util.find_spec("datasets").origin is not None:
        pytest.skip("Hugging Face's package is installed, and is found before the folder.")
    load_program("huggingface")
    assert importlib.util.find_spec("datasets") is None
