"""LIBERO-10's "put both ... in the basket" tasks: a world, a scripted expert with subtasks, recordings, evaluation.

Needs the extra `libero`; what needs no simulator (tasks, labels, the expert's rule) can be imported without it.
"""
