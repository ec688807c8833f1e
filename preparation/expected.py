"""The stages that a plan has before it, as far as listings tell: what the progress display shows as still to come."""

from __future__ import annotations

from preparation.assemble import is_rewritten
from preparation.overflow import VAE
from preparation.plan import Component, Plan
from preparation.stages import Upcoming


def stages_to_come(plan: Plan) -> tuple[Upcoming, ...]:
    """From download to upload, in bytes. What is converted may grow or shrink, and what the bucket holds already is
    known only once all is hashed: those sizes are bounds, or missing."""
    fetched = plan.fetched()
    missing = sum(origin.files[path] for origin, paths in fetched for path in origin.missing(paths))
    arrived = sum(
        origin.files[path] for origin, paths in fetched if not origin.is_local for path in paths
    )
    unpacked = sum(component.inside or 0 for component in plan.components)
    rewritten = sum(
        sum(component.sizes) for component in plan.components if _is_converted(component, plan)
    )
    published = (
        sum(len(data) for data in plan.texts.values())
        + sum(copy.origin.files[copy.path] for copy in plan.copies)
        + sum(sum(component.sizes) for component in plan.components)
    )
    vae = sum(sum(component.sizes) for component in plan.components if component.name == VAE)
    # What is unpacked keeps its precision, but for 8 bits, which become 16.
    may_grow = unpacked > 0 or any(component.dtype == "F32" for component in plan.components)
    may_shrink = rewritten > 0

    def after(size: int) -> int | None:
        return None if may_grow else size

    return (
        Upcoming("Download", missing),
        Upcoming("Check", arrived),
        Upcoming("Unpack", unpacked),
        Upcoming("Convert", rewritten, at_most=True),
        Upcoming("Try VAE", after(vae), at_most=may_shrink),
        Upcoming("Hash", after(published), at_most=may_shrink),
        Upcoming("Upload", after(published), at_most=True),
    )


def _is_converted(component: Component, plan: Plan) -> bool:
    """Beyond being unpacked, which casts too unless LoRAs are merged in after it."""
    if component.inside is not None:
        return bool(plan.loras) and component.name != VAE
    return is_rewritten(component, plan)
