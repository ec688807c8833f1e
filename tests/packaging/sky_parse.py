"""Run by .venv-sky's Python, where this project's own packages are absent: parses task files with
SkyPilot's parser, as `sky serve up` does, and prints what it understood as a JSON list.

    sky_parse.py [NAME=SECRET ...] TASK.yaml ...
"""

import json
import sys
from pathlib import Path
from typing import Any

import sky
import yaml
from sky.data import storage_utils


def parse(task_file: str, secrets: list[tuple[str, ...]]) -> dict[str, Any]:
    config = yaml.safe_load(Path(task_file).read_text(encoding="utf-8"))
    task = sky.Task.from_yaml_config(config, secrets_overrides=secrets)
    task.validate_run()
    return {
        "images": [resources.image_id for resources in task.resources],
        "ports": sorted({port for resources in task.resources for port in resources.ports}),
        "envs": task.envs,
        "secrets": sorted(task.secrets),
        "workdir": task.workdir,
        "readiness_path": task.service.readiness_path,
        "excluded": storage_utils.get_excluded_files(task.workdir),
    }


arguments = sys.argv[1:]
given = [tuple(argument.split("=", 1)) for argument in arguments if "=" in argument]
print(json.dumps([parse(file, given) for file in arguments if "=" not in file]))
