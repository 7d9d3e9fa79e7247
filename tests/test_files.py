"""What tables and folders look like in the wild: read right, or refused with file and line (examples/files.py)."""

import csv
import json

import files
import labels
import pytest
import rows
from PIL import Image

NAMES = ("a.png", "b.png")


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def read(folder, content, name="data.csv", **options):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found, several = rows.read(path, **options)
    return [(row.image and row.image.name, row.text, row.labels) for row in found], several


def refused(folder, content, message, name="data.csv", **options):
    with pytest.raises(files.InputError) as error:
        read(folder, content, name, **options)
    assert message.format(path=folder / name) in str(error.value)


PLAIN = [("a.png", "two, three", ["dog"]), (None, "four", ["cat"])]

# -- quotes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ['a.png,"18 inch pan,dog', "a.png,two,cat", 'a.png,the "best" pie,cat', "a.png,four,dog"],
            "closed quotes, but {path} line 2 opens one that line 4 does not close",
        ),
        (["a.png,one,dog", 'a.png,"two,cat', "a.png,three,cat"], "{path} line 3 opens one that line 4 does not close"),
        # The quote of another inch ends it: a reader of CSV gives one row of these two.
        (
            ['a.png,"18 inch pan,dog', 'a.png,pan of 12",cat', "a.png,a,dog"],
            "line 2 opens one that ends in line 3, and",
        ),
        (['a.png,"18 inch, steel,dog', 'b.png,pan of 12",cat'], "line 2 opens one that ends in line 3, and each"),
        ([',"18 inch pan,dog', ",two,cat", ',pan of 12",dog'], "line 2 opens one that ends in line 4, and each"),
        ([r'a.png,"the \"best\" pie",dog'], "line 2 opens one that line 2 does not close"),
        (['a.png,"two"  ,dog'], "line 2 opens one that line 2 does not close"),
        (["a.png,one,dog", f'a.png,"{"x" * 140_000}",dog'], "{path} line 3 begins a longer one, of 131072 characters"),
        (["a.png,one,dog", "a.png,two"], "Expected 3 fields, as in the header, but {path} line 3 has 2"),
        (["a.png,one,dog", "", "a.png,two, three,dog"], "Expected 3 fields, as in the header, but {path} line 4 has 4"),
    ],
)
def test_quotes_and_fields_that_do_not_fit(folder, lines, message):
    refused(folder, "\n".join(["image,text,label", *lines, ""]), message)


def test_quotes_that_fit(folder):
    content = 'image,text,label\na.png, "the ""best"", and\nlargest pie",dog\n'
    content += 'b.png,18" pan,cat\n\nb.png,"Dear all,\nyours, Ann",dog\n,"I came, I saw\nand left, again",dog\n'
    assert read(folder, content)[0] == [
        ("a.png", 'the "best", and\nlargest pie', ["dog"]),
        ("b.png", '18" pan', ["cat"]),
        ("b.png", "Dear all,\nyours, Ann", ["dog"]),
        (None, "I came, I saw\nand left, again", ["dog"]),
    ]


def test_a_row_is_where_it_begins(folder):
    (folder / "data.csv").write_text('text,label\n"two\nlines",dog\none,cat\n')
    assert [row.where for row in rows.read(folder / "data.csv")[0]] == [
        f"{folder / 'data.csv'} line {number}" for number in (2, 4)
    ]


# -- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "image,text,label",
        " Image ,TEXT,Label",
        "filename,caption,category",
        "File Name,Title,class",
        "image_path,description,target",
        '"image","text","label"',
    ],
)
def test_names_of_columns(folder, capsys, header):
    assert read(folder, header + '\na.png,"two, three",dog\n,four,cat\n') == (PLAIN, False)
    printed = capsys.readouterr().out
    assert ("image is" in printed) == (header not in ("image,text,label", '"image","text","label"'))


def test_what_is_used_and_what_is_not_is_said(folder, capsys):
    read(folder, "path,text,title,price,label\na.png,one,two,3,dog\n")
    assert "image is 'path', text is 'text', label is 'label'; not used: 'title', 'price'." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("pic,text,label", "Expected a column image (image, img, picture,"),
        ("pic,text,label", "but {path} has ['pic', 'text', 'label']: rename it, or add an empty one."),
        ("image,words,label", "Expected a column text (text, caption,"),
        ("image|text|label", "has ['image|text|label']: columns are separated by , ; or tab."),
        ("image,text,kind", "Expected a column label (label, labels,"),
        (
            "image,title,caption,label",
            "one column text, but {path} has ['title', 'caption']: rename the one to be used",
        ),
        ("image,text,Text,label", "Expected one column text, but {path} has ['text', 'Text']"),
        ("image,text,class,category", "Expected one column label, but {path} has ['class', 'category']"),
        ("image,text;id;label", "has ['image,text', 'id', 'label']"),
        ("image,text,x;label;id", "the header of {path} can be read with comma or semicolon"),
    ],
)
def test_columns_that_could_be_others(folder, header, message):
    values = ",".join("x" * (1 + header.count(",")))
    refused(folder, f"{header}\n{values}\n", message)


