#!/usr/bin/env bash
# The README's commands on a fresh Debian, as its reader runs them: the package line, `make serve` until it answers and
# holds a turn, the beginning of `make test`. Prints the minutes and the MB of each step. Needs root and mmdebstrap.
#
#   tests/hosts/fresh.sh bookworm             the tracked files of this working tree
#   tests/hosts/fresh.sh bookworm REVISION    those of a commit, for comparison (its packages: PACKAGES="make ...")
#
# How this host reaches its registries is for the caller to hand in, as an administrator would: HANDED names files and
# folders to copy; variables of pip, uv, proxies and certificates pass as they are. If the Pythons that uv downloads are out
# of reach, UV_PYTHON_DOWNLOADS_JSON_URL can name a list with one from nearby.
set -euo pipefail
cd "$(dirname "$0")/../.."

suite=$1 revision=${2:-}
cache=.venv/hosts root=$PWD/.venv/hosts/$suite
port=${PORT:-8321}
mkdir -p "$cache"

[[ -e $cache/$suite.tar ]] || mmdebstrap --quiet --variant=minbase --include=ca-certificates "$suite" "$cache/$suite.tar"
rm -rf --one-file-system "$root"
mkdir -p "$root/srv/yap-text"
tar -C "$root" -xf "$cache/$suite.tar"
if [[ $revision ]]; then git archive "$revision"; else git ls-files -z | tar -cf - --null --files-from=- --ignore-failed-read; fi |
    tar -C "$root/srv/yap-text" -xf -
for each in /etc/resolv.conf /etc/hosts ${HANDED:-}; do
    mkdir -p "$root${each%/*}"
    cp -aLT "$each" "$root$each"
done
passed=(HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive)
while IFS= read -r name; do passed+=("$name=${!name}"); done \
    < <(compgen -e | grep -E '^(PIP_.*|UV_.*|SSL_CERT_.*|(https?|all|no)_proxy|(HTTPS?|ALL|NO)_PROXY)$')

# What follows it runs as root of the new system, which shares this host's network. Its mounts and processes end with it.
within=(unshare --mount --pid --fork --kill-child bash -c '
    mount -t proc proc "$1/proc"
    mount --rbind --make-rslave /sys "$1/sys"
    mount --rbind --make-rslave /dev "$1/dev"
    exec chroot "$1" env -i --chdir=/srv/yap-text "${@:2}"
' - "$root" "${passed[@]}")

received() { awk '/:/ {sub(/.*:/, ""); sum += $1} END {printf "%d", sum / 1e6}' /proc/net/dev; } # by all this host, in MB
size() { du -smxc "$root" 2> /dev/null | awk 'END {print $1}'; }

# step NAME COMMAND: the last lines of what it printed, if it failed.
step() {
    local begun=$SECONDS had network
    had=$(size) network=$(received)
    "${within[@]}" bash -c "$2" > "$cache/$suite.log" 2>&1 || { tail -30 "$cache/$suite.log"; echo "$suite: $1 failed"; exit 1; }
    report "$1" $((SECONDS - begun)) $(($(size) - had)) $(($(received) - network))
}

report() { printf '%s: %-46s %2d min %2d s, disk +%d MB, received %d MB\n' "$suite" "$1" $(($2 / 60)) $(($2 % 60)) "$3" "$4"; }

packages=${PACKAGES:-$(sed -n 's/^sudo apt-get install \([^#]*\).*/\1/p' README.md)}
"${within[@]}" apt-get -qq update > /dev/null
step "apt-get install $packages" "apt-get install -y $packages"
step "make venv" "make venv ENV=serve-cpu"

# make serve
begun=$SECONDS had=$(size) network=$(received)
"${within[@]}" make serve ENV=serve-cpu PORT="$port" > "$cache/$suite.serve.log" 2>&1 &
service=$!
trap 'kill -KILL $service 2> /dev/null || true' EXIT # unshare passes no other signal on
until curl -fso /dev/null --noproxy '*' "http://127.0.0.1:$port/readyz"; do
    kill -0 $service 2> /dev/null || { tail -30 "$cache/$suite.serve.log"; echo "$suite: make serve ended"; exit 1; }
    sleep 0.5
done
report "make serve, until it answers" $((SECONDS - begun)) $(($(size) - had)) $(($(received) - network))
step "a turn" "PORT=$port .venv/serve-cpu/bin/yap-text warmup 'What is the capital of France?'"
tail -1 "$cache/$suite.log"
kill "$(pgrep -P "$(pgrep -P $service)")" # below unshare and make
wait $service || true

step "make test, its set-up and ${TESTS:=tests/test_settings.py tests/test_version.py}" "make test ARGS='-q --no-cov $TESTS'"
grep -E '(passed|failed)' "$cache/$suite.log"
du -smx "$root"/srv/yap-text/.venv/* "$root/root/.cache"/* 2> /dev/null | sed "s|$root||"
