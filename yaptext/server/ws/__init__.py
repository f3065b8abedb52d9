"""The /ws dialect: its door, its sockets, what waits to be sent."""
