"""The event that tells others of a promotion, so that an automation can act on it
(infra/automations.yaml). Not here: promoting (tasks/register/promotion.py)."""

import os

EVENT = "evaclip.model.promoted"


def announce_promotion(name: str, version: int, before: int | None, alias: str) -> None:
    """Send the event, which is on its way when the process ends; `before` had the alias so far."""
    from prefect.events import emit_event  # a command without a server has no need of it

    emit_event(
        event=EVENT,
        resource={
            "prefect.resource.id": f"evaclip.model.{name}",
            "prefect.resource.name": name,
            "evaclip.version": str(version),
        },
        payload={"name": name, "version": version, "before": before, "alias": alias},
    )


def announce_where_served(name: str, version: int, before: int | None, alias: str) -> None:
    """Send it from a command: only where PREFECT_API_URL names a server that could listen."""
    if os.environ.get("PREFECT_API_URL"):
        announce_promotion(name, version, before, alias)
