"""A thread that waits for another lets the core go soon."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

KNOWN = "GOMP_SPINCOUNT = '{}'"


@pytest.mark.parametrize(
    "given, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)]
)
def test_what_openmp_reads_when_pytorch_loads_it(given, expected):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    said = subprocess.run(
        [sys.executable, "-c", "import baichuan, torch"],
        env=environment | given | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this PyTorch has another OpenMP than GNU's")
    assert (KNOWN.format(expected or "1000") in said) == (expected is not None)
