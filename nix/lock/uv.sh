# uv for the Makefile, which sources this: where uv comes from, which Python an environment gets, what this host lacks.
# Each complaint is one line that ends with what to do.

fail() {
    echo "$*" >&2
    exit 1
}

# packages DEBIAN FEDORA: the command that installs them here.
packages() {
    if type -P apt-get > /dev/null; then
        echo "apt-get install $1"
    elif type -P dnf > /dev/null; then
        echo "dnf install $2"
    else
        echo "install $1, or whatever this distribution calls it"
    fi
}

# needs ENV: complains before anything is downloaded.
needs() {
    local libc libraries=${LD_LIBRARY_PATH:-}
    [[ $(uname -sm) == "Linux x86_64" ]] || fail "the locks hold wheels for Linux on x86_64; this is $(uname -sm)"
    libc=$(getconf GNU_LIBC_VERSION 2> /dev/null) || true
    [[ $libc =~ ^glibc\ 2\.([0-9]+) ]] && ((BASH_REMATCH[1] >= 34)) ||
        fail "the wheels need glibc 2.34 or newer; this is ${libc:-another C library}: take Debian 12, Ubuntu 22.04, Fedora 35 or newer"
    case $1 in
        serve-cpu)
            # No ldconfig: no way to ask.
            libraries=$(PATH=$PATH:/usr/sbin:/sbin ldconfig -p 2> /dev/null; ls ${libraries//:/ } 2> /dev/null) || true
            [[ -z $libraries || $libraries == *libnuma.so.1* ]] ||
                fail "vLLM on CPU needs libnuma: $(packages libnuma1 numactl-libs)"
            ;;
        serve-cuda)
            # Triton compiles the launcher of each kernel on this host.
            "${CC:-$(type -P gcc || echo clang)}" -E - <<< '#include <stdlib.h>' > /dev/null 2>&1 ||
                fail "vLLM on CUDA needs a C compiler with its headers: $(packages "gcc libc6-dev" gcc)"
            ;;
    esac
}

# Sets UV: that of PATH from 0.8 on, else the pinned one in .venv/uv, which any Python from 3.9 can install.
use_uv() {
    local lock=nix/lock/uv.txt own=.venv/uv/bin/uv python
    UV=$(type -P uv) || true
    [[ $UV && $("$UV" --version) =~ ^uv\ ([0-9]+)\.([0-9]+) ]] && ((BASH_REMATCH[1] > 0 || BASH_REMATCH[2] >= 8)) || UV=$PWD/$own
    mkdir -p .venv
    exec 8> .venv/uv.lock # make -j
    flock 8
    if [[ $UV == "$PWD/$own" ]] && ! cmp -s $lock .venv/uv/lock.txt; then
        for python in ${PYTHON:+"$PYTHON"} python3 python3.{9..20} ""; do
            # Debian leaves ensurepip out of a Python whose -venv package is missing.
            "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 9))' 2> /dev/null && break
        done
        [[ $python ]] || fail "uv is missing, and a Python from 3.9 with venv to install it: $(packages python3-venv python3)"
        echo "uv: installing the pinned one into .venv/uv"
        rm -rf .venv/uv
        "$python" -m venv .venv/uv
        .venv/uv/bin/python -m pip install -q --disable-pip-version-check --only-binary=:all: --require-hashes --no-deps -r $lock
        cp $lock .venv/uv/lock.txt
    fi
    exec 8>&-
    pip_settings
}

