"""The `fastmmoe` command, a file per subcommand; `app.py` puts them together.

Figures go to stdout, progress and errors to stderr; bad input exits with code 2.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without typer and rich, say how to get them and exit with code 1."""
    try:
        from fastmmoe_cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"fastmmoe: the command line needs {missing}: pip install 'fastmmoe[cli]'")
    # names of files may be no UTF-8, and a terminal's encoding may lack a letter of an answer
    if sys.stdout is not None:  # closed by the caller
        sys.stdout.reconfigure(errors="backslashreplace")
    app()
