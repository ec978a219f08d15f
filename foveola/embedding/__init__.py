"""Features of images, objects and patches in a file, to take away, and search in them.

Nothing here reads or encodes in a way of its own: that is `evaluation.features`. Nothing is scored.
"""
