"""The parts of benchmarks/weights.py: a model in a folder, nginx in front of it, and everyone who can read it.

Every measurement is a fresh process (`run_one`), so that nobody inherits anybody's warm memory.
"""
