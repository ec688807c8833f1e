"""A runner of a few lines, for test_cog_server.py: says what it sees, fails when told."""

from __future__ import annotations

import os

from cog import BaseRunner, Input


class Runner(BaseRunner):
    def setup(self) -> None:
        print("setup sees " + ",".join(sorted(os.environ)))
        if os.environ.get("SETUP") == "fails":
            raise RuntimeError("the bucket refused: try another key")
        if os.environ.get("SETUP") == "never ends":
            while True:
                pass

    async def run(self, prompt: str = Input(default="")) -> list[str]:
        print(f"running {prompt}")
        if prompt == "fail":
            raise RuntimeError("no such luck")
        return [prompt.upper()]
