"""OpenAI's HTTP dialect: what any client of that API sends, on the turns of the service."""
