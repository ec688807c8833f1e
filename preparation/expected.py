"""The stages that a plan has before it, as far as listings tell: what the progress display shows as still to come."""

from __future__ import annotations

from preparation.assemble import is_rewritten
from preparation.plan import Plan
from preparation.stages import Upcoming


def stages_to_come(plan: Plan) -> tuple[Upcoming, ...]:
    """From download to upload, in bytes. What is converted may grow or shrink, and what the bucket holds already is
    known only once all is hashed: those sizes are bounds, or missing."""
    fetched = plan.fetched()
    missing = sum(origin.files[path] for origin, paths in fetched for path in origin.missing(paths))
    arrived = sum(
        origin.files[path] for origin, paths in fetched if not origin.is_local for path in paths
    )
    rewritten = sum(
        sum(component.sizes) for component in plan.components if is_rewritten(component, plan)
    )
    published = (
        sum(len(data) for data in plan.texts.values())
        + sum(copy.origin.files[copy.path] for copy in plan.copies)
        + sum(sum(component.sizes) for component in plan.components)
    )
    grows = any(component.dtype == "F32" for component in plan.components)
    size = None if grows else published
    return (
        Upcoming("Download", missing),
        Upcoming("Check", arrived),
        Upcoming("Convert", rewritten, at_most=True),
        Upcoming("Hash", size, at_most=rewritten > 0),
        Upcoming("Upload", size, at_most=True),
    )
