#!/usr/bin/env bash
# Collect, on a machine with a network, the wheels that a GPU machine without one needs for `srlm bench device`.
#   tools/device/wheels.sh FOLDER [PYTHON_VERSION]        For x86-64; the version is that of the GPU machine's Python (3.12).
# That machine is taken to have torch with CUDA, triton, transformers, accelerate and what these need. What the project
# asks for and the machine lacks, such as typer or scipy, is to be added to the list.
set -euo pipefail
folder=${1:?usage: wheels.sh FOLDER [PYTHON_VERSION]} python=${2:-3.12}
platforms=()
for libc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${libc}_x86_64"); done
collect() {
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
    --python-version "$python" "${platforms[@]}" --platform manylinux2014_x86_64 --dest "$folder" "$@"
}
collect megatron-core==0.16.1 pydantic orjson rapidfuzz xxhash tenacity typing-inspection typing-extensions annotated-types
core=$(unzip -p "$folder"/pydantic-[0-9]*.whl "*/METADATA" | sed -n "s/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p")
collect "pydantic-core==$core"
collect trl==1.16.0 'liger-kernel>=0.8.5' datasets dill multiprocess # the baseline of the part `trl`
du -sh "$folder"
