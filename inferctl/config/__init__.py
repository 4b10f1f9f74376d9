"""What a user writes: the spec in `inferctl.yaml`, its deployment, and settings merged from flags and environment."""
