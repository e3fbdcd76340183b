#!/usr/bin/env bash
# Builds, checks and measures the CUDA backend within a few minutes, for machines that are lent by the minute.
#
#   bench/ops/cuda_quick.sh OUT [--prebuilt FOLDER] [--model FOLDER] [--small] [--rehearse]
#
# OUT gets one log for each step, the figures as JSON, and summary.txt: the steps with their seconds and exit codes. No
# step stops the others. --prebuilt names a folder that has what was built elsewhere: libquantrature_cuda.so,
# quantrature_gpu_tests and, for the same Python, _C.abi3.so or whatever the extension is called. --model measures a
# model of transformers as well. --rehearse does all of it where no GPU is, with the kernels on the CPU (build/dev).
set -u
cd "$(dirname "$0")/../.."
out= prebuilt= model= small= rehearse=
while [ $# -gt 0 ]; do
  case $1 in
    --prebuilt) prebuilt=$(realpath "$2"); shift ;;
    --model) model=$(realpath "$2"); shift ;;
    --small) small=--small ;;
    --rehearse) rehearse=yes ;;
    -*) echo "unknown option $1" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || { echo "usage: bench/ops/cuda_quick.sh OUT [--prebuilt FOLDER] [--model FOLDER] [--small] [--rehearse]" >&2; exit 2; }
mkdir -p "$out" && out=$(realpath "$out")
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
began=$(date +%s)
: > "$out/summary.txt"

# step NAME SECONDS COMMAND...: runs a command for as long as it may take, and notes how it went.
step() {
  local name=$1 limit=$2 start code
  shift 2
  start=$(date +%s%N)
  timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1
  code=$?
  printf '%5d s  %-12s %8d ms  exit %d\n' "$(($(date +%s) - began))" "$name" \
    "$((($(date +%s%N) - start) / 1000000))" "$code" >> "$out/summary.txt"
  return $code
}

# Where what was built lies: of this machine's build or of another's.
built() {
  if [ -n "$prebuilt" ] && [ -e "$prebuilt/$1" ]; then echo "$prebuilt/$1"; else echo "$build/$2/$1"; fi
}

build=build/gpu
build_all() {
  local cuda=ON architecture
  [ -n "$prebuilt" ] && [ -e "$prebuilt/libquantrature_cuda.so" ] && cuda=OFF
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  cmake -S . -B $build -G Ninja -DCMAKE_BUILD_TYPE=Release -DQUANTRATURE_PYTHON=ON -DQUANTRATURE_CUDA=$cuda \
    -DQUANTRATURE_CUDA_ARCHITECTURES="$architecture-real" -DPython_EXECUTABLE="$(command -v "$python")" &&
    if [ $cuda = ON ]; then ninja -C $build -k 0 _C quantrature_cuda; else ninja -C $build _C; fi
}
export -f build_all
export build prebuilt python

if [ -n "$rehearse" ]; then
  build=build/dev
  tests=$build/tests/cpp/quantrature_device_tests
  export QUANTRATURE_CUDA_PLUGIN=$PWD/$build/tests/cpp/libquantrature_cuda_on_host.so
else
  step machine 20 nvidia-smi
  extension=$(ls "${prebuilt:-/nowhere}"/_C*.so 2>/dev/null | head -1)
  if [ -n "$extension" ]; then
    cp "$extension" python/quantrature/
  else
    step build 240 bash -c build_all &
    building=$!
  fi
  tests=$(built quantrature_gpu_tests tests/cpp)
  QUANTRATURE_CUDA_PLUGIN=$(built libquantrature_cuda.so cuda)
  export QUANTRATURE_CUDA_PLUGIN
  if [ ! -e "$tests" ]; then  # they need GoogleTest, which may be missing: a step of their own
    wait
    step build-tests 240 bash -c "cmake -S . -B $build -DQUANTRATURE_TESTS=ON && ninja -C $build quantrature_gpu_tests"
  fi
fi
step core 120 "$tests" --gtest_brief=1
if [ -z "$rehearse" ] && command -v compute-sanitizer > /dev/null; then
  # Short cases; the kernels are the same in the long ones.
  for tool in memcheck racecheck; do
    step $tool 80 compute-sanitizer --tool $tool --error-exitcode 9 "$tests" &
    sanitizing="${sanitizing:-} $!"
  done
fi
[ -n "${building:-}" ] && wait "$building"
step python 240 "$python" -m pytest -q --maxfail=30 -p no:cacheprovider tests/python/core/test_cuda.py
[ -n "${sanitizing:-}" ] && wait $sanitizing
if [ -z "$rehearse" ]; then
  step figures 200 "$python" -m bench.ops.cuda $small --output "$out/cuda.json"
  [ -n "$model" ] && step model 200 "$python" -m bench.ops.cuda_model "$model" --output "$out/model.json"
fi
cp python/quantrature/_C*.so "$out/" 2>/dev/null
cat "$out/summary.txt"
