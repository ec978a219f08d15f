"""Statistics of attention in every block and head: who reads what, how widely, how far.

Nothing is trained here; boxes from attention are for `localisation`.
"""
