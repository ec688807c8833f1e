"""How an image was made, as the text its file carries: enough to make the same image again.

It knows which facts that takes and how each is written; encode.py knows where a file keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from images.errors import ImagesError


@dataclass(frozen=True)
class Provenance:
    """One image's origin: sent to the same `version` of `model`, these values give the same image alone.

    `seed` is this image's own (the request's plus its index), `width` and `height` are in pixels, `steps` and
    `guidance_scale` are those that were used, not those that were asked for. Files from before there was
    `prompt_weighting` do not mention it, and neither do those that were made without.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    width: int
    height: int
    model: str
    version: str
    prompt_weighting: bool = False

    def as_text(self) -> dict[str, str]:
        """The entries for `encode`, in the order a person wants to read them; empty ones are left out."""
        entries = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "prompt_weighting": "true" if self.prompt_weighting else "",
            "seed": str(self.seed),
            "steps": str(self.steps),
            "guidance_scale": str(self.guidance_scale),
            "size": f"{self.width}x{self.height}",
            "model": self.model,
            "version": self.version,
        }
        return {name: value for name, value in entries.items() if value}

    @classmethod
    def from_text(cls, entries: Mapping[str, str]) -> Provenance:
        """Read back what `as_text` wrote. Raises ImagesError naming the entry that is missing or malformed."""
        try:
            width, height = entries["size"].split("x")
            return cls(
                prompt=entries.get("prompt", ""),
                negative_prompt=entries.get("negative_prompt", ""),
                seed=int(entries["seed"]),
                steps=int(entries["steps"]),
                guidance_scale=float(entries["guidance_scale"]),
                width=int(width),
                height=int(height),
                model=entries.get("model", ""),
                version=entries.get("version", ""),
                prompt_weighting=_switch(entries.get("prompt_weighting", "")),
            )
        except (KeyError, ValueError) as error:
            raise ImagesError(
                f"this image does not say how it was made ({type(error).__name__}: {error}): "
                "was it generated here, and is it the original file?"
            ) from error


def _switch(text: str) -> bool:
    if text not in ("", "true"):
        raise ValueError(f"prompt_weighting is {text!r}, not 'true'")
    return bool(text)
