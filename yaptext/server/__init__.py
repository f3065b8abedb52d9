"""Sockets, keys and slots: where a frame enters and leaves."""
