"""What frozen patches say about label maps: nearest patches, logistic and linear heads, dense retrieval.

Whole images with one label are for `classification`.
"""
