"""The page of a sweep: `report.html` in its workdir, one file that needs nothing else."""

from pathlib import Path

from tenrec_jax.evaluation.figures import figures, interval_plot
from tenrec_jax.evaluation.page import bullets, document, table
from tenrec_jax.files import write_text
from tenrec_jax.sweep.leaderboard import Leaderboard, notes, table_rows

FILE = "report.html"


def write_page(board: Leaderboard, workdir: Path) -> Path:
    """Write the page of a leaderboard into the sweep's workdir, and return its path."""
    best, sections = board.places[0], {"What was found": bullets(notes(board))}
    objective = {place.unit: place.objective for place in board.places}
    difference = {place.unit: place.less_reference.to_json() for place in board.places if place.less_reference}
    plots = [interval_plot("objective", f"Validation {board.objective}, with 95 % intervals", {"": objective})]
    if difference:
        title = f"Less that of {board.reference}, paired by user; the dotted line is none"
        plots.append(interval_plot("difference", title, {"": difference}, mark=0.0))
    header, *rows = table_rows(board)
    sections["Units"] = figures(*plots) + table(f"Units by validation {board.objective}", header, rows)
    first = f"{best.unit} is first of {len(board.places)} units by validation {board.objective}."
    write_text(workdir / FILE, document(f"Sweep {workdir.name}", first, sections))
    return workdir / FILE
