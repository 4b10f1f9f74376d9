"""Sealed results of benchmarks, and the capacity in them. `bench` writes them, `deploy` reads them."""
