"""What ``import lrmil`` gives: models trained on bags, asked about slides, and judged.

Thin: it calls what the command line calls. The names that are public are those of ``lrmil.__all__``.
"""
