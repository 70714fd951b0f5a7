#!/usr/bin/env bash
# The C++ under the sanitizers: address (with undefined) runs the tests of bad input, faults and all sizes, thread
# those that step in several threads.
#
#     tests/sanitize.sh [address|thread] [pytest arguments]
#
# Compiles into build/sanitize, with ${PYTHON:-python3} and its torch; g++ only. torch and Python are not
# instrumented: what is checked is this project's own code and the memory that it is given. Leaks are
# test_leaks.py's, since LeakSanitizer would report Python's.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
kind=${1:-address}
shift || true

case $kind in
  address)
    flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
    runtime="libasan.so libubsan.so"
    tests=(tests/test_hostile.py tests/test_faults.py tests/test_optim_errors.py tests/test_threads.py
      tests/test_optim_exact.py tests/test_kernel_body.py)
    ;;
  thread)
    flags="-fsanitize=thread"
    runtime="libtsan.so"
    tests=(tests/test_threads.py)
    ;;
  *)
    echo "tests/sanitize.sh: '$kind' is neither address nor thread" >&2
    exit 2
    ;;
esac

compiler=${CXX:-g++}
preload=
for library in $runtime libstdc++.so; do
  path=$("$compiler" -print-file-name=$library)
  if [ "$path" = "$library" ]; then
    echo "tests/sanitize.sh: $compiler has no $library; it comes with the package of the compiler" >&2
    exit 2
  fi
  preload+="$path "
done

# A copy, so that the module in the tree stays the one it is.
copy=build/sanitize/$kind
mkdir -p "$copy"
cp -a setup.py pyproject.toml README.md csrc "$copy"
rm -rf "$copy/torch_freeze/"*.py "$copy/tests"
mkdir -p "$copy/torch_freeze"
tar -c --exclude='_C.*.so' --exclude='_C.*.json' torch_freeze tests | tar -x -C "$copy"
cd "$copy"
USE_CUDA=0 DEBUG=1 CC=gcc CXX=$compiler CFLAGS="$flags -fno-omit-frame-pointer" LDFLAGS="$flags" \
  "$python" setup.py -q build_ext --inplace

# The address space that tests fill up, the compiler that they call and the modules that they
# deselect here are not what is under test.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:detect_odr_violation=0:handle_abort=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS="suppressions=$PWD/tests/sanitize_thread.supp:halt_on_error=1:die_after_fork=0:report_signal_unsafe=0"
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONMALLOC=malloc
export PYTHONPATH=$PWD LD_PRELOAD=$preload
exec "$python" -m pytest -p no:cacheprovider -q "${tests[@]}" "$@"
