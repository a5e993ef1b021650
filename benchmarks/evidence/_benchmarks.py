"""Importing this makes the modules of `benchmarks/` importable from here."""

import pathlib
import sys


_FOLDER = str(pathlib.Path(__file__).resolve().parents[1])
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)
