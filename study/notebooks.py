"""The lesson's two notebooks from one source: lesson.ipynb, and docs/lesson/solutions.ipynb with answers and output.

    pip install -r tests/requirements.txt && python -m study.notebooks

The source is docs/lesson/source.py, in jupytext's percent format. What stands between the lines BEGIN SOLUTION and END SOLUTION
goes into the solutions alone, and what follows on the latter line into the student's notebook alone. The student's has no
output, since output would answer the questions. The solutions are run, which takes a few minutes.
"""

import re
from pathlib import Path

from plumbing.files import UserError, write_text
from plumbing.flags import command, command_line

ROOT = Path(__file__).resolve().parents[1]
SOURCE, STUDENT, SOLUTIONS = ROOT / "docs/lesson/source.py", ROOT / "lesson.ipynb", ROOT / "docs/lesson/solutions.ipynb"
BLOCK = re.compile(r"^([ \t]*)(?:# )?BEGIN SOLUTION\n(.*?)\n[ \t]*(?:# )?END SOLUTION ?(.*?)$", flags=re.M | re.S)
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(solved, repository):
    """One of the two, not run."""
    import jupytext

    text = re.sub("^# ruff: .*\n", "", SOURCE.read_text()).replace("OWNER/REPOSITORY", repository)
    made = jupytext.reads(text, fmt="py:percent")
    made.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        cell.source = BLOCK.sub(r"\2" if solved else r"\1\3", cell.source)
    made.nbformat, made.nbformat_minor = 4, 5
    return made


def executed(made, folder=ROOT):
    """The notebook with its output, run in a folder. An error in a cell is raised."""
    from nbclient import NotebookClient

    NotebookClient(made, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in made.cells:
        cell.metadata = {}  # no times
    return made


def run(argv=None):
    """The command."""
    parser = command_line(__doc__.splitlines()[0], prog="python -m study.notebooks")
    parser.add_argument("--repository", default="OWNER/REPOSITORY", metavar="OWNER/NAME", help="on GitHub, for Colab's badge")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        parser.error(f"argument --repository: must be OWNER/NAME, not {args.repository!r}")
    with command("python -m study.notebooks"):
        try:
            import jupytext  # noqa: F401
            import nbformat
        except ImportError as error:
            raise UserError(f"{error.name} is missing: pip install -r tests/requirements.txt") from None
        for path, made in ((STUDENT, notebook(False, args.repository)), (SOLUTIONS, notebook(True, args.repository))):
            write_text(path, nbformat.writes(executed(made) if path == SOLUTIONS else made) + "\n")
            print(f"notebook      {path.relative_to(ROOT)}")


if __name__ == "__main__":
    run()
