"""Any source to a publishable model folder: what lies where, which files are needed, and making them fit.

This room knows the Hub and diffusers' folder layout. It refuses to know how a model is served, and leaves bytes in
the bucket to the weights room and recipes to the diffusion room.
"""

from preparation.errors import PreparationError, UsageError
from preparation.expected import stages_to_come
from preparation.lora import LoraName
from preparation.options import DTYPES, Options, parse_size
from preparation.prepare import (
    DEFAULT_FOLDER,
    DEFAULT_JOBS,
    EXPECTED_ERRORS,
    Request,
    alone,
    check_bucket,
    compare,
    delete_old,
    exit_code,
    find_already_prepared,
    make_plan,
    needs_no_network,
    prepare,
    upload,
)
from preparation.progress import Progress, end_interrupted

__all__ = [
    "DEFAULT_FOLDER",
    "DEFAULT_JOBS",
    "DTYPES",
    "EXPECTED_ERRORS",
    "LoraName",
    "Options",
    "PreparationError",
    "Progress",
    "Request",
    "UsageError",
    "alone",
    "check_bucket",
    "compare",
    "delete_old",
    "end_interrupted",
    "exit_code",
    "find_already_prepared",
    "make_plan",
    "needs_no_network",
    "parse_size",
    "prepare",
    "stages_to_come",
    "upload",
]
