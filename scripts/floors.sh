#!/usr/bin/env bash
# Run the server's tests with the oldest versions that pyproject.toml allows of what `ard serve` needs, and keep what came of it:
# scripts/floors.sh docs/results/server-floors.json [FOLDER]
# FOLDER is for the environment, a temporary one when not given. Needs `uv` (pip install uv); takes some minutes.
set -euo pipefail
out=${1:?usage: floors.sh OUT.json [FOLDER]} folder=${2:-$(mktemp -d)}
python=$folder/venv/bin/python
uv venv --quiet --clear --python 3.11 "$folder/venv"
# The test tools are not ours to pin; openai's client decides what it needs of httpx and pydantic.
uv pip install --quiet --python "$python" --resolution lowest-direct --editable . \
    'openai>=2' 'pytest>=8.3' 'pytest-asyncio>=0.25' 'pytest-rerunfailures>=15' 'pytest-timeout>=2.3'
code=0
"$python" -m pytest -q -m "not slow and not vllm" --junitxml "$folder/junit.xml" tests/test_server_gateway.py \
    tests/test_server_lifecycle.py tests/test_server_attach.py tests/test_server_profiles.py tests/test_server_admission.py \
    tests/test_server_auth.py || code=$?
"$python" - "$out" "$folder/junit.xml" <<'PYTHON'
import json, sys
from xml.etree import ElementTree

sys.path.insert(0, "tests")
from helpers_bench import circumstances

suite = ElementTree.parse(sys.argv[2]).getroot()[0].attrib
names = "fastapi h11 httptools httpx prometheus-client pydantic starlette uvicorn uvloop".split()
counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
found = circumstances(tuple(names)) | counts | {"command": f"scripts/floors.sh {sys.argv[1]}", "seconds": float(suite["time"])}
open(sys.argv[1], "w").write(json.dumps(found, indent=2) + "\n")
print(json.dumps(found, indent=2))
PYTHON
exit "$code"
