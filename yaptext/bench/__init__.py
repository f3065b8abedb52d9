"""`yap-text bench`: a load generator over real sockets, for this service and for OpenAI-compatible servers.

The way of a measurement: `options` say what to do (a `Plan`), `campaign` goes through it run by run, a scenario in
`scenarios` makes users talk over a `conversation` (`service` or `openai`), each `Turn` notes when what arrived,
`figures` makes percentiles of that, and `text`, `report` and `compare` show them.
"""
