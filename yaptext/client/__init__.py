"""Clients of a running service: they speak its wire protocol and import nothing of its inside."""
