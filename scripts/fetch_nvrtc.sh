#!/usr/bin/env bash
# Fetches NVRTC, NVIDIA's compiler of CUDA C++ at run time, from the PyPI package nvidia-cuda-nvrtc and unpacks it below
# target/nvrtc. Prints the folder of the library, for LD_LIBRARY_PATH. Needs python3 with pip, and no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
version=13.0.88
target=target/nvrtc/$version
library=$target/nvidia/cu13/lib
if [ ! -f "$library/libnvrtc.so.13" ]; then
  mkdir -p target/nvrtc
  scratch=$(mktemp -d target/nvrtc/part.XXXXXX)
  trap 'rm -rf "$scratch"' EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" \
    "nvidia-cuda-nvrtc==$version" >&2
  python3 - "$scratch" <<'PY'
import glob, os, sys, zipfile
[wheel] = glob.glob(sys.argv[1] + "/*.whl")
zipfile.ZipFile(wheel).extractall(sys.argv[1] + "/unpacked")
os.remove(wheel)
PY
  rm -rf "$target"
  mv "$scratch/unpacked" "$target"
fi
(cd "$library" && pwd)
