"""`inferctl gateway`: Envoy in front of several servers. inferctl writes its configuration and supervises it."""
