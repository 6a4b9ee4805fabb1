#!/usr/bin/env bash
# Run the server's tests with the oldest versions that pyproject.toml allows of what `ard serve` needs: scripts/floors.sh [FOLDER]
# FOLDER is for the environment, a temporary one when not given. Needs `uv` (pip install uv); takes two minutes.
set -euo pipefail
folder=${1:-$(mktemp -d)}
uv venv --quiet --clear --python 3.11 "$folder/venv"
# The test tools are not ours to pin; openai's client decides what it needs of httpx and pydantic.
uv pip install --quiet --python "$folder/venv/bin/python" --resolution lowest-direct --editable . \
    'openai>=2' 'pytest>=8.3' 'pytest-asyncio>=0.25' 'pytest-rerunfailures>=15' 'pytest-timeout>=2.3'
uv pip list --quiet --python "$folder/venv/bin/python" | grep -iE '^(fastapi|starlette|uvicorn|uvloop|httptools|h11|httpx|pydantic|prometheus)'
"$folder/venv/bin/python" -m pytest -q -m "not slow and not vllm" tests/test_server_gateway.py tests/test_server_lifecycle.py \
    tests/test_server_attach.py tests/test_server_profiles.py tests/test_server_admission.py tests/test_server_auth.py
