"""Shell patterns over a source's paths, with the meaning that the Hub's own client and Truss give them.

`*` crosses slashes, as in `huggingface_hub.utils.filter_repo_objects`. Which files a pipeline needs is the plan's;
this module only says which of them a person has put out of sight, and by which pattern.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]  # not in its __all__

from diffusion.recipe import Source
from preparation.errors import UsageError


@dataclass(frozen=True)
class Patterns:
    """What may be taken (`allow`; everything where it is empty), and what of that may not (`ignore`)."""

    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.allow or self.ignore)

    def narrow(self, files: Mapping[str, int]) -> dict[str, int]:
        """The files that are left to choose from."""
        left = filter_repo_objects(
            files, allow_patterns=list(self.allow) or None, ignore_patterns=list(self.ignore)
        )
        return {path: files[path] for path in left}

    def check(self, needed: Iterable[str], where: str) -> None:
        """Raises UsageError, naming the pattern, when one of `needed` is out of sight."""
        for path in needed:
            if self.narrow({path: 0}):
                continue
            pattern = next(
                (one for one in self.ignore if not Patterns(ignore=(one,)).narrow({path: 0})), None
            )
            if pattern is not None:
                raise UsageError(
                    f"--ignore {pattern!r} hides {path} of {where}, which the pipeline needs. "
                    "Narrow the pattern, or leave it out."
                )
            raise UsageError(
                f"No --allow pattern matches {path} of {where}, which the pipeline needs (given: "
                f"{', '.join(map(repr, self.allow))}). Add one that does, such as --allow {path!r}."
            )

    def recorded(self, source: Source | None) -> Source | None:
        """`source`, saying that only a part of it was taken."""
        if not self:
            return source
        return (source or Source()).model_copy(
            update={"allow": self.allow or None, "ignore": self.ignore or None}
        )


EVERYTHING = Patterns()
