"""What Nsight Compute says of each kernel, in the few numbers that tell what it waits for."""

import csv
import subprocess
from collections.abc import Iterable
from typing import Any

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
# Parts of ncu's metric names; its versions differ in the rest.
KEPT = (
    "duration",
    "registers per thread",
    "achieved occupancy",
    "issue slots busy",
    "dram throughput",
    "l2 cache throughput",
    "tensor",
    "xu",
    "shared",
    "stall",
)


def profile(command: list[str]) -> dict[str, Any]:
    """Run `command` under `ncu`, clocks as they are, and keep what it says of each launch of our kernels."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    ncu = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "--page",
        "details",
        "--print-details",
        "all",
        "--kernel-name",
        "regex:^_.*_kernel$",
        *sections,
    ]
    ran = subprocess.run([*ncu, *command], capture_output=True, text=True, check=False)
    told = {"command": " ".join([*ncu, *command])}
    if ran.returncode:
        return told | {"error": (ran.stderr or ran.stdout)[-500:]}
    return told | {"launches": read_details(ran.stdout.splitlines())}


def read_details(lines: Iterable[str]) -> list[dict[str, str]]:
    """ncu's details page as CSV -> for each launch the kept metrics with their units."""
    table = [line for line in lines if line.startswith('"')]
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(table):
        metrics = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        name = row["Metric Name"]
        if any(part in name.lower() for part in KEPT):
            metrics[name] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return list(launches.values())
