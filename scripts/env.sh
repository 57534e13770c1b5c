# Sourced by the other scripts: makes or reuses .venv in the repository and leaves its interpreter in $VENV_PYTHON.
# Call it as `lamina_environment EXTRA`, EXTRA being a group of [project.optional-dependencies]. .venv has the newest
# transformers that pyproject.toml allows; `lamina_environment EXTRA oldest` makes .venv-oldest, with the oldest.

TORCH="torch==2.13.0"

say() { printf '%s\n' "lamina: $*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    say "no Python 3.11 or newer found: install one, or name it as PYTHON=/path/to/python3"
    return 1
}

pip_install() { "$VENV_PYTHON" -m pip install -qq --disable-pip-version-check "$@"; }

# Is NAME==VERSION there, in any build of that version?
installed() {
    "$VENV_PYTHON" - "$1" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
name, _, wanted = sys.argv[1].partition("==")
try:
    sys.exit(version(name).partition("+")[0] != wanted)
except PackageNotFoundError:
    sys.exit(1)
PYTHON
}

# transformers==VERSION, of the lower bound in pyproject.toml: the range is stated nowhere else.
oldest_transformers() {
    local version
    version=$(sed -n 's/^ *"transformers>=\([0-9][0-9.]*\),.*/\1/p' pyproject.toml)
    if [ -z "$version" ]; then
        say "pyproject.toml has no line \"transformers>=VERSION,<VERSION\""
        return 1
    fi
    printf '%s\n' "transformers==$version"
}

lamina_environment() {
    local extra=$1 end=${2:-newest} venv=.venv transformers=transformers stamp wanted python
    if [ "$end" = oldest ]; then
        venv=.venv-oldest
        transformers=$(oldest_transformers)
    fi
    VENV_PYTHON=$PWD/$venv/bin/python
    # The stamp is written last, so an environment whose making was interrupted is completed, not trusted.
    stamp=$venv/.lamina-$extra
    wanted="$PWD $TORCH $(cksum < pyproject.toml)"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$VENV_PYTHON" -c '' 2>/dev/null; then
        return
    fi
    if ! "$VENV_PYTHON" -c '' 2>/dev/null; then
        python=$(find_python)
        say "making $venv with $("$python" --version)"
        "$python" -m venv --clear "$venv" || {
            say "'$python -m venv' failed (on Debian and Ubuntu: apt install python3-venv)"
            return 1
        }
    fi
    # First and pinned, so that a CPU-only build (2.13.0+cpu) wins wherever pip is told of one, by PIP_FIND_LINKS or
    # PIP_EXTRA_INDEX_URL; the plain name would take the newest from PyPI, with gigabytes of CUDA libraries.
    if ! installed "$TORCH"; then
        say "installing $TORCH into $venv (once; some minutes on a slow line)"
        pip_install "$TORCH"
    fi
    say "installing lamina[$extra] with the $end $transformers"
    # Named, so that one which is there already and still allowed gives way to the newest; of the rest, what is needed.
    pip_install --upgrade --upgrade-strategy only-if-needed -e ".[$extra]" "$transformers"
    printf '%s\n' "$wanted" > "$stamp"
}
