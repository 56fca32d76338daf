#!/usr/bin/env bash
# gpu_suite.sh [FOLDER] [ARCH]: packs what shows on a machine with a GPU of ARCH (sm_90a) that engines are right into FOLDER
# (target/gpu-suite): the differential suite with all its kernels compiled, the tests of the runtime, of streaming and the soak,
# and their data. Needs NVRTC and no GPU. The machine with the GPU needs its driver; NVRTC too for all but `all` and `library`, and
# compute-sanitizer for those that say so:
#
#   FOLDER/run.sh all         every case on every backend against the reference evaluator
#   FOLDER/run.sh sanitizer   small steps of every case under memcheck, racecheck and initcheck
#   FOLDER/run.sh runtime     sessions on the device: graphs, allocations, faults, the ledger against the driver
#   FOLDER/run.sh library     what cuBLASLt computes against the kernels beside it; its absence is an error
#   FOLDER/run.sh streaming   the bits of the fixture models under every budget, and live changes of it
#   FOLDER/run.sh large       the bits of the Llama 3.1 8B shape under every budget (16 GB of device and of pinned memory)
#   FOLDER/run.sh soak        random budgets, allocations, shapes and cancelled requests for SOAK_SECONDS (60)
#   FOLDER/run.sh soak-memcheck   the same for SOAK_SECONDS (10) under memcheck
#
# SUITE_TOOLS names some of the sanitizer's tools, SUITE_PART=2/4 takes the second of four interleaved parts of the cases.
# A missing GPU is an error. Without cuBLASLt the backend cuda-library is left out, unless MILLRACE_REQUIRE_LIBRARY=1. SUITE_ARGS
# adds arguments (of cargo test --test backends, or of the test harness), SUITE_LIMIT bounds the seconds of each run.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-target/gpu-suite}")
arch=${2:-sm_90a}
rm -rf "$out"
mkdir -p "$out/root/tests" "$out/kernels"
tests=(backends cuda_runtime streaming soak library)
cargo build --release "${tests[@]/#/--test=}"
for name in "${tests[@]}"; do
  binary=$(cargo build --release --test "$name" --message-format=json 2>/dev/null |
    sed -n "s/.*\"executable\":\"\([^\"]*\/$name-[^\"]*\)\".*/\1/p" | tail -1)
  strip -o "$out/$name" "$binary"
done
MILLRACE_KERNEL_CACHE="$out/kernels" "$out/backends" --compile-only --target "cuda:$arch" | tee "$out/compiled.txt"
MILLRACE_KERNEL_CACHE="$out/kernels" "$out/library" --exact kernels_beside_the_library_build > /dev/null
for folder in zoo backends data/configs data/tiny-random filetests/regressions; do
  mkdir -p "$out/root/tests/$folder"
  cp -r "tests/$folder/." "$out/root/tests/$folder/"
done
mkdir -p "$out/root/examples/models"
cp -r examples/models/baker-street-6m "$out/root/examples/models/"
cat > "$out/run.sh" <<RUN
#!/usr/bin/env bash
# run.sh all|sanitizer|runtime|library|streaming|large|soak|soak-memcheck
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
runtime)
  timeout "\$limit" ./cuda_runtime --nocapture --test-threads 1 \${SUITE_ARGS:-}
  ;;
library)
  export MILLRACE_REQUIRE_LIBRARY=1
  timeout "\$limit" ./library --nocapture --test-threads 1 the_library_computes results_are_the_same \${SUITE_ARGS:-}
  ;;
streaming)
  MILLRACE_TARGETS=cuda:$arch timeout "\$limit" ./streaming --test-threads 1 \${SUITE_ARGS:-}
  ;;
large)
  MILLRACE_TARGETS=cuda:$arch timeout "\$limit" ./streaming --ignored --nocapture a_large_shape
  ;;
soak | soak-memcheck)
  export MILLRACE_SOAK_TARGET=cuda:$arch
  if [ "\$1" = soak ]; then
    MILLRACE_SOAK_SECONDS=\${SOAK_SECONDS:-60} timeout "\$limit" ./soak --ignored --nocapture
  else
    MILLRACE_SOAK_SECONDS=\${SOAK_SECONDS:-10} timeout "\$limit" compute-sanitizer --tool memcheck --report-api-errors no \
      --error-exitcode 9 --print-limit 20 ./soak --ignored --nocapture
  fi
  ;;
*)
  echo "unknown: \$1" >&2
  exit 2
  ;;
esac
RUN
chmod +x "$out/run.sh"
du -sh "$out" | cut -f1
