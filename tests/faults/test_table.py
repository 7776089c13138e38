"""The table that the book shows is what this suite reports: no row is missing, none is left over."""

import ast
import json
import re

import pytest
from harness import HERE, HOW, TABLE


def pattern(name):
    """What a fault's name may be: a string, or an f-string with gaps."""
    if isinstance(name, ast.Constant):
        return re.escape(name.value)
    assert isinstance(name, ast.JoinedStr), f"line {name.lineno}: a fault's name is a string or an f-string"
    return "".join(re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in name.values)


def reported():
    """The patterns of all names that the suite's tests give to `table`."""
    return [
        pattern(node.args[0])
        for path in sorted(HERE.glob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "table"
    ]


@pytest.fixture(scope="module")
def stored(request):
    if request.config.getoption("--faults-table"):
        pytest.skip("the table is being made")
    return json.loads(TABLE.read_text(encoding="utf-8"))


def test_every_row_is_reported_by_a_test_and_every_report_has_a_row(stored):
    names, patterns = [row["fault"] for row in stored["faults"]], reported()
    assert len(names) == len(set(names)) > 35
    left_over = [name for name in names if not any(re.fullmatch(each, name) for each in patterns)]
    missing = [each for each in patterns if not any(re.fullmatch(each, name) for name in names)]
    assert (left_over, missing) == ([], []), f"`{HOW}` makes the table anew"


def test_the_page_shows_every_row(stored):
    page = (HERE.parents[1] / "book" / "faults.md").read_text(encoding="utf-8")
    shown = re.findall(r"(?m)^%FAULTS (\w+)%$", page)
    assert len(shown) == len(set(shown))
    assert {row["test"].partition(".py::")[0] for row in stored["faults"]} | {"summary"} == set(shown)


def test_the_table_was_made_with_many_rounds(stored):
    assert stored["rounds"] >= 100
    assert "--faults-rounds" in stored["command"]
    for row in stored["faults"]:
        assert row["tried"] >= 1
        assert row["outcome"]
    tried = {row["fault"]: row["tried"] for row in stored["faults"]}
    assert tried["`kill -9` at a random moment"] >= 100
    assert sum(tried.values()) > 900
