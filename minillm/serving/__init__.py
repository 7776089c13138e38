"""Decoding as fast as the machine reads weights."""
