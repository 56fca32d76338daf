#!/usr/bin/env bash
# gpu_suite.sh [FOLDER] [ARCH]: packs the differential suite into FOLDER (target/gpu-suite) for a machine with a GPU of ARCH
# (sm_90a): the test binary, all its kernels compiled, and its data. Needs NVRTC and no GPU; the machine with the GPU
# needs its driver only, and compute-sanitizer for the second of these:
#
#   FOLDER/run.sh all         every case on every backend against the reference evaluator
#   FOLDER/run.sh sanitizer   small steps of every case under memcheck, racecheck and initcheck
#
# SUITE_TOOLS names some of these tools, SUITE_PART=2/4 takes the second of four interleaved parts of the cases.
# A missing GPU is an error; without cuBLASLt the backend cuda-library is left out, unless MILLRACE_REQUIRE_LIBRARY=1. SUITE_ARGS adds arguments (cargo test --test backends says which), SUITE_LIMIT bounds the seconds
# of each run.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-target/gpu-suite}")
arch=${2:-sm_90a}
rm -rf "$out"
mkdir -p "$out/root/tests" "$out/kernels"
cargo build --release --test backends
binary=$(cargo build --release --test backends --message-format=json 2>/dev/null |
  sed -n 's/.*"executable":"\([^"]*backends-[^"]*\)".*/\1/p' | tail -1)
strip -o "$out/backends" "$binary"
MILLRACE_KERNEL_CACHE="$out/kernels" "$out/backends" --compile-only --target "cuda:$arch" | tee "$out/compiled.txt"
for folder in zoo backends data/configs data/tiny-random filetests/regressions; do
  mkdir -p "$out/root/tests/$folder"
  cp -r "tests/$folder/." "$out/root/tests/$folder/"
done
cat > "$out/run.sh" <<RUN
#!/usr/bin/env bash
# run.sh all|sanitizer
set -u
cd "\$(dirname "\$0")"
export MILLRACE_REQUIRE_GPU=1 MILLRACE_KERNEL_CACHE="\$PWD/kernels" MILLRACE_SUITE_ROOT="\$PWD/root"
export MILLRACE_SUITE_LOG="\$PWD/failures.txt" RUST_BACKTRACE=0
arch="--target cuda:$arch"
limit=\${SUITE_LIMIT:-600}
case "\${1:-all}" in
all)
  timeout "\$limit" ./backends \$arch \${SUITE_ARGS:-}
  ;;
sanitizer)
  result=0
  small="--backends cuda-static --rows \${SUITE_ROWS:-33} --steps \${SUITE_STEPS:-3} --graphs 12"
  if [ -n "\${SUITE_PART:-}" ]; then
    ./backends \$arch --graphs 12 --list | awk -v part=\${SUITE_PART%/*} -v parts=\${SUITE_PART#*/} 'NR % parts == part % parts' > part.txt
    small="\$small --cases part.txt"
  fi
  for tool in \${SUITE_TOOLS:-memcheck racecheck initcheck}; do
    # Asking a kernel for one parameter more than it has is how their number is found.
    [ \$tool = memcheck ] && api="--report-api-errors no" || api=""
    # The device runs under the tool, so few rows and steps; the same steps without it come first in every list.
    timeout "\$limit" compute-sanitizer --tool \$tool \$api --error-exitcode 9 --print-limit 20 --log-file \$tool.txt \\
      ./backends \$arch \$small \${SUITE_ARGS:-} > \$tool.out 2>&1
    code=\$?
    [ \$code = 0 ] || result=1
    echo "\$tool: exit \$code; \$(tail -1 \$tool.txt | tr -d =); \$(grep -E '^cuda-static' \$tool.out | tr -s ' ')"
    grep -E "WRONG|failed" \$tool.out | head -5
    grep -A6 -E "Invalid|Race|Uninit|Error|Host" \$tool.txt | grep -vE "Saved host|Host Frame" | head -24
  done
  exit \$result
  ;;
esac
RUN
chmod +x "$out/run.sh"
du -sh "$out" | cut -f1
