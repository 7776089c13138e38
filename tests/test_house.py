"""The rules of the house: chapters and modules agree, nothing is exported twice, every chapter is stored executed."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
HAND_WRITTEN = {
    "__init__",
    "checkpoint",
    "clean",
    "cli",
    "cluster",
    "plot",
    "recipes",
    "report",
    "runtime",
    "speedrun",
}
# A module imports modules of earlier chapters only; hand-written ones are imported by nobody above them.
MAX_BYTES, MAX_FUNCTION_LINES, MAX_CLASS_LINES = 1 << 20, 50, 90


def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def module_of(path):
    first = next(source(cell) for cell in notebook(path)["cells"] if cell["cell_type"] == "code")
    found = re.match(r"#\|\s*default_exp (\w+)", first)
    return found and found[1]


MODULES = {module_of(path): path for path in CHAPTERS if module_of(path)}


def exported_cells(path):
    for cell in notebook(path)["cells"]:
        if cell["cell_type"] == "code" and re.match(r"#\|\s*export\b", source(cell)):
            yield source(cell)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The package as `make export` would write it today, in another folder."""
    copy = tmp_path_factory.mktemp("export")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("chapters", "minillm"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    for module in MODULES:
        (copy / "minillm" / f"{module}.py").unlink(missing_ok=True)
    tools = Path(sys.executable).parent
    subprocess.run([tools / "nbdev-export"], cwd=copy, check=True, capture_output=True)
    files = [str(copy / "minillm" / f"{module}.py") for module in MODULES]
    subprocess.run([tools / "ruff", "check", "-q", "--fix", "--select", "I", *files], cwd=copy, check=True)
    subprocess.run([tools / "ruff", "format", "-q", *files], cwd=copy, check=True)
    return copy / "minillm"


@pytest.mark.parametrize("module", MODULES)
def test_the_module_is_what_its_chapter_exports(exported, module):
    committed = (ROOT / "minillm" / f"{module}.py").read_text(encoding="utf-8")
    assert (exported / f"{module}.py").read_text(encoding="utf-8") == committed, "run make export"


def test_the_export_leaves_hand_written_files_alone(exported):
    for name in HAND_WRITTEN:
        assert (exported / f"{name}.py").read_bytes() == (ROOT / "minillm" / f"{name}.py").read_bytes()


def test_every_module_has_its_chapter_or_is_hand_written():
    present = {path.stem for path in (ROOT / "minillm").glob("*.py")} - {"_modidx"}
    assert present == set(MODULES) | HAND_WRITTEN


def test_one_chapter_one_module():
    named = [module_of(path) for path in CHAPTERS if module_of(path)]
    assert [name for name, n in Counter(named).items() if n > 1] == []
    for module, path in MODULES.items():
        assert path.stem.partition("_")[2] == module, f"{path.name} exports {module}"


def test_no_name_is_defined_in_two_modules():
    owners = {}
    for module in MODULES:
        tree = ast.parse((ROOT / "minillm" / f"{module}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                owners.setdefault(node.name, []).append(module)
    owners.pop("generate")  # documents in corpus, tokens in generate: two verbs of their fields
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minillm."):
            yield node.module.split(".")[1]


def test_dependencies_run_downward():
    order = [module_of(path) for path in CHAPTERS if module_of(path)]
    for place, module in enumerate(order):
        for imported in imports_of(ROOT / "minillm" / f"{module}.py"):
            assert imported not in order[place:], f"{module} imports {imported}, which comes later"
            assert imported not in {"cli", "recipes", "speedrun"}, f"{module} imports {imported}"
    for module in HAND_WRITTEN - {"cli", "speedrun"}:
        assert not {"cli", "speedrun"} & set(imports_of(ROOT / "minillm" / f"{module}.py"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_chapter_is_stored_executed(path):
    assert path.stat().st_size < MAX_BYTES
    counts = []
    for cell in notebook(path)["cells"]:
        if cell["cell_type"] != "code" or not source(cell).strip():
            continue
        counts.append(cell["execution_count"])
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source(cell)
            assert output.get("name") != "stderr", f"a warning is stored: {source(cell)[:200]}"
    assert counts == list(range(1, len(counts) + 1)), (
        "run make execute: cells are stored unexecuted or out of order"
    )


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_chapter_is_laid_out_as_a_chapter(path):
    cells = notebook(path)["cells"]
    titles = [line for cell in cells if cell["cell_type"] == "markdown" for line in source(cell).split("\n")]
    number = path.stem[:2]
    assert any(line.startswith(f"# {number} · ") for line in titles), f"no title '# {number} · …'"
    if module_of(path):
        for heading in (
            "Why",
            "By hand",
            "A law",
            "Break it",
            "Cost",
            "In the models",
            "Summary",
            "Exercises",
            "Sources",
        ):
            assert any(re.match(rf"##+ {heading}", line) for line in titles), f"no section '## {heading}'"
        assert any("# NBVAL_IGNORE_OUTPUT" in source(cell) or "assert" in source(cell) for cell in cells)
    for cell in cells:
        assert not re.search(r"import \*", source(cell)), "wildcard import"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_exported_cells_are_complete_and_short(path):
    for text in exported_cells(path):
        body = ast.parse(text).body
        definitions = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert len(definitions) <= 1, (
            f"two definitions in one exported cell: {[node.name for node in definitions]}"
        )
        for definition in definitions:
            assert ast.get_docstring(definition) or definition.name.startswith("_"), (
                f"{definition.name}: no docstring"
            )
            assert body_lines(definition) <= MAX_CLASS_LINES, (
                f"{definition.name}: {body_lines(definition)} lines"
            )
            for node in ast.walk(definition):
                if isinstance(node, ast.FunctionDef):
                    assert body_lines(node) <= MAX_FUNCTION_LINES, f"{node.name}: {body_lines(node)} lines"


def body_lines(node):
    """Lines of a definition without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)


def test_chapters_and_package_name_no_machine():
    files = [
        *ROOT.glob("*.md"),
        *ROOT.glob("minillm/**/*.py"),
        *CHAPTERS,
        *ROOT.glob("book/*.md"),
        *ROOT.glob("tests/*.py"),
    ]
    for path in files:
        text = path.read_text(encoding="utf-8")
        for word in ("/work" + "/", "/root" + "/", "../" + "shared"):
            assert word not in text, f"{path.relative_to(ROOT)} names {word}"
