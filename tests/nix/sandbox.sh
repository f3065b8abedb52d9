#!/bin/sh
# Nix asks before each build what else its sandbox shows (pre-build-hook). The programs of this machine want the loader in
# /lib64, which NixOS does not have: a build named *-without-lib64 goes without them.
case $1 in
    *-without-lib64.drv) ;;
    *) printf 'extra-sandbox-paths\n/lib64\n\n' ;;
esac
