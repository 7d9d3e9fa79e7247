"""What the README shows is what the programs print; its code runs in test_docs.py."""

import re
from pathlib import Path

import quickstart
from prompts_report import section
from test_quickstart import saved_scores

import protohead

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REPORT = (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_it_is_read_in_a_minute_or_two():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(prose.split()) <= 900
    assert len(README.split()) <= 1300


def test_numbers_are_those_of_the_report():
    table = REPORT.split("## Macro-F1 by method")[1]
    names, _, *rows = [line.strip("| ").split(" | ") for line in table.split("\n\n")[1].splitlines()]
    scores = dict(zip(names, rows[-1], strict=True))
    assert rows[-1][0] == "all cells"
    score = "| {linear} | {paper} | {protohead} ± {±} | {closed form} |".format(**scores)
    assert f"mean of 69 settings {score}" in README
    names, _, row = [
        line.strip("| ").split(" | ") for line in REPORT.split("test has 30")[1].split("\n\n")[1].splitlines()
    ]
    score = "| {linear} | {paper} | {protohead} ± {±} |".format(**dict(zip(names, row, strict=True)))
    assert f"mean of {row[0].removesuffix(' cases')} {score}".replace("**", "") in README.replace("**", "")
    for difference in ("`linear` | +2.7 | +2.5 to +2.9 | 39 of 69 | 1 of 69", "`linear`: +9.0 (+8.1 to +10.0)"):
        assert difference in REPORT
    assert "2.7 (95 % over seeds: 2.5 to 2.9) and 9.0 (8.1 to 10.0)" in README


def test_calibration_is_that_of_the_report():
    part = REPORT.split("## Probabilities after calibration")[1]
    names, _, *rows = [line.strip("| ").split(" | ") for line in part.split("\n\n")[2].splitlines()]
    after = dict(zip(names, rows[-1], strict=True))
    floor = (
        part.split("it would be on average:")[1].split("| all cells | ")[1].split("\n")[0].strip("| ").split(" | ")[-1]
    )
    assert rows[-1][0] == "all cells"
    readme = " ".join(README.split())
    for name, text in (("protohead", "from {} to {} % (two seeds)"), ("linear", "treated alike, from {} to {} %")):
        assert text.format(*after[name].split(" → ")) in readme
    assert f"have {floor} % on so many rows" in readme
    assert "`protohead` 2." in part  # How many seeds.


def test_report_has_the_section_on_prompts():
    text = re.sub("\n{3,}", "\n\n", "\n".join(section(ROOT / "benchmarks" / "prompts.csv")))
    assert f"## Prompts\n\n{text}\n" in REPORT


def test_prompts_are_as_in_the_report():
    part = " ".join(REPORT.split("## Prompts\n")[1].split("\n## ")[0].replace("**", "").split())
    number = r"([−+]?[0-9.]+ \([^)]*\))"
    (helped,) = re.findall(f"prompts differ from the last layers alone by {number}", part)
    (head,) = re.findall(f"`shared` differs from `linear` by {number}", part)
    (case,) = re.findall(f"for each case differ from shared ones by {number}", part)
    readme, guide, page = (
        " ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/guide.md", "docs/prompts.md")
    )
    assert "they lost against training the last layers alone, {} macro-F1 ({}".format(*helped.split(" (")) in readme
    assert "level: {} macro-F1 ({}".format(*case.split(" (")) in guide
    for said, difference in (("trained without", helped), ("a linear layer", head), ("shared ones", case)):
        assert f"{said}: {difference}" in page
    ((plain, *prompted),) = re.findall(r"last layers (\d+), MAP (\d+), DCP (\d+)\.", part)
    assert f"took {min(prompted)} to {max(prompted)} seconds of a core in the place of {plain}." in page
    # What the words say: prompts are surely worse, the head is level, prototypes for each case gain nothing.
    assert " to −" in helped
    assert "(−" in head
    assert " to +" in head
    assert "no gain of the others is shown" in part


def test_two_commands():
    (block,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert ["quickstart" in block.splitlines()[0], "pytest" in block.splitlines()[1]] == [True, True]


def test_table_is_what_the_quickstart_prints():
    scores = saved_scores(ROOT / "examples" / "quickstart.csv")
    assert all(len(values) == 5 for values in scores.values())
    shown = README.split("<!-- quickstart -->\n")[1]
    assert " ".join(shown.split()).startswith(" ".join(quickstart.table(scores).split()))
    assert " ".join(quickstart.verdict(scores).split()) in " ".join(shown.split())  # However its lines are broken.


def test_version_stands_in_one_place():
    assert f"version: {protohead.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {protohead.__version__} - " in (ROOT / "CHANGELOG.md").read_text()
