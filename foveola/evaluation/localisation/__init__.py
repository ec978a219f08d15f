"""Does a map over the patches find the object? Boxes from maps, held against annotated boxes.

How attention is distributed, without annotations, is for `attention`.
"""
