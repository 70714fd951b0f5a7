#!/usr/bin/env bash
# The C++ under the sanitizers: `address` (with undefined behaviour) runs the tests of bad input, faults, hooks and all
# sizes, `thread` those that step in several threads. The exit status is 0 only if nothing was found.
#
#     tests/sanitize.sh [address|thread] [pytest arguments]
#
# Compiles into build/sanitize, with ${PYTHON:-python3} and its torch and ${CXX:-g++}, a GCC. torch and Python are
# not instrumented: what is checked is this project's own code and the memory that it is given. Leaks are
# test_leaks.py's, since LeakSanitizer would report Python's.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "tests/sanitize.sh: $*" >&2
  exit 2
}

kind=${1:-address}
shift || true
case $kind in
  address)
    # Without vptr, which needs type information that torch hides.
    flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
    runtime="libasan.so libubsan.so"
    # Left out, for they take minutes here: two tables of accesses that the kernel's body would make and does not,
    # and what only adds other results of torch to compare with.
    tests=(tests/optim/test_hostile_*.py tests/optim/test_{faults,errors,threads,exact,state_policies}.py
      tests/in_backward/test_step.py tests/kernels/test_body.py
      --deselect=tests/kernels/test_body.py::test_every_byte_is_stored_once
      --deselect=tests/kernels/test_body.py::test_all_but_the_ends_moves_in_vectors
      --deselect=tests/optim/test_exact.py::test_equals_stock_under_every_cpu_capability
      --deselect=tests/optim/test_exact.py::test_narrow_error_is_never_above_stocks)
    ;;
  thread)
    flags="-fsanitize=thread"
    runtime="libtsan.so"
    # Left out: it shares steps between threads of OpenMP, whose barriers are not seen.
    tests=(tests/optim/test_threads.py
      --deselect=tests/optim/test_threads.py::test_steps_after_one_that_waited_for_a_late_thread_are_done_alone)
    ;;
  *)
    fail "'$kind' is neither address nor thread"
    ;;
esac

python=$(command -v "${PYTHON:-python3}") || fail "there is no ${PYTHON:-python3}; set PYTHON"
case $python in /*) ;; *) python=$PWD/$python ;; esac
compiler=${CXX:-g++}
command -v "$compiler" >/dev/null || fail "there is no $compiler; install g++ or set CXX to a GCC"
# Python is not linked with them, so they are loaded before it; libstdc++ too, whose exceptions they intercept.
preload=
for library in $runtime libstdc++.so; do
  path=$("$compiler" -print-file-name="$library")
  [ "$path" != "$library" ] ||
    fail "$compiler has no $library, so nothing was checked; it comes with GCC (libgcc-*-dev, libasan, libtsan)"
  preload+="$path "
done

# A copy, so that the module in the tree stays what it is, and unchanged sources are not compiled again.
copy=build/sanitize/$kind
mkdir -p "$copy"
rm -rf "$copy/csrc" "$copy/src" "$copy/tests"
tar -c --exclude='_C.*' --exclude=__pycache__ setup.py pyproject.toml README.md LICENSE csrc src tests |
  tar -x -C "$copy"
cd "$copy"
# Reports name lines and functions, for which -g1 is enough. The -g of DEBUG=1, which comes after CFLAGS, describes
# every type of torch's headers too and takes twice as long to compile.
printf '#!/bin/sh\nexec "%s" "$@" -g1\n' "$compiler" >compiler
chmod +x compiler
# With --inplace comes a second module, which the tests of the kernel's body use.
place=--inplace
[ "$kind" = address ] || place=--build-lib=src
# -O0, for what is optimised away is not checked.
USE_CUDA=0 DEBUG=1 CC=$PWD/compiler CXX=$PWD/compiler CFLAGS="$flags -fno-omit-frame-pointer" LDFLAGS="$flags" \
  "$python" setup.py -q build_ext "$place" >build.log 2>&1 || { cat build.log >&2; fail "it does not compile"; }

# A step that does not get memory has to say so. Freed memory is kept from reuse up to 16 MB: more slows every
# fork down. Python's own allocator would hide its objects.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_abort=1:quarantine_size_mb=16
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export TSAN_OPTIONS="suppressions=$PWD/tests/sanitize_thread.supp:halt_on_error=1:die_after_fork=0"
export PYTHONMALLOC=malloc
# ThreadSanitizer does not see the barriers of OpenMP's own threads.
[ "$kind" = address ] || export OMP_NUM_THREADS=1
# Where addresses are spread wider than ThreadSanitizer expects, it needs them not to be.
fixed=
[ "$kind" = address ] || ! setarch "$(uname -m)" -R true 2>/dev/null || fixed="setarch $(uname -m) -R"
export PYTHONPATH=$PWD/src
# Reports go to stderr itself, which pytest would capture and lose with the process.
# shellcheck disable=SC2086
exec $fixed env LD_PRELOAD="$preload" "$python" -m pytest -p no:cacheprovider -q --capture=sys "${tests[@]}" "$@"
