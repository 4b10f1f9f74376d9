"""inferctl: build, serve and benchmark model containers."""

__version__ = "0.1.0"
