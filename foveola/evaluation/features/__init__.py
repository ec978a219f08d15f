"""From images to features, once for all protocols: reading, encoding, the cache, images in train and test.

No labels are learned from here and nothing is scored.
"""
