"""Whether memory is short, by what the kernel says: pressure stall information, and the limit of a control group.

Source: the Linux kernel's documentation of PSI (`/proc/pressure/memory`) and of cgroup v2 (`memory.max`).
"""

from __future__ import annotations

import re
from pathlib import Path

PRESSURE = Path("/proc/pressure/memory")

GROUP = Path("/sys/fs/cgroup")

STALLED_PERCENT = 10.0  # of the last ten seconds, in which something waited for memory

FULL = 0.95  # of a group's limit


def stalled_percent(text: str) -> float:
    """`some avg10` of a text of PSI's; 0 where it says nothing."""
    found = re.search(r"^some avg10=(\d+(?:\.\d+)?)", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def used_share(current: str, limit: str, cached: str = "") -> float:
    """The part of a group's limit that is in use, without file pages that can be dropped; 0 where there is no limit."""
    if not (limit.strip().isdigit() and current.strip().isdigit() and int(limit)):
        return 0.0
    inactive = re.search(r"^inactive_file (\d+)", cached, re.MULTILINE)
    return (int(current) - (int(inactive[1]) if inactive else 0)) / int(limit)


def is_under_pressure(pressure: Path = PRESSURE, group: Path = GROUP) -> bool:
    """Whether models should leave now; False where the kernel tells nothing."""
    texts = {name: _read(group / name) for name in ("memory.current", "memory.max", "memory.stat")}
    used = used_share(texts["memory.current"], texts["memory.max"], texts["memory.stat"])
    return stalled_percent(_read(pressure)) >= STALLED_PERCENT or used >= FULL


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
