"""The report says what the CSV says: its numbers, signs, significance and sentences, of scores made up here."""

import csv
import importlib
import itertools

import figures
import pytest
import results

DATA = "toys"
# Macro-F1 in percent by method and setting; protohead leads but for the rows that lack nothing.
SCORES = {
    "linear": {("none", 0.0): 60, ("image", 0.7): 40, ("all", 0.7): 30},
    "paper": {("none", 0.0): 55, ("image", 0.7): 45, ("all", 0.7): 40},
    "protohead": {("none", 0.0): 58, ("image", 0.7): 50, ("all", 0.7): 50},
    "protohead, not centered": {("image", 0.7): 48, ("all", 0.7): 51},
}
SEEN = {"none": ["image+text"], "image": ["image+text", "text"], "all": ["image+text", "image", "text"]}
# What a seed adds: the same to every method, and something of its own to linear.
SEEDS, NOISE = (-1.0, 0.0, 1.0), (-0.5, 0.0, 0.5)


@pytest.fixture
def module():
    return importlib.import_module("report")  # `report` is a fixture.


def lines(scores=SCORES, seeds=(0, 1, 2), data=DATA, **changed):
    """What accuracy.py would write: own tests, crosswise ones, wrong masks, and other ways to predict."""
    found = []
    for (trained, by_setting), seed in itertools.product(scores.items(), seeds):
        for train, score in by_setting.items():
            for method, less in [(trained, 0), *((m, x) for m, x in PREDICTORS.items() if trained == "paper")]:
                value = score + SEEDS[seed] + (NOISE[seed] if method == "linear" else 0) - less
                tests = [(train, 0.0, 0), *((test, 0.0, 10) for test in by_setting if test != train)]
                tests += [(train, wrong, 100 * wrong) for wrong in (0.05, 0.2) if train[0] == "all"]
                for test, flipped, lost in tests:
                    for case in ("all rows", "mean of cases", *SEEN[test[0]]):
                        unseen = 20 * (case not in (*SEEN[train[0]], "all rows", "mean of cases"))
                        f1 = f"{(value - lost - unseen) / 100:.4f}"
                        own = train == test and test[1] == 0.7 and not flipped and case in SEEN["all"]
                        line = {
                            "data": data,
                            "trained": trained,
                            "train_missing": train[0],
                            "train_rate": f"{train[1]:g}",
                        }
                        line |= {"seed": seed, "method": method, "learning_rate": "0.01", "epoch": 3}
                        line |= {"validation": f"{value / 100 + 0.02:.4f}", "test_missing": test[0]}
                        line |= {"test_rate": f"{test[1]:g}", "flipped": f"{flipped:g}", "case": case, "rows": 50}
                        line |= {"accuracy": f1, "macro_f1": f1, "auroc": f1, "map": "", "ece": 0.10, "aurc": 0.20}
                        line |= {"reliability": "10:0.250:0.300 40:0.950:0.900" if own else ""}
                        found.append(line | changed)
    return found


PREDICTORS = {"paper, least entropy": 3, "paper, no fall-back": 6}


def write(folder, rows):
    path = folder / "accuracy.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def report(module, monkeypatch, tmp_path):
    """The text of a report; figures, which take their time, are left out."""
    monkeypatch.setattr(module, "write_figures", lambda *arguments: None)

    def make(rows=None):
        module.write_report(write(tmp_path, lines() if rows is None else rows))
        return (tmp_path / "RESULTS.md").read_text()

    return make


def table(text, title):
    """First column to the other cells by their heads, of the first table whose head begins like this."""
    rows = [
        line.strip("| \n").split(" | ")
        for line in text[text.index(f"\n| {title} |") + 1 :].split("\n\n")[0].split("\n")
    ]
    return {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}


def test_verdict(report):
    text = report()
    rows = table(text, "`protohead` minus")
    # (58 - 60 + 50 - 40 + 50 - 30) / 3, and over seeds ± 0.5 · 4.303 / √3 = 1.242; to paper every seed is the same.
    assert rows["`linear`"]["difference"] == "+9.3"
    assert rows["`linear`"]["95 %"] == "+8.1 to +10.6"
    assert rows["`paper`"]["difference"] == "+6.0"
    assert rows["`paper`"]["95 %"] == "+6.0 to +6.0"
    assert [rows["`linear`"][f"cells {way}"] for way in ("better", "worse")] == ["2 of 3", "1 of 3"]
    assert [rows["`paper`"][f"cells {way}"] for way in ("better", "worse")] == ["3 of 3", "0 of 3"]
    assert "`protohead` has a mean macro-F1 of 52.7." in text
    assert "significantly better than `linear`, `paper`; worse than none; neither: none." in text
    assert "`protohead` is significantly worse: 1 of 6 comparisons" in text
    assert "With Holm's correction for all of them it is worse in 1 and better in 5." in text
    assert table(text, "data") == {
        DATA: {"missing": "none", "worse than": "`linear`", "difference": "−2.0", "95 %": "−3.2 to −0.8"}
    }


