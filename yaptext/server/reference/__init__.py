"""What clients can rely on, for readers and for programs: `/openapi.json` and `/docs`."""