# Where pip is configured, uv takes the same way to the same places; its own variables, if set, come first.
extra_indexes=
pip_settings() {
    local python config links scheme
    export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-1} # pip trusts the system's, too
    for python in .venv/uv/bin/python ${PYTHON:+"$PYTHON"} python3 ""; do
        config=$("$python" -m pip config list 2> /dev/null) && break
    done
    [[ $config ]] || return 0
    links=$(setting find-links)
    [[ ${UV_INDEX-${UV_EXTRA_INDEX_URL-}} ]] || extra_indexes=$(setting extra-index-url)
    [[ -z $links ]] || export UV_FIND_LINKS=${UV_FIND_LINKS-${links// /,}}
    [[ -z $(setting index-url) ]] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX-${UV_INDEX_URL-$(setting index-url)}}
    [[ $(setting no-index) != [1tTyY]* ]] || export UV_NO_INDEX=${UV_NO_INDEX-1}
    [[ -z $(setting trusted-host) ]] || export UV_INSECURE_HOST=${UV_INSECURE_HOST-$(setting trusted-host)}
    [[ -z $(setting cert) ]] || export SSL_CERT_FILE=${SSL_CERT_FILE-$(setting cert)}
    if [[ $(setting proxy) ]]; then
        [[ $(setting proxy) == *://* ]] || scheme=http://
        export ALL_PROXY=${ALL_PROXY-${scheme:-}$(setting proxy)}
    fi
}

# setting KEY: its words, from $config, which is what `pip config list` prints: SECTION.KEY='WORDS'. pip's environment
# comes before its files, and the section of `pip install` before that of all commands.
setting() {
    local section line words
    for section in :env:. install. global.; do
        line=$(grep -m 1 -F "$section$1=" <<< "$config") || continue
        line=${line#*=}
        line=${line:1:-1}
        read -ra words <<< "${line//\\n/ }"
        echo "${words[*]}"
        return
    done
}

python_of() { sed -n '1s/.* CPython \([0-9.]*\) .*/\1/p' "$1"; } # of a lock, by its first line

# find_python VERSION [ENV]: sets `python`, which is $PYTHON, else one that uv finds here. Returns 1 if there is none.
# With OUTSIDE_HOME=1 those below a home folder do not count.
find_python() {
    local found
    if [[ ${PYTHON:-} ]]; then
        found=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit
        [[ $found == "$1" ]] || fail "the lock is for Python $1; $PYTHON is $found: name another, or leave PYTHON out"
        python=$PYTHON
        [[ -z ${OUTSIDE_HOME:-} ]] || ! at_home "$(base_of "$python")" ||
            fail "$(base_of "$python") is below a home folder, which units do not see: name another, or leave PYTHON out"
        return
    fi
    while read -r _ python _; do
        [[ -z ${OUTSIDE_HOME:-} ]] || ! at_home "$(base_of "$python")" || continue
        # Triton compiles against Python.h, which distributions put into a package of its own.
        [[ ${2:-} != serve-cuda ]] || "$python" -c '
import os, sysconfig
os.stat(os.path.join(sysconfig.get_path("include", "posix_prefix"), "Python.h"))' 2> /dev/null || continue
        return
    done < <("$UV" python list --only-installed "cpython@$1" 2> /dev/null)
    return 1
}

# bring_python VERSION [FOLDER]: sets `python`, which uv downloads, into FOLDER or where it keeps them.
bring_python() {
    [[ -z ${2:-} ]] || export UV_PYTHON_INSTALL_DIR=$2
    if ! python=$("$UV" python find --system --managed-python --no-python-downloads "$1" 2> /dev/null); then
        echo "Python $1 is not here: uv downloads it"
        "$UV" python install --no-bin "$1" ||
            fail "uv could not bring Python $1; its reason is above. Instead: $(packages "python$1" "python$1"), or make PYTHON=/path/to/python$1"
        python=$("$UV" python find --system --managed-python --no-python-downloads "$1")
    fi
}

base_of() { "$1" -c 'import sys; print(sys.base_prefix)'; }

at_home() { [[ $1/ == /home/* || $1/ == /root/* ]]; } # which units do not see

# create VENV LOCK: a venv with the wheels of the lock.
create() {
    local env
    env=$(basename "$2" .txt)
    find_python "$(python_of "$2")" "$env" || bring_python "$(python_of "$2")"
    rm -rf "$1"
    "$UV" venv --quiet --no-project --python "$python" "$1"
    add "$1" "$2"
}

# add VENV LOCK [OPTION ...]: the wheels of the lock. What has no wheel (.tar.gz) comes second: the lock's own setuptools builds it,
# so that nothing is fetched but what the lock names.
add() {
    local each way
    local options=(--compile-bytecode --python "$1" "${@:3}")
    # Builds for CPU come from where this host is configured to look, else from PyTorch's own index, to which uv knows
    # the way. Extra indexes only if they are needed: of a version that several have, uv takes the first one's file,
    # which may be for another Python and so not the lock's.
    for each in "" extra torch extra+torch; do
        [[ $each != *extra* || $extra_indexes ]] || continue
        [[ $each != *torch* ]] || grep -q '^torch==[^ ]*+cpu ' "$2" || continue
        way=$each
        uv_install "$way" --quiet --dry-run --only-binary :all: "${options[@]}" -r <(wheels "$2") 2> /dev/null && break
    done
    uv_install "$way" --only-binary :all: "${options[@]}" -r <(wheels "$2")
    if grep -q '\.tar\.gz$' "$2"; then
        uv_install "" --no-build-isolation --no-binary :all: "${options[@]}" -r <(grep '\.tar\.gz$' "$2")
    fi
}

# add_compressor VENV: llm-compressor, in a folder of its own, which yaptext/quantize/compressor.py puts first.
add_compressor() {
    local lock=nix/lock/llmcompressor.txt folder=$1/llmcompressor
    if ! cmp -s $lock "$folder/lock.txt"; then
        echo "llmcompressor: adding $(grep -c == $lock) wheels: 15 MB to download, 150 MB installed, seconds"
        rm -rf "$folder"
        add "$1" $lock --target "$folder"
        rm -rf "$folder/bin" # scripts that would run without their folder
        cp $lock "$folder/lock.txt"
    fi
}

wheels() { grep -v '\.tar\.gz$' "$1"; }

# uv_install WAY OPTION ...: prints all of uv's output but the list of packages. uv's --compile-bytecode takes less time
# than compileall.
uv_install() {
    (
        case $1 in *extra*) export UV_INDEX=$extra_indexes UV_INDEX_STRATEGY=${UV_INDEX_STRATEGY:-unsafe-best-match} ;; esac
        case $1 in *torch) export UV_TORCH_BACKEND=${UV_TORCH_BACKEND:-cpu} ;; esac
        "$UV" pip install --require-hashes --no-deps "${@:2}" 2>&1
    ) | sed -u '/^ [+~-] /d; /^ Downloaded /d; /^Using Python /d; s/^/  /' >&2
}

# project VENV [--editable]: this checkout, built by the locked backend: no network. No cache, since uv would look at
# pyproject.toml alone to see a change.
project() {
    "$UV" pip install --quiet --compile-bytecode --no-cache --link-mode copy --no-index --no-deps --no-build-isolation \
        --python "$1" "${@:2}" .
}