@pytest.mark.parametrize(
    ("p_values", "limit"),
    [([0.04, 0.01, 0.02], 0.04), ([0.02, 0.03, 0.04], -1), ([0.9, 0.01, 0.03], 0.01), ([0.0, 1.0], 0.0), ([], -1)],
)
def test_holm(p_values, limit):
    assert results.holm(p_values) == limit


def test_a_correction_takes_what_chance_may_give(report):
    row = {**SCORES["linear"], ("image", 0.7): 48.5}  # A lead of 1.5 ± 1.2, of three comparisons.
    text = report(lines({"linear": row, "protohead": {**SCORES["linear"], ("image", 0.7): 50}}))
    assert table(text, "`protohead` minus")["`linear`"]["cells better"] == "1 of 3"
    assert "With Holm's correction for all of them it is worse in 0 and better in 0." in text


def test_no_worse_cell(report):
    text = report(lines({**SCORES, "linear": dict.fromkeys(SCORES["linear"], 30)}))
    assert "There is no cell in which `protohead` is significantly worse than another method." in text
    assert "\n| data |" not in text


def test_neither_better_nor_worse(report):
    # A mean lead of 1 with ± 1.2.
    text = report(
        lines({"linear": dict.fromkeys(SCORES["linear"], 49), "protohead": dict.fromkeys(SCORES["linear"], 50)})
    )
    row = table(text, "`protohead` minus")["`linear`"]
    assert row == {"difference": "+1.0", "95 %": "−0.2 to +2.2", "cells better": "0 of 3", "cells worse": "0 of 3"}
    assert "better than none; worse than none; neither: `linear`." in text


def test_significantly_worse_on_average(report):
    text = report(lines({**SCORES, "linear": dict.fromkeys(SCORES["linear"], 70)}))
    assert "significantly better than `paper`; worse than `linear`; neither: none." in text


def test_one_seed_has_no_intervals(report):
    text = report(lines(seeds=(1,)))
    assert table(text, "`protohead` minus")["`linear`"]["95 %"] == "–"
    assert "No two seeds to compare it by, so nothing is significant." in text
    assert "There is no cell" not in text
    assert "There are cells" not in text
    assert "*)" not in text[text.index("## Which to choose") :]


def test_methods_and_settings(report):
    text = report()
    assert table(text, "test")[DATA] == {"linear": "43.3", "paper": "46.7", "protohead": "**52.7**", "±": "1.0"}
    assert table(text, "validation")[DATA] == {"linear": "45.3", "paper": "48.7", "protohead": "**54.7**", "±": "1.0"}
    assert table(text, "missing") == {
        "none": {"linear": "**60.0**", "paper": "55.0", "protohead": "58.0", "±": "1.0"},
        "image, 70 %": {"linear": "40.0", "paper": "45.0", "protohead": "**50.0**", "±": "1.0"},
        "all, 70 %": {"linear": "30.0", "paper": "40.0", "protohead": "**50.0**", "±": "1.0"},
    }
    assert "Mean average precision" not in text


def test_several_labels(report):
    text = report(lines(map=0.321))
    rows = table(text[text.index("Mean average precision") :], "missing")
    assert rows["none"] == {"linear": "**32.1**", "paper": "**32.1**", "protohead": "**32.1**", "±": "0.0"}


def test_several_data_sets_count_by_cells(report):
    other = {method: {("none", 0.0): score} for method, score in (("linear", 80), ("paper", 70), ("protohead", 70))}
    text = report(lines() + lines(other, data="others"))
    rows = table(text, "test")
    assert (rows[DATA]["linear"], rows["others"]["linear"]) == ("43.3", "**80.0**")
    assert rows["all cells"]["linear"] == "52.5"  # (60 + 40 + 30 + 80) / 4
    assert table(text, "`protohead` minus")["`linear`"]["difference"] == "+4.5"


def test_crosswise(report):
    text = report()
    rows = table(text, "trained ↓, tested →")
    assert rows["none"]["image, 70 %"] == "**50.0** / 45.0 / 48.0"
    assert rows["image, 70 %"]["image, 70 %"] == "40.0 / 45.0 / **50.0**"
    assert rows["image, 70 %"]["none"] == "30.0 / 35.0 / **40.0**"
    # Trained on none: text, then image and text; trained on images missing: image. All lose 10 + 20.
    row = table(text, "mean of")["4 cases"]
    assert row["linear"] == "25.0"  # (3 · 60 + 40) / 4 - 30
    assert (row["paper, no fall-back"], row["paper"], row["protohead"]) == ("16.5", "22.5", "**26.0**")
    assert "- `paper` minus `paper, no fall-back`: +6.0 (+6.0 to +6.0)." in text
    assert "- `protohead` minus `linear`: +1.0 (−0.2 to +2.2)." in text


