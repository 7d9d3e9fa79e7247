"""benchmarks/prompts.py: the cached towers are the real ones, and a small run that is resumed and reported."""

import copy
import csv
import sys

import prompts
import pytest
import torch
from prompts_model import HEADS, MODALITIES, build, clip_model, pictures, pooled, present_of
from prompts_report import CELLS, TOWERS, Results, section

from protohead import attach

pytestmark = pytest.mark.filterwarnings("ignore:This head is in eval mode and has seen no")
ROWS = 13
LAST = ("visual.proj", "visual.ln_post.*", "ln_final.*")


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    """One thread; what is cached is small, and let go afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for function in (clip_model, pictures, pooled):
        function.cache_clear()


def test_last_layers_on_cached_tokens_are_the_whole_model():
    model = build("last", "shared", 13)
    whole = attach(copy.deepcopy(clip_model()[0]), 13, trainable=LAST)
    whole.head.load_state_dict(model.head.state_dict())
    rows, labels = pictures(ROWS)["train"]
    cached, _ = pooled(ROWS)
    present = present_of(ROWS, "train", "both", 0)
    names = {
        "image.norm.weight": "visual.ln_post.weight",
        "image.projection": "visual.proj",
        "text.norm.bias": "ln_final.bias",
    }
    losses = []
    for one, inputs in ((model, cached["train"].inputs), (whole, rows)):
        one.train()
        torch.manual_seed(0)
        losses.append(one.loss(inputs, present, labels))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    parameters = dict(whole.encoders.named_parameters())
    trained = [name for name, p in model.encoders.named_parameters() if p.requires_grad]
    assert len(trained) == sum(p.requires_grad for p in parameters.values()) == 5
    for name, place in names.items():
        (other,) = (p for key, p in parameters.items() if key.endswith(place))
        torch.testing.assert_close(model.encoders.get_parameter(name).grad, other.grad, rtol=1e-4, atol=1e-5)


def test_models_are_what_their_names_say():
    found = {}
    for towers in TOWERS:
        for head in HEADS:
            model = build(towers, head, 13)
            names = [name for name, p in model.encoders.named_parameters() if p.requires_grad]
            found[towers, head] = len([x for x in names if ".prompts." not in x]), len(names), model.head
    assert {(towers, counts[0], counts[1] > counts[0]) for (towers, _), counts in found.items()} == {
        ("none", 0, False),
        ("last", 5, False),
        ("map", 5, True),
        ("dcp", 5, True),
    }
    for towers in TOWERS:
        assert type(found[towers, "linear"][2]).__name__ == "LinearHead"
        paper, shared, each = (found[towers, head][2] for head in ("paper", "shared", "each case"))
        assert (len(paper.cases), len(shared.cases), len(each.cases)) == (3, 1, 3)
        assert (paper.centered, shared.centered, each.centered) == (False, True, True)
        assert paper.shared_space
        assert shared.shared_space
        assert (paper.scale[0], each.scale[0]) == (32, 20)


def test_tables_differ_by_split_and_seed_and_lack_what_they_say():
    train, val = (present_of(100, split, "both", 0) for split in ("train", "val"))
    assert train.sum(0).tolist() == [65, 65]
    assert not torch.equal(train, val)
    assert not torch.equal(train, present_of(100, "train", "both", 1))
    assert present_of(100, "test", "text", 2).sum(0).tolist() == [100, 30]
    assert present_of(100, "test", "none", 2).all()


def test_parts_are_the_whole_and_seeds_come_in_turn():
    budget = prompts.Budget()
    whole, parts = prompts.tasks(budget), [prompts.tasks(budget, i, 3) for i in range(3)]
    assert sorted(whole) == sorted(task for part in parts for task in part)
    assert len(set(whole)) == len(whole) == len(TOWERS) * len(HEADS) * 4 * 5
    assert [task.seed for task in whole] == sorted(task.seed for task in whole)
    assert {task.trained for task in whole[:16]} == {prompts.TUNED}  # The learning rate of what follows.


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prompts", *map(str, arguments)])
    prompts.main()


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_small_run_is_resumed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(prompts, "QUICK", prompts.Budget((1e-3, 1e-2), 1, 2, ("both", "none"), ROWS))
    monkeypatch.setattr(prompts, "TOWERS", ["last", "dcp"])
    monkeypatch.setattr(prompts, "HEADS", ["linear", "each case"])
    path = tmp_path / "prompts.csv"
    call(monkeypatch, "--quick", "--output", path)
    lines = read(path)
    runs = {(x["towers"], x["head"], x["trained"], x["seed"]) for x in lines}
    assert len(runs) == 2 * 2 * 2 * 2
    chosen = {}
    for x in lines:
        tried = dict(part.split(":") for part in x["tried"].split())
        tuned = x["trained"] == "both" and x["seed"] == "0"
        assert len(tried) == (2 if tuned else 1)
        assert x["validation"] == tried[x["learning_rate"]] == max(tried.values())
        chosen.setdefault((x["towers"], x["head"]), set()).add(x["learning_rate"])
    assert all(len(rates) == 1 for rates in chosen.values())
    tests = {(x["trained"], x["test"]) for x in lines}
    assert tests == {("both", "both"), ("none", "none"), ("none", "both")}
    for x in lines:
        assert int(x["rows"]) == ROWS or x["case"] in ("image+text", *MODALITIES)
    # Without its last run it goes on there, and the lines come out the same.
    text = path.read_text()
    kept = [line for line in text.splitlines(True) if not line.startswith("dcp,each case,none,1")]
    path.write_text("".join(kept))
    call(monkeypatch, "--quick", "--output", path)
    timeless = [{k: v for k, v in x.items() if k != "seconds"} for x in lines]
    assert [{k: v for k, v in x.items() if k != "seconds"} for x in read(path)] == timeless
    other = prompts.QUICK._replace(epochs=2)
    monkeypatch.setattr(prompts, "QUICK", other)
    with pytest.raises(ValueError, match="but it has"):
        call(monkeypatch, "--quick", "--output", path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns are others"):
        call(monkeypatch, "--quick", "--output", path)


def test_each_row_is_scored_in_its_own_case(monkeypatch):
    task, budget = prompts.Task("dcp", "each case", "both", 0), prompts.Budget((1e-2,), 1, 1, ("both",), ROWS)
    kept = {}

    def fit(*arguments):
        kept["model"] = original(*arguments)
        return kept["model"]

    original = prompts.fit
    monkeypatch.setattr(prompts, "fit", fit)
    lines = prompts.run(task, budget.rates, budget)
    test, present = pictures(ROWS)["test"], present_of(ROWS, "test", "both", 0)
    expected = prompts.evaluate(
        prompts.predict(kept["model"][2], test, present), test.labels, present, MODALITIES
    ).all_rows
    (line,) = (x for x in lines if x["case"] == "all rows")
    assert (line["accuracy"], line["ece"]) == (f"{expected['accuracy']:.4f}", f"{expected['ece']:.4f}")


def made_up(path, seeds=3):
    """A CSV in which prototypes for each case are 2 points ahead where there are prompts."""
    lines = []
    for seed in range(seeds):
        for towers in TOWERS:
            for head in HEADS:
                score = 0.5 + 0.01 * seed + 0.05 * (towers == "dcp") + 0.001 * ((7 * seed + len(towers)) % 3)
                score += 0.02 * (head == "each case" and towers in ("map", "dcp"))
                for trained, test in CELLS.values():
                    for case in ("all rows", "image+text", *MODALITIES):
                        line = dict.fromkeys(prompts.COLUMNS, "0.1") | {"towers": towers, "head": head, "case": case}
                        line |= {"trained": trained, "test": test, "seed": seed, "macro_f1": f"{score:.4f}"}
                        lines.append(line | {"seconds": 100 if towers == "dcp" else 10})
    prompts.append(path, lines)
    return path


def test_report(tmp_path, monkeypatch, capsys):
    path = made_up(tmp_path / "prompts.csv")
    text = "\n".join(section(path))
    assert "3 seeds" in text
    assert "left out" not in text
    assert "| DCP | each case | 58.0 |" in text.replace("58.1", "58.0")
    assert '`cases="all"`: these are better' in text
    assert "+2.0 (+2.0 to +2.0) more than" in " ".join(text.split())
    assert "MAP 10, DCP 100." in text
    row = next(x for x in text.splitlines() if x.startswith("| `each case` minus `shared`, DCP"))
    assert row.split(" | ")[1].startswith("**+2.0**")
    # A seed that is not finished is left out, and said to be.
    lines = path.read_text().splitlines(True)
    path.write_text("".join(x for x in lines if not x.startswith("dcp,each case,text,2")))
    text = "\n".join(section(path))
    assert "2 seeds" in text
    assert "**63 runs are of seeds" in text
    assert Results(path).seeds == [0, 1]
    call(monkeypatch, "--report", "--output", path)
    assert capsys.readouterr().out.strip() == text.strip()
    path.write_text(lines[0])
    assert section(path) == section(tmp_path / "none.csv") == ["No seed of prompts.py is finished yet."]
