"""`ard` as a user types it, in a process of its own, and the flags of a restoration of seconds."""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

ARD = [sys.executable, "-m", "ard_serve.cli"]
SMALL = ["--batch-tokens", "1024", "--steps", "6", "--rank", "4", "--learning-rate", "0.01", "--dtype", "fp32"]
SMALL += ["--window", "128", "--long-window", "256"]


def ard(*words: object, before: Sequence[str] = (), **rest: Any) -> subprocess.CompletedProcess[str]:
    command = [*before, *ARD, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **rest)