def test_rare_cases_are_not_scored(report):
    assert "Cases that training lacked" not in report(lines(rows=29))
    assert "Cases that training lacked" in report(lines(rows=30))


def test_masks_and_parts(report):
    text = report()
    rows = table(text, "wrong")
    assert [rows[f"{DATA}, {wrong} %"]["protohead"] for wrong in (0, 5, 20)] == ["**50.0**", "**45.0**", "**30.0**"]
    assert "`paper, least entropy` minus `paper` is −3.0 (−3.0 to −3.0)." in text
    assert table(text, "changed") == {"`protohead, not centered`": {DATA: "−0.5 (−0.5 to −0.5)"}}


def test_lowest_error_is_best(report):
    rows = lines()
    for line in rows:
        line["ece"] = {"linear": 0.3, "protohead": 0.05}.get(line["method"], 0.1)
        line["aurc"] = {"linear": 0.15, "protohead": 0.25}.get(line["method"], "nan") if line["seed"] else "nan"
    text = report(rows)
    assert table(text, "ECE")[DATA] == {"linear": "30.0", "paper": "10.0", "protohead": "**5.0**", "±": "0.0"}
    assert table(text, "AURC")[DATA] == {"linear": "**15.0**", "paper": "–", "protohead": "25.0", "±": "0.0"}
    assert "Best calibrated (ECE): `protohead`, then `paper`, then `linear`." in text
    assert "(AURC): `linear`, then `protohead`." in text


def test_choice(report):
    text = report()
    assert (
        f"On {DATA} the best method is: at 0 % `linear` with 60.0 (`protohead` −2.0*); at 70 % `protohead` with" in text
    )
    assert "with 50.0 (`paper` −7.5*)." in text
    ahead = {**SCORES, "paper": {**SCORES["paper"], ("none", 0.0): 59}}
    assert "at 0 % `linear` with 60.0 (`protohead` −2.0*)" in report(lines(ahead))
    assert f"not significantly better than `linear`, the simplest: {DATA} at 0 %." in text


def test_interrupted(report, module, tmp_path):
    rows = lines()
    gone = [x for x in rows if (x["trained"], x["train_missing"], x["seed"]) != ("protohead", "image", 2)]
    text = report(gone)
    assert "1 settings and seeds are unfinished" in text
    assert "unfinished" not in report(rows)
    # Two seeds are left of that setting for every method alike: their mean is half a point lower.
    assert table(text, "missing")["image, 70 %"]["paper"] == "44.5"
    path = write(tmp_path, rows)
    path.write_text(path.read_text()[:-40])
    module.write_report(path)
    path.write_text(path.read_text().split("\n")[0] + "\n")
    module.write_report(path)
    assert "No setting is finished yet." in (tmp_path / "RESULTS.md").read_text()


def test_files_that_accuracy_did_not_write(module, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "empty.csv").write_text("")
    for name, message in (("a.csv", "columns ['a', 'b']"), ("empty.csv", "columns ['']"), ("none.csv", "No such file")):
        monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / name)])
        with pytest.raises(SystemExit, match="2"):
            module.main()
        assert message in capsys.readouterr().err
    assert not (tmp_path / "RESULTS.md").exists()


FIGURES = {f"accuracy_{name}.png" for name in ("rates", "matrix", "seeds", "reliability")}


def test_figures(module, tmp_path):
    module.write_report(write(tmp_path, lines(seeds=(0, 1))))
    text = (tmp_path / "RESULTS.md").read_text()
    for name in FIGURES:
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
        assert f"({name})" in text


def test_figures_without_the_methods_that_they_name(module, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, dpi: drawn.append(path.name))
    module.write_report(write(tmp_path, lines({"late fusion": SCORES["linear"]}, seeds=(0, 1))))
    assert set(drawn) == FIGURES


def test_reliability_sums_the_seeds(module, tmp_path):
    rows = lines()
    for line in rows:
        if line["reliability"] and line["seed"] == 2:
            line["reliability"] = "30:0.210:0.100"
    axis = figures.Figure().subplots()
    figures.draw_reliability(results.Results(write(tmp_path, rows)), axis, DATA, "text")
    x, y = axis.lines[1].get_data()
    assert x == pytest.approx([(20 * 0.25 + 30 * 0.21) / 50, 0.95])
    assert y == pytest.approx([(20 * 0.3 + 30 * 0.1) / 50, 0.9])
    assert "ECE: linear 10.0" in axis.get_title()


def test_curves_by_rate(module, tmp_path):
    axis = figures.Figure().subplots()
    figures.draw_rates(results.Results(write(tmp_path, lines())), axis, DATA, "all rows")
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert [value for point in drawn["protohead"] for value in point] == pytest.approx([0, 58, 70, 50])
