"""Notebooks that run beside each other in `make test` keep artefacts apart: one would replace what another reads."""

import os
from pathlib import Path

if _process := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["AVALAB_ARTIFACTS"] = str(Path(__file__).resolve().parent.parent / "artifacts" / f"test-{_process}")
