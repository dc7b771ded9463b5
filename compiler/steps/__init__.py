"""The compression steps of a recipe: each proposes a changed model and does not judge it.

A kind of step is one class in `options` (what a recipe may say), one file here with a function
``propose`` (what is done about it), and one line in `registry`.
"""
