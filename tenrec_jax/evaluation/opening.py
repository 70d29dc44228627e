"""The record of who read the test part, and when: `eval/test_opened.json`.

A test part that is read again and again becomes a second validation part. A run reads it once, at the end; where it has to be read again
(the evaluation was interrupted, or its files were removed), that is recorded, and the report says so.
"""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tenrec_jax.files import read_json, write_json

FILE = "eval/test_opened.json"


def record_opening(workdir: Path) -> dict[str, Any]:
    """Write down that the test part is about to be read, before it is.

    Returns:
        The whole record: "times" and, for each reading in turn, when it began (UTC) and by what command.
    """
    path = workdir / FILE
    readings = read_json(path)["readings"] if path.exists() else []
    readings.append({"at": datetime.now(UTC).isoformat(timespec="seconds"), "command": sys.argv})
    record = {"times": len(readings), "readings": readings}
    write_json(path, record)
    return record
