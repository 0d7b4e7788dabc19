"""Compress, check and time a pretrained sentence-embedding model: the same as ``ss1 demo``.

The steps are in ss1_compile/demo/main.py. Run with --help for the options, with --quick for a
minute's version.
"""

import sys

from ss1_compile.cli import app

if __name__ == "__main__":
    app(["demo", *sys.argv[1:]])
