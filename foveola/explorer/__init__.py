"""A local page on which a person looks at a data set through one or two encoders: `foveola explore`.

Nothing is encoded, searched or drawn in a way of its own: that is `embedding`, `figures` and `drawing`.
Nothing is written but the features and maps that are kept, and the page asks no other machine for anything.
"""
