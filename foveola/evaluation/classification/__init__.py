"""What class tokens and patches say about the label of an image or object: k-NN and trained probes.

Label maps are for `segmentation`.
"""
