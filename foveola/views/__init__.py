"""From canvases to the views of a step: boxes, colours, object masks, which patches are hidden or dropped.

Nothing here reads a file or knows a network.
"""
