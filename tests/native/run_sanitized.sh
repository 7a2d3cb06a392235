#!/bin/bash
# Runs tests with a module that is built with AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   tests/native/run_sanitized.sh [pytest arguments]     default: tests/test_*.py
#
# PYTHON names the interpreter (default: python). The module and a copy of the package go to a
# temporary directory; the source tree is not touched. The interpreter itself is not instrumented,
# so the runtimes are preloaded and leaks are not looked for.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

preload=
for runtime in libasan.so libubsan.so libstdc++.so; do
  path=$(${CXX:-g++} -print-file-name=$runtime)
  if [[ $path != /* ]]; then
    echo "skipped: ${CXX:-g++} has no $runtime"
    exit 0
  fi
  preload+="$(readlink -f "$path") "
done

if ! cmake -S "$root" -B "$work/build" -DCMAKE_CXX_COMPILER="${CXX:-g++}" \
    -DCMAKE_BUILD_TYPE=Debug -DJAX_EP_CUDA=OFF -DJAX_EP_SANITIZE=address,undefined \
    -DPython_EXECUTABLE="$(command -v "$python")" > "$work/build.log" 2>&1 ||
  ! cmake --build "$work/build" --parallel "$(nproc)" >> "$work/build.log" 2>&1; then
  tail -40 "$work/build.log"
  echo "the build failed"
  exit 1
fi
mkdir "$work/package"
cp -r "$root/jax_ep" "$work/package/"
rm -f "$work"/package/jax_ep/_cpu*.so
cp "$work"/build/_cpu*.so "$work/package/jax_ep/"

cd "$root" || exit 1
if [[ $# -eq 0 ]]; then set -- tests/test_*.py; fi
# Reports go to files: pytest keeps what the tests print, and some tests start other processes.
export LD_PRELOAD=$preload PYTHONPATH=$work/package${PYTHONPATH:+:$PYTHONPATH}
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:log_path=$work/report
export UBSAN_OPTIONS=print_stacktrace=1:log_path=$work/report
export PYTHONSAFEPATH=1  # not the source tree's module
start=$SECONDS
"$python" -c 'import jax_ep; print("module:", jax_ep._cpu.__file__)' || exit 1
"$python" -m pytest "$@"
status=$?
unset LD_PRELOAD
found=$(cat "$work"/report.* 2> /dev/null | grep -cE "ERROR: AddressSanitizer|runtime error:")
echo "pytest: exit code $status; sanitizers: $found findings; $((SECONDS - start)) s"
cat "$work"/report.* 2> /dev/null | head -100
[[ $status -eq 0 && $found -eq 0 ]]
