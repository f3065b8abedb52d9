"""`yap-text doctor`: what is wrong with this machine. One module a group of checks; command.py runs them."""
