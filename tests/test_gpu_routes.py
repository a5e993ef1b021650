"""`benchmarks/gpu_routes.py` lowers a step by other ways than the library's, for a GPU
that need not be there."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest


_PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu_routes.py"


@pytest.mark.slow
# Its interface changes with each version of JAX.
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU of an older JAX")
def test_mosaic_gpu_takes_the_tile_function(tmp_path):
    record = tmp_path / "record.json"
    options = (
        "--routes",
        "mosaic-16",
        "mosaic-warpgroup",
        "--sizes",
        "128",
        "--json",
        record,
    )
    subprocess.run([sys.executable, _PROGRAM, *options], check=True)
    rows = json.loads(record.read_text())["rows"]
    assert [row.get("export", row.get("error")) for row in rows] == ["yes"] * 2
    assert 100 < rows[0]["lines"] < 400