def test_prediction_needs_no_label(folder):
    assert read(folder, "image;text\na.png;one\n", labelled=False) == ([("a.png", "one", [])], False)
    refused(folder, "pic;text\na.png;one\n", "Expected a column image", labelled=False)
    assert read(folder, "text,image,class,category\none,,a,b\n", labelled=False)[0] == [(None, "one", [])]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_delimiters_and_marks(folder, delimiter, name, mark, end):
    lines = [["image", "text", "label"], ["a.png", '"two, three"', "dog"], ["", "four", "cat"]]
    content = mark + end.join(delimiter.join(cells) for cells in lines)
    assert read(folder, content, name) == (PLAIN, False)


def test_jsonl(folder):
    lines = [{"Image": "a.png", "Caption": "two, three", "category": "dog"}, {"Caption": "four", "category": "cat"}]
    content = "\ufeff" + "\n\n".join(map(json.dumps, lines))
    assert read(folder, content, "data.jsonl") == (PLAIN, False)
    assert read(folder, content, "data.ndjson") == (PLAIN, False)
    # Of the ends of lines that Unicode knows, JSON allows some in a text.
    assert read(folder, '{"text": "a\u2028b", "label": 1}', "data.jsonl")[0] == [(None, "a\u2028b", ["1"])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": 0, "text": "b"}', "{path} line 1 to be readable, but got: the keys ['text', 'label'"),
        ('{"text": "a", "pic": "a.png", "label": 0}', "Expected a column image"),
        ('{"text": "a", "label": 0}\n{"Text": "a", "label": 0}', "one column text, but {path} has ['text', 'Text']"),
        ('{"text": "a", "label": 0}\n{"text": "a"}', "{path} line 2 has None"),
        ('[{"text": "a", "label": 0}]', "Expected a JSON object a line, but {path} line 1"),
        ("", "Expected rows, but {path} has none"),
    ],
)
def test_jsonl_that_is_not_understood(folder, content, message):
    refused(folder, content, message, "data.jsonl")


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_bytes_that_are_no_text(folder, name):
    good = b"image,text,label\na.png,one,dog\n" if name == "data.csv" else b'{"text": "a", "label": 1}\n\n'
    refused(folder, good + "a.png,café,dog\n".encode("latin-1"), "UTF-8, but {path} line 3 has the byte 0xe9", name)
    refused(folder, good + b"a.png,on\0e,dog\n", "Expected text, but {path} line 3 has a zero byte", name)
    refused(folder, good.decode().encode("utf-16"), "{path} line 1 has the byte 0xff: save it as UTF-8", name)
    refused(folder, good.decode().encode("utf-16-le"), "{path} line 1 has a zero byte", name)


# -- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["", "NA", "<NA>", "None", "null", "NULL", "nan", "NaN", "N/A", "#N/A", " n/a "])
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_missing_values(folder, capsys, word, name):
    if name == "data.csv":
        content = f"image,text,label\n{word},one,dog\na.png,{word},cat\n"
    else:
        lines = {"image": word, "text": "one", "label": "dog"}, {"image": "a.png", "text": word, "label": "cat"}
        content = "\n".join(map(json.dumps, lines))
    assert read(folder, content, name)[0] == [(None, "one", ["dog"]), ("a.png", None, ["cat"])]
    assert (f"read as missing: {word.strip()} (2)" in capsys.readouterr().out) == bool(word)
    content = content.replace("dog", word)
    refused(folder, content, "Expected a label, or a list of labels, but {path} line ", name)


