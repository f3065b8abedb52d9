"""`yap-text bench`: the load generator of `yaptext.bench` as a command."""

from __future__ import annotations

import argparse

from yaptext.bench.options import add_options, check_packages
from yaptext.commands import client_options


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser("bench", help="measure a running service, and another server beside it if one is named")
    add_options(bench)
    bench.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    check_packages(parsed)
    from yaptext.bench.command import bench

    return bench(parsed, *client_options.address(parsed))
