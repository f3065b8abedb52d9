"""Making AWQ checkpoints: calibrate, quantize, verify, keep, push. The server needs nothing of it."""
