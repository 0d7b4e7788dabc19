"""Where the command ``ss1`` used to be; :mod:`ss1_cli` has it now, and loads without torch."""

from ss1_cli import app

__all__ = ["app"]
