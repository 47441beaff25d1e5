"""What ``import wsi_pipe as wp`` gives: slides, tissue, grids, features, bags, jobs and data sets.

Thin: every object stands on the modules that the command line uses, and gives what it gives. The names that are public
are those of ``wsi_pipe.__all__``, which imports them from here when they are first asked for.
"""
