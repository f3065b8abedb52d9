"""The documents of the interfaces: `/openapi.json` for programs, `/docs` for people."""
