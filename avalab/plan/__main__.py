"""`python -m avalab.plan`: the committed example, from 69 agents to a deployment and a page, in the profile `smoke`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from avalab.lab.errors import LabError
from avalab.lab.run import PROFILES, Run, byte_count
from avalab.plan import agents, pipeline


def main(arguments: list[str] | None = None) -> int:
    """Run the five steps; what a person can mend is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="python -m avalab.plan", description=__doc__)
    parser.add_argument("--agents", type=Path, default=agents.EXAMPLE)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--profile", default="smoke", choices=tuple(PROFILES))
    parser.add_argument("--site", type=Path, default=None)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(arguments)
    try:
        run = Run("plan", given.profile)
        site = given.site or run.artifacts_dir / "site"
        memory = byte_count(given.memory, least=1)
        pipeline.whole(run, given.agents, memory_bytes=memory, site=site, workers=given.workers)
    except LabError as error:
        print(f"avalab.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
