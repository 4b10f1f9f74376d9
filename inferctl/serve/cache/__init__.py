"""The cache of vectors, between tokenization and the queue: only missing inputs are computed. Knows no HTTP."""
