"""Slow, obvious versions of things: each is the specification that the real code must equal."""
