# Sourced by the scripts beside it: makes .venv at the root of the checkout if it is missing or stale.
# Needs python3 (3.10 or newer) with venv, and the package index.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
stamp=$root/.venv/.made-from

make_environment() { # make_environment EXTRAS: an editable install, anew when pyproject.toml changed
    local wanted
    wanted="$1 $(cksum <"$root/pyproject.toml")"
    if [ ! -x "$python" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "setting up .venv ..." >&2
        python3 -m venv "$root/.venv"
        "$python" -m pip install --quiet --editable "$root[$1]"
        echo "$wanted" >"$stamp"
    fi
}
