"""How many CPUs a process may use: a container's quota may be less than what the machine has, and torch ignores it."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of control groups, version 2


def limit_threads(quota: Path = QUOTA) -> None:
    """Let torch have as many threads as the container has CPUs, unless OMP_NUM_THREADS is set; call it before torch.

    With more threads than CPUs the system stops all of them for a part of the time, and times mean nothing.
    """
    if cpus := cpu_quota(quota):
        os.environ.setdefault("OMP_NUM_THREADS", str(cpus))


def cpu_quota(quota: Path = QUOTA) -> int | None:
    """The number of CPUs that a container may use; None where it may use all that it has."""
    try:
        allowed, period = quota.read_text().split()
    except (OSError, ValueError):  # no quota that is told in this way
        return None
    if allowed == "max":
        return None
    return max(1, min(len(os.sched_getaffinity(0)), round(int(allowed) / int(period))))
