"""A model before it runs: its folder, the hub it comes from, its shape, and on which hardware it fits."""
