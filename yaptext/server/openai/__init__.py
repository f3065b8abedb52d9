"""OpenAI's API, over HTTP and on a socket: its requests run as turns of the service."""
