"""Where clients enter: sockets, keys, slots."""
