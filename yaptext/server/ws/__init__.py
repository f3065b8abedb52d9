"""The /ws dialect: its door, its sockets and what waits to be sent."""
