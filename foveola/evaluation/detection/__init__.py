"""Detection: objects that the head of a fine-tuned encoder finds, against those that people drew (`detect`).

What an encoder lights up without a head is for `localisation`.
"""
