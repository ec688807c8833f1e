"""The parts of benchmarks/engine.py: who makes images, in a process each, what is measured of them, and the report."""
