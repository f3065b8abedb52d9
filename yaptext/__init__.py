"""Yap Text: real-time text inference for voice companions. `__version__` names the commit, too: see `yaptext.build`."""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from yaptext.build import build  # only now: engine processes need no version, and finding it may run git

    return build().version
