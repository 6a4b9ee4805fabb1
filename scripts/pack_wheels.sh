#!/usr/bin/env bash
# Packages of requirements/cpu.lock, for a machine with Python 3.12 and no registry: scripts/pack_wheels.sh FOLDER NAME...
# Unpacks their wheels into FOLDER, without what they need in turn: name that as well.
set -euo pipefail
folder=${1:?usage: pack_wheels.sh FOLDER NAME...}
shift
list=$(mktemp)
for name in "$@"; do grep -i "^$name==" requirements/cpu.lock; done > "$list"
platforms=$(for i in $(seq 17 39); do printf -- '--platform manylinux_2_%s_x86_64 ' "$i"; done)
# shellcheck disable=SC2086
"${PYTHON:-python3}" -m pip install -q --no-deps --no-compile --only-binary=:all: --python-version 3.12 --implementation cp \
    --abi cp312 --abi abi3 --abi none $platforms --platform manylinux2014_x86_64 --target "$folder" -r "$list"
rm "$list"
