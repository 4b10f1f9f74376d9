"""Which sequences run together, how long that takes, and whose turn it is. `serve` and `estimate` run the same code."""
