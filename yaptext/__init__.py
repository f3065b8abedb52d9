"""Yap Text: real-time text inference for voice companions."""

__version__ = "0.1.0"