def test_what_pandas_writes(folder):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(
        {"image": ["a.png", None], "text": [None, "four"], "label": [1.0, 2.0], "split": ["train", "test"]}
    )
    for missing in ("", "NA", "<NA>", "nan"):
        table.to_csv(folder / "data.csv", na_rep=missing)  # With its index.
        found, _ = rows.read(folder / "data.csv")
        assert [(row.image, row.text) for row in found] == [(folder / "a.png", None), (None, "four")]
    table.to_json(folder / "data.jsonl", orient="records", lines=True)
    found, _ = rows.read(folder / "data.jsonl")
    assert [(row.text, row.labels) for row in found] == [(None, ["1"]), ("four", ["2"])]
    table["label"] = [["A", "B"], ["B"]]
    table.to_csv(folder / "data.csv", index=False)
    found, several = rows.read(folder / "data.csv")
    assert several
    assert [row.labels for row in found] == [["A", "B"], ["B"]]
    assert read(folder, '{"text": NaN, "image": "a.png", "label": 1}', "data.jsonl")[0] == [("a.png", None, ["1"])]


# -- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["split", "Split", "SUBSET", "partition"])
def test_names_of_splits(folder, column):
    names = {"train": ["train", "Train", "TRAINING"], "val": ["val", "valid", "Validation", "dev"], "test": ["Test"]}
    for split, spellings in names.items():
        for name in spellings:
            (folder / "data.csv").write_text(f"text,label,{column}\none,dog, {name} \n")
            assert [row.split for row in rows.read(folder / "data.csv")[0]] == [split]


def test_splits_that_are_not_understood(folder):
    header = "image,text,label,"
    refused(folder, header + "split\n,one,dog,eval\n", "but {path} line 2 has 'eval'")
    refused(folder, header + "split\n,one,dog,train\n,one,dog,NA\n", "in every row or in none, but {path} line 3")
    refused(folder, header + "usage\n,one,dog,train\n,two,dog,test\n", "but {path} has it in 'usage': rename that")


# -- labels -----------------------------------------------------------------------------------------------------------


def labels_of(*values, separator=None):
    return labels.read_labels([(f"line {number}", value) for number, value in enumerate(values, 2)], separator)


@pytest.mark.parametrize(
    ("values", "wanted", "several"),
    [
        (["dog", " cat "], [["dog"], ["cat"]], False),
        ([3, 1.0, "2"], [["3"], ["1"], ["2"]], False),
        (["A|B", "B"], [["A", "B"], ["B"]], True),
        (["['A', 'B']", '["B"]', "[]", "('A', 'C')"], [["A", "B"], ["B"], [], ["A", "C"]], True),
        (['["it\'s", "caf\\u00e9"]', "['x']"], [["it's", "café"], ["x"]], True),
        ([["A", "B; C"], []], [["A", "B; C"], []], True),
        ([[3, 17], [1]], [["3", "17"], ["1"]], True),
        ([[0], [0, 1]], [["0"], ["0", "1"]], True),
        (["1.0", "1.5"], [["1.0"], ["1.5"]], False),
        ([True, False], [["True"], ["False"]], False),
    ],
)
def test_labels(values, wanted, several):
    assert labels_of(*values) == (wanted, several)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["A;B"], "one label, or several as A|B, but line 2 has 'A;B': --label-separator ';' takes it for several"),
        (["B", "A, B"], "line 3 has 'A, B': --label-separator ',' takes"),
        ([[1, 0, 1]], "no label twice in a row, but line 2 has ['1', '0', '1']; of a multi-hot list"),
        (["[1, 0, 1]"], "line 2 has ['1', '0', '1']; of a multi-hot list"),
        ([[1, 0], [0, 1]], "line 2 has ['1', '0'], which is multi-hot"),
        ([[True, False]], "which is multi-hot"),
        (["1 0 1"], "line 2 has '1 0 1', which is multi-hot"),
        (["1,0"], "which is multi-hot"),
        (["a|b", "1|0|1"], "line 3 has ['1', '0', '1']"),
        (["['A' 'B']"], "or a list such as ['A', 'B'], but line 2 has \"['A' 'B']\""),
        (["[A, B]"], "line 2 has '[A, B]'"),
        (["{'A', 'B'}"], "line 2 has"),
        (["nan"], "Expected a label, or a list of labels, but line 2 has 'nan'"),
        ([float("nan")], "has nan"),
        (["A|nan"], "has 'nan'"),
        ([None], "has None"),
        ([""], "has ''"),
        ([0.5], "has 0.5"),
        ([{"a": 1}], "has {'a': 1}"),
        ([["A", ["B"]]], "has ['B']"),
        (["dog", "cat", "Dog"], "one spelling of a label, but line 2 has 'dog', line 4 'Dog'"),
        (["1", "1.0"], "but line 2 has '1', line 3 '1.0'"),
        (["caf\u00e9", "cafe\u0301"], "one spelling"),
        (["ice cream", "ice  cream"], "one spelling"),
    ],
)
def test_labels_that_could_mean_several_things(values, message):
    with pytest.raises(files.InputError) as error:
        labels_of(*values)
    assert message in str(error.value)


