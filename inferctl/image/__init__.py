"""Spec to image: a Dockerfile from locks, a build, a check against fp32 before the tag, a push."""
