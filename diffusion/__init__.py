"""Memory to images: recipes, the pipeline built from streamed tensors, and the engine that runs it.

Knows torch and diffusers; leaves buckets to `weights/`, files and URLs to `images/`, and HTTP to the doors.
Importing this package, `recipe`, `request` or `sizes` is cheap: torch arrives with `build`, `device` and `engine`.
"""

import os

# Both libraries warn about packages this product does without (torchvision) and about prompts the engine itself
# reports on. They read these once, when first imported; whoever wants to hear more sets them.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
