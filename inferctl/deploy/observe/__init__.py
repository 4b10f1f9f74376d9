"""Alerts and dashboards of a model: templates in YAML, whose `<names>` `watched.py` fills in."""
