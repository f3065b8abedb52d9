"""A page to talk to the service in a browser."""
