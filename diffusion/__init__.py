"""Memory to images: recipes, the pipeline built from streamed tensors, and the engine that runs it.

Knows torch and diffusers; leaves buckets to `weights/`, files and URLs to `images/`, and HTTP to the doors.
Importing this package, `recipe` or `sizes` is cheap: torch arrives only with `build`, `device` and `engine`.
"""
