"""`foveola report`: what a run learned and whether it helped, on one page.

A run folder is read without the training code. What is measured comes from `evaluation`, what is drawn of
images from `figures`.
"""
