"""What stays the same when an image or object is seen again in another view; how features fill their space.

No labels are needed here.
"""
