"""The rules of the house (docs/contributing.md): who may import whom, no circle, and the lengths that a reader was promised."""

import ast
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = (".", "toy_math", "plumbing", "study", "full_scale", "examples")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports(name):
    """{module of ours: whether it is imported only when a function is called} that a module imports."""
    found, package = {}, name.rpartition(".")[0] or name
    tree = ast.parse(NAMES[name].read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            wanted = [f"{base}.{alias.name}" for alias in node.names] + [base]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            wanted = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        elif isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        else:
            continue
        for module in set(wanted) & NAMES.keys():
            found[module] = found.get(module, True) and id(node) not in top
    return found


def reached(name, everything=True):
    """All modules of ours that a module imports, directly or through others; those imported lazily only if `everything`."""
    seen, waiting = set(), [name]
    while waiting:
        for module, lazily in imports(waiting.pop()).items():
            if module not in seen and (everything or not lazily):
                seen.add(module)
                waiting.append(module)
    return seen


def outside(name):
    """The top names of all that a module imports."""
    nodes = [node for node in ast.walk(ast.parse(NAMES[name].read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    return {
        part.split(".")[0]
        for node in nodes
        for part in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }


def test_there_is_no_circle():
    assert len(NAMES) > 25
    for name in NAMES:
        assert name not in reached(name), name


def test_losses_and_model_import_nothing_of_ours():
    assert not imports("losses") and not imports("model")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("plumbing")])
def test_plumbing_knows_no_loss_no_toy_and_no_model(name):
    assert all(module.split(".")[0] == "plumbing" for module in imports(name))


def test_nothing_imports_train_but_study():
    for name in NAMES:
        if "train" in reached(name):
            assert name.startswith("study."), name
    assert not any("train" in reached(f"study.{name}") for name in ("results", "drawing", "figures", "claims", "page"))


def test_matplotlib_is_loaded_after_training_and_never_by_full_scale():
    drawing = {name for name in NAMES if "matplotlib" in outside(name)}
    assert drawing == {"plots", "study.drawing", "study.figures"}
    for name in ("train", *(name for name in NAMES if name.startswith("full_scale"))):
        assert not drawing & reached(name, everything=name != "train"), name


LENGTHS = {"train.py": 300, "losses.py": 420, "model.py": 260, "study/bench.py": 590}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_can_be_read_in_one_sitting(path):
    text = path.read_text()
    assert text.count("\n") <= LENGTHS.get(str(path.relative_to(ROOT)), 480)
    assert all(sum(not unicodedata.combining(letter) for letter in line) <= 128 for line in text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_what_ls_shows():
    shown = {path.name for path in ROOT.iterdir() if path.name[0] != "." and path.name not in ("runs", "__pycache__")}
    folders = {"toy_math", "plumbing", "study", "results", "full_scale", "examples", "docs", "tests"}
    files = "README.md LICENSE pyproject.toml requirements.txt model.py losses.py train.py plots.py lesson.ipynb".split()
    assert shown == folders | set(files)


def test_the_heart_is_on_the_first_page():
    lines = Path("losses.py").read_text().splitlines()
    assert lines.index("def fpa_loss(logits, ref_logits, tokens, mask, reward, lam=2.0):") < 60
    assert lines.index("def off_rl_loss(logits, tokens, mask, reward):") < 60
