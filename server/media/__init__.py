"""The clips of a request: loaded from wherever they are, and those that were uploaded."""
