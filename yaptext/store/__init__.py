"""Where sessions are kept beyond the process."""
