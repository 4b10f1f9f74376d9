"""The same for every task, in front of it: connections, limits, keys, errors, drain, usage events. Knows no model."""
