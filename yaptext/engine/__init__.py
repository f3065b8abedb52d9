"""Engines that turn token ids into text, behind one small protocol."""
