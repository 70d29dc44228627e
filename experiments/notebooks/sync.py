"""Write the .ipynb of every notebook from its .py, which is the one to edit.

    python experiments/notebooks/sync.py                           the same bytes from the same .py
    python experiments/notebooks/sync.py --repository=me/mine      first write where the badges and the install cells find the code

The outputs of a notebook are never kept.
"""

import argparse
import hashlib
import re
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
REPOSITORY = re.compile(r'^REPOSITORY = "([^"]+)"', re.MULTILINE)


def scripts() -> list[Path]:
    """The .py of every notebook, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def notebook(script: Path) -> str:
    """The text of the .ipynb that a .py stands for. A cell's id is made of its source, so that it stays when others change."""
    document = jupytext.read(script)
    for cell in document.cells:
        cell.id = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        cell.metadata.clear()  # jupytext notes there how many blank lines follow in the .py
    nbformat.validate(document)
    return nbformat.writes(document) + "\n"


def move(script: Path, repository: str) -> None:
    """Write another repository, OWNER/NAME on GitHub, into a .py: into the badge and into the install cell."""
    text = script.read_text(encoding="utf-8")
    found = REPOSITORY.search(text)
    if found is None:
        raise SystemExit(f'{script} has no line REPOSITORY = "OWNER/NAME" in its install cell.')
    script.write_text(text.replace(found.group(1), repository), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", metavar="OWNER/NAME", help="on GitHub; what stands there is kept by default")
    options = parser.parse_args()
    for script in scripts():
        if options.repository:
            move(script, options.repository)
        script.with_suffix(".ipynb").write_text(notebook(script), encoding="utf-8")


if __name__ == "__main__":
    main()
