"""Manifests of anyone: what their fields mean, what goes wrong with them (lint), and where pods would run (preview)."""
