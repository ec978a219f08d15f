"""Frozen evaluation: what an encoder knows, measured without changing it. One protocol a file."""
