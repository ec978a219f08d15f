"""Objects that were found, against those that people annotated: by a fine-tuned head (`detect`), by features
alone (`discovery`), by anything else (`check`).

What an encoder lights up without any cut is for `localisation`.
"""
