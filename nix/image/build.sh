#!/usr/bin/env bash
# An OCI image archive of the lock and Debian's packages, without Nix and without another image below it:
# dist/yap-text-ENV.oci.tar. Needs root, mmdebstrap, zstd, and the Python of the lock with venv (PYTHON names it).
#
#   ENV=serve-cpu|serve-cuda   IMAGE_USER=UID:GID   MIRROR=... (of Debian, an argument of mmdebstrap)
#
# Three layers: root, wheels, project. They are kept in build/image/ENV until this file or the lock changes, so that an
# edit of the project costs seconds; `rm -r build/image` takes newer packages of Debian. Every file is dated 1970, and the
# bytecode does not ask for dates: the same packages, lock and commit give the same bytes. How the machine reaches its
# registries (pip's configuration, apt's) is used outside the image only.
set -euo pipefail
cd "$(dirname "$0")/../.."
umask 022

env=${ENV:-serve-cpu}
lock=nix/lock/$env.txt
version=$(sed -n '1s/.*CPython \([0-9.]*\) .*/\1/p' "$lock")
python=${PYTHON:-python$version}
wheelhouse=.venv/wheelhouse # as tests/nix/rehearse.py
work=build/image/$env
root=$work/root
venv=/opt/yap-text

fail() {
    echo "image: $1" >&2
    exit 1
}
case $version in
    3.11) suite=bookworm ;;
    3.13) suite=trixie ;;
    *) fail "no Debian release with Python $version is known here" ;;
esac
[[ $EUID == 0 ]] || fail "mmdebstrap and chroot need root"
for program in mmdebstrap zstd "$python"; do
    command -v "$program" > /dev/null || fail "$program is not installed"
done
"$python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" || fail "the lock is for Python $version; name one: PYTHON="

packages=ca-certificates,libnuma1,libstdc++6,python$version,python$version-venv,tini
# Triton compiles C against Python's headers.
[[ $env != serve-cuda ]] || packages+=,gcc,libc6-dev,libpython$version-dev

step() { echo "image: $1 ($((SECONDS / 60)) min $((SECONDS % 60)) s)"; }

inside() {
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/build TMPDIR=/build LANG=C.UTF-8 PYTHONHASHSEED=0 chroot "$root" "$@"
}

# Some packages carry templates that are not Python: those fail, harmlessly.
compile() { inside "python$version" -W ignore -m compileall -f -qq -j 0 --invalidation-mode unchecked-hash "$@" || true; }

# layer NAME FOLDER [ARGUMENT OF tar]...
layer() {
    local blob=$work/$1.tar.zst folder=$2
    shift 2
    {
        tar --create --directory "$folder" --sort=name --mtime=@1 --numeric-owner --format=posix \
            --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime "$@" |
            tee /dev/fd/3 | zstd -q -f -T0 -3 -o "$blob"
    } 3>&1 | sha256sum | cut -d ' ' -f 1 > "$blob.diffid"
}

