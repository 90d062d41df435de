# The Python environment in .venv: made, filled from the locked requirements. Read by script/setup.
# shellcheck shell=bash

PYTHON=.venv/bin/python
STAMP=.venv/undercroft-setup # what the environment was made from: its first word is runtime or dev

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

python_version() { "$PYTHON" -c 'import platform; print(platform.python_version())' 2>/dev/null || true; }

# The first Python that can make the environment: the system's own, else any in the PATH. Empty when there is none.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate" &&
            "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
}

# Whether .venv can be kept. It holds absolute paths: one that was moved cannot.
venv_works() {
    [[ -x $PYTHON ]] && new_enough "$PYTHON" &&
        { [[ ! -e $STAMP ]] || grep -qxF "in $root" "$STAMP"; }
}

make_venv() {
    local python
    python=$(find_python)
    [[ -n $python ]] || die 'found no Python 3.11 or newer with its venv module'
    step "make .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
}

# uv does not read pip's configuration. Where pip takes packages from, uv shall too: a mirror, a
# company's certificate, a proxy. What is set for uv itself comes first.
follow_pip() {
    local config value
    config=$("$PYTHON" -m pip config list 2>/dev/null || true)
    setting() { # setting KEY: pip's value for it, separated by blanks
        local section
        for section in ':env:' install global; do
            value=$(sed -n "s/^$section\.$1='\(.*\)'\$/\1/p" <<<"$config" | sed 's/\\n/ /g; s/^ *//; s/ *$//')
            [[ -z $value ]] || return 0
        done
        return 1
    }
    [[ -n ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]] || ! setting index-url || export UV_DEFAULT_INDEX=$value
    if [[ -z ${UV_INDEX:-}${UV_EXTRA_INDEX_URL:-} ]] && setting extra-index-url; then
        # Like pip: all indexes are equal. Safe here, because every package is held to its hash.
        export UV_INDEX=$value UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match}
    fi
    if [[ -z ${UV_FIND_LINKS:-} ]] && setting find-links; then
        # shellcheck disable=SC2086 # pip skips a directory that is not there; uv would stop
        value=$(for path in $value; do [[ $path == /* && ! -d $path ]] || echo "$path"; done | paste -sd, -)
        [[ -z $value ]] || export UV_FIND_LINKS=$value
    fi
    [[ -n ${UV_NO_INDEX:-} ]] || ! setting no-index || export UV_NO_INDEX=$value
    [[ -n ${UV_INSECURE_HOST:-} ]] || ! setting trusted-host || export UV_INSECURE_HOST=$value
    [[ -n ${SSL_CERT_FILE:-} ]] || ! setting cert || export SSL_CERT_FILE=$value
    [[ -n ${ALL_PROXY:-}${HTTPS_PROXY:-}${https_proxy:-} ]] || ! setting proxy || export ALL_PROXY=$value
    export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true} UV_PYTHON_DOWNLOADS=never
    unset -f setting
}

install_packages() { # install_packages runtime|dev
    local uv_version
    step "install Python packages ($1)"
    uv_version=$(sed -n 's/^uv==\([^ ]*\).*/\1/p' requirements/uv.txt)
    if [[ $(.venv/bin/uv --version 2>/dev/null) != "uv $uv_version"* ]]; then
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
            --requirement requirements/uv.txt ||
            die 'pip could not install uv (see above)' 'pip must reach a package index: see pip config'
    fi
    # In a subshell: the settings are for uv alone.
    (
        follow_pip
        .venv/bin/uv pip sync --quiet --python "$PYTHON" --require-hashes --only-binary :all: \
            --compile-bytecode "requirements/$1.txt"
    ) || die 'the Python packages could not be installed (see above)'
}

# Makes `import undercroft` and .venv/bin/croft work straight from src/: nothing is built, nothing downloaded.
install_project() {
    "$PYTHON" - "$root" <<'PROGRAM'
import os
import sys
import sysconfig

root = sys.argv[1]
site, src, python = sysconfig.get_path("purelib"), f"{root}/src", f"{root}/.venv/bin/python"
with open(f"{site}/undercroft.pth", "w") as file:
    file.write(src + "\n")

# -I: nothing from the directory it is called in, nor from PYTHON* variables.
# -S: without the module `site`, a fifth of the start; all it would add here is the path.
if " " in root or len(root) > 90:
    # A #! line takes neither blanks nor long paths: this is a shell script and a Python string at once.
    first = f"#!/bin/sh\n'''exec' \"{python}\" -IS \"$0\" \"$@\"\n' '''\n"
else:
    first = f"#!{python} -IS\n"
with open(f"{root}/.venv/bin/croft", "w") as file:
    file.write(
        f"{first}import sys\n\nsys.path += [{src!r}, {site!r}]\n\n"
        "from undercroft.cli.main import main\n\nsys.exit(main())\n"
    )
    os.fchmod(file.fileno(), 0o755)
PROGRAM
}

# Brings .venv to the locked requirements. $1: runtime or dev; an environment made for dev stays one.
install_python() {
    local tools=$1 sum stamp
    [[ $(head -c 3 "$STAMP" 2>/dev/null || true) != dev ]] || tools=dev
    venv_works || make_venv
    sum=$(cat "requirements/$tools.txt" requirements/uv.txt script/lib/python.sh | sha256sum)
    stamp=$(printf '%s %s\nin %s' "$tools" "${sum%% *}" "$root")
    if [[ $(cat "$STAMP" 2>/dev/null || true) != "$stamp" ]]; then
        install_packages "$tools"
        install_project
        printf '%s\n' "$stamp" >"$STAMP"
    fi
    # Programs run straight from src/: the first start shall not have to compile it.
    [[ ! -w src/undercroft ]] || "$PYTHON" -m compileall -q src
}