def test_the_separator_of_labels(folder):
    assert labels_of("A;B", "B", separator=";") == ([["A", "B"], ["B"]], True)
    assert labels_of("A, B", "B|C", separator=",") == ([["A", "B"], ["B|C"]], True)
    assert labels_of("A, B", "[A]", "B|C", separator="") == ([["A, B"], ["[A]"], ["B|C"]], False)
    content = 'text,label\none,"A;B"\ntwo,B\n'
    refused(folder, content, "{path} line 2 has 'A;B': --label-separator")
    assert read(folder, content, separator=";") == ([(None, "one", ["A", "B"]), (None, "two", ["B"])], True)


# -- folders ----------------------------------------------------------------------------------------------------------


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".txt", ".heic", ".csv")):
            (folder / name).write_text("words")
        else:
            Image.new("RGB", (4, 4)).save(folder / name, "PNG")


def test_folders(tmp_path, capsys):
    put(tmp_path, "Train/a, b/1.jpg", "Train/dog/2.PNG", "Train/dog/2.txt", "valid/dog/3.txt", "TEST/dog/4.jpe")
    put(tmp_path, "Train/.ipynb_checkpoints/1.png", "__MACOSX/dog/1.png", "Train/dog/._2.PNG", "Train/dog/5.heic")
    found, several = rows.read(tmp_path)
    got = {row.id: (row.split, row.labels, row.text, row.image is not None) for row in found}
    assert got == {
        "Train/a, b/1.jpg": ("train", ["a, b"], None, True),
        "Train/dog/2.PNG": ("train", ["dog"], "words", True),
        "valid/dog/3.txt": ("val", ["dog"], "words", False),
        "TEST/dog/4.jpe": ("test", ["dog"], None, True),
    }
    assert not several
    assert "passed over: .heic (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["dog/1.png", "data.csv"], "has a table: give {folder}/data.csv itself"),
        (["dog/1.png", "2.png"], "but {folder}/2.png lies elsewhere"),
        (["train/1.png", "test/2.png"], "but {folder}/test/2.png lies elsewhere"),
        (["train/dog/small/1.png"], "but {folder}/train/dog/small/1.png lies elsewhere"),
        (["animals/dog/1.png"], "the split to be train/training or"),
    ],
)
def test_folders_that_are_not_understood(tmp_path, names, message):
    put(tmp_path, *names)
    with pytest.raises(files.InputError) as error:
        rows.read(tmp_path)
    assert message.format(folder=tmp_path) in str(error.value)


# -- files of pictures ------------------------------------------------------------------------------------------------


def test_gaps_are_counted_and_named_once(folder, capsys):
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:40])
    content = "image,text,label\na.png,one,dog\nbroken.png,two,dog\nbroken.png,two,cat\nnone.png,four,cat\n"
    refused(folder, content, f"{{path}} line 5 has {folder}/none.png; --allow-gaps takes it for missing")
    found, _ = rows.read(folder / "data.csv", allow_gaps=True)
    assert [row.image is not None for row in found] == [True, False, False, False]
    assert [row.note.split(":")[0] for row in found] == ["", "unreadable", "unreadable", "not there"]
    printed = capsys.readouterr().out
    assert printed.count("broken.png") == printed.count("none.png") == 1
    assert "1 unreadable pictures" in printed
    refused(folder, content.replace("a.png", "x.png").replace("broken", "none"), "none of 4 does", allow_gaps=True)
    # A text in the place of a path, too long for a name.
    refused(folder, f"image,text,label\n{'x' * 300},a.png,dog\n", "Expected a picture that exists, but {path} line 2")


def test_paths_of_windows(folder):
    put(folder, "pictures/new/1.png")
    (folder / "data.csv").write_text("image,text,label\npictures\\new\\1.png,one,dog\n")
    assert rows.read(folder / "data.csv")[0][0].image == folder / "pictures" / "new" / "1.png"


def test_csv_of_the_module_is_read_back(folder):
    texts = ['a "quoted" one', "one, two; three\tfour", "two\nlines", 'ends in a quote"', '"', "'", '18"', "a|b"]
    with open(folder / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "text", "label"], *(["a.png", text, "dog"] for text in texts)])
    assert [row.text for row in rows.read(folder / "data.csv")[0]] == texts
