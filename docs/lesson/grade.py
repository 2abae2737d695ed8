"""Grade a submission of lesson.ipynb: a test an exercise, and the sum of points.

    python -m pytest docs/lesson/grade.py --notebook submission.ipynb

Only the cells that define an exercise's answer are run, in the notebook's order, and nothing is trained. A submission is code:
grade the ones of strangers where they can do no harm.
"""

import ast
import contextlib
import io
import math
import re

import nbformat
import pytest
import torch

from losses import token_logps
from study.exercises import EXERCISES, check

VARIABLES = {"find_the_bug": "found"}  # the exercises whose answer is no function


def definitions(source):
    """The statements of a cell that define an exercise's answer, its imports, and the plain constants beside a function.

    A cell that does not parse has none.
    """
    try:
        statements = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M)).body  # without magic commands
    except SyntaxError:  # an unfinished cell
        return []
    names = {VARIABLES.get(name, name) for name in EXERCISES}
    functions = any(isinstance(statement, ast.FunctionDef) for statement in statements)
    return [
        statement
        for statement in statements
        if isinstance(statement, ast.FunctionDef | ast.Import | ast.ImportFrom)
        or (isinstance(statement, ast.Assign) and {target.id for target in statement.targets if hasattr(target, "id")} & names)
        or (functions and is_constant(statement))
    ]


def is_constant(statement):
    """Whether a statement gives names a number or another literal, as EPS = 1e-9 does. Nothing else is run by it."""
    if not isinstance(statement, ast.Assign) or not all(isinstance(target, ast.Name) for target in statement.targets):
        return False
    try:
        return ast.literal_eval(statement.value) is not ...
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False


@pytest.fixture(scope="session")
def answers(request):
    """{name: what the submission defines}."""
    found = {"torch": torch, "math": math, "token_logps": token_logps}
    for cell in nbformat.read(request.config.getoption("--notebook"), 4).cells:
        for statement in definitions(cell.source) if cell.cell_type == "code" else ():
            with contextlib.suppress(Exception):  # what is not defined has no points
                exec(compile(ast.Module([statement], []), "submission", "exec"), found)
    return found


@pytest.mark.parametrize("name", EXERCISES)
def test_exercise(name, answers, record_property):
    record_property("points", EXERCISES[name].points)
    answer, said = answers.get(VARIABLES.get(name, name)), io.StringIO()
    with contextlib.redirect_stdout(said):
        right = check(name, answer)
    if not right:
        pytest.fail(said.getvalue(), pytrace=False)