# What pip reaches from here, with the hashes of the lock; what it is installed from has no network.
fetch() {
    local line wheels=() archives=()
    while read -r line; do
        [[ $line != *==* || -e $wheelhouse/${line##*# } ]] || case $line in *.whl) wheels+=("$line") ;; *) archives+=("$line") ;; esac
    done < "$lock"
    ((${#wheels[@]} + ${#archives[@]})) || return 0
    mkdir -p "$wheelhouse"
    "$python" -m venv "$work/pip"
    download() {
        "$work/pip/bin/python" -m pip --disable-pip-version-check download --quiet --progress-bar=off --no-deps --require-hashes \
            --dest "$wheelhouse" "$@"
    }
    ((!${#wheels[@]})) || download --only-binary=:all: -r <(printf '%s\n' "${wheels[@]}")
    # pip asks a source archive for its name even if it only fetches it: hence setuptools.
    "$work/pip/bin/python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --find-links "$wheelhouse" setuptools
    ((!${#archives[@]})) || download --no-binary=:all: --no-build-isolation -r <(printf '%s\n' "${archives[@]}")
    rm -r "$work/pip"
}

make_root() {
    # With Debian's mirror, or MIRROR, whatever the machine has. Without the hook, a script in perl would merge /usr, and
    # all of perl would come along. No apt, no manuals, no file that runs as its owner.
    mmdebstrap --quiet --variant=essential --include="$packages" --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' "$suite" "$root" ${MIRROR:+"$MIRROR"} > "$work/mmdebstrap.log" 2>&1 ||
        { tail -n 20 "$work/mmdebstrap.log" >&2 && fail "mmdebstrap failed"; }
    rm -rf "$root"/etc/{apt,hostname,resolv.conf,machine-id} "$root"/var/lib/{apt,dpkg/*-old} "$root"/var/{cache,log}/* "$root"/dev/*
    find "$root" -xdev -type f -perm /6000 -exec chmod a-s {} +
    echo "yap-text:x:10001:0:Yap Text:/data/state:/usr/sbin/nologin" >> "$root/etc/passwd"
    install -d -m 775 -o 10001 -g 0 "$root/data"
    install -d -m 1777 "$root/dev/shm" # of compileall's processes
    mkdir "$root/build"
    compile /usr/lib/python3*
}

make_wheels() {
    local line
    inside "python$version" -m venv /build/pip
    inside "python$version" -m venv --without-pip $venv
    mkdir "$root/build/wheels"
    while read -r line; do
        [[ $line != *==* ]] || cp -al "$wheelhouse/${line##*# }" "$root/build/wheels/" 2> /dev/null || cp "$wheelhouse/${line##*# }" "$root/build/wheels/"
    done < "$lock"
    grep '\.whl$' "$lock" > "$root/build/wheels.txt"
    grep '\.tar\.gz$' "$lock" > "$root/build/archives.txt" || true
    pip --find-links /build/wheels --require-hashes -r /build/wheels.txt
    [[ ! -s $root/build/archives.txt ]] ||
        pip --find-links /build/wheels --require-hashes --no-build-isolation --use-pep517 -r /build/archives.txt
    rm -r "$root/build/wheels"
    cp "$lock" "$root$venv/built.txt" # for `yap-text doctor`, as make install leaves it
    compile $venv/lib
}

pip() {
    inside /build/pip/bin/python -m pip --isolated --disable-pip-version-check --python $venv/bin/python \
        install --quiet --no-index --no-deps --no-compile --no-cache-dir --no-warn-script-location "$@"
}

make_project() {
    rm -rf "$root"/build/{source,project}
    mkdir "$root/build/source"
    tar --create --exclude=__pycache__ pyproject.toml systemd yaptext | tar --extract --no-same-owner --directory "$root/build/source"
    [[ -z $commit ]] || echo "$commit" > "$root/build/source/yaptext/commit.txt"
    pip --no-build-isolation --root /build/project /build/source
    install -D -m 755 nix/image/healthy.py "$root/build/project/usr/local/bin/healthy"
    compile -s /build/project -p / /build/project
}

commit=$(git describe --always --dirty --abbrev=40 '--exclude=*' 2> /dev/null || true)
created=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || echo 0)}

key=$(cat "$lock" "$0" | sha256sum)
if [[ $(cat "$work/made.txt" 2> /dev/null) != "$key" ]]; then
    rm -rf "$work"
    mkdir -p "$work"
    fetch
    step "Debian $suite with $packages"
    make_root
    layer root "$root" --exclude=./build --exclude=./dev/shm .
    step "$(grep -c == "$lock") wheels"
    make_wheels
    layer wheels "$root" ."$venv"
    echo "$key" > "$work/made.txt"
fi
step "project"
make_project
layer project "$root/build/project" .
mkdir -p dist
"$python" nix/image/pack.py --commit="$commit" --created="$created" --user="${IMAGE_USER-}" "$env" "dist/yap-text-$env.oci.tar" \
    "$work"/{root,wheels,project}.tar.zst
step "dist/yap-text-$env.oci.tar, $(du -m --apparent-size "dist/yap-text-$env.oci.tar" | cut -f 1) MB"
