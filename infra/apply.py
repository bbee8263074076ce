"""Give a Prefect server what this project needs: work pools, deployments, automations.

Makes what is missing and brings the rest up to date, as often as one likes, on the server of
PREFECT_API_URL. EVACLIP_ALERT_WEBHOOK and EVACLIP_PROMOTED_WEBHOOK are addresses that automations
call (stored encrypted, shown nowhere; a private one is the operator's own to choose, and a
redirect from it is not followed); EVACLIP_WORKING_DIR is where relative paths start. A pool's
concurrency limit, a deployment's parameters and job variables, and a schedule are set when they are
made, and are the operator's from then on.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound

INFRA = Path(__file__).resolve().parent
LIMITS = {"cpu-io": 4, "gpu": 1}
"""Pool -> flow runs at once: downloads and merges beside each other, one run a machine's GPUs."""
WEBHOOKS = {"alert": "EVACLIP_ALERT_WEBHOOK", "promoted": "EVACLIP_PROMOTED_WEBHOOK"}


async def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", choices=["process", "kubernetes"], default="process")
    options = parser.parse_args(arguments)
    async with get_client() as client:
        for name, limit in LIMITS.items():
            await apply_pool(client, name, limit, options.pools)
        before = {one.name: one for one in await client.read_deployments()}
    # Its own process: Prefect's deploy is a command. It needs the pools.
    deploy = ["--no-prompt", "deploy", "--all", "--prefect-file", str(INFRA / "prefect.yaml")]
    deployed = subprocess.run([sys.executable, "-m", "prefect", *deploy], cwd=INFRA.parent)
    if deployed.returncode:
        return deployed.returncode
    blocks = {}
    for name, key in WEBHOOKS.items():
        if url := os.environ.get(key):
            blocks[name] = str(await make_webhook(key, url).save(name, overwrite=True))
    async with get_client() as client:
        for deployment in await client.read_deployments():
            if deployment.name in before:
                await keep_operators_choices(client, before[deployment.name], deployment)
        for wanted in yaml.safe_load((INFRA / "automations.yaml").read_text())["automations"]:
            await apply_automation(client, wanted, blocks)
    return 0


def make_webhook(key, url):
    if not url.startswith(("http://", "https://")):
        raise SystemExit(f"{key} must be an address that begins with http:// or https://")
    return Webhook(url=url, allow_private_urls=True)


async def apply_pool(client, name, limit, kind):
    template = json.loads((INFRA / "work-pools" / f"{kind}.json").read_text())
    folder = os.environ.get("EVACLIP_WORKING_DIR")
    if folder and kind == "process":  # or every run gets an empty folder, and paths lead nowhere
        template["variables"]["properties"]["working_dir"]["default"] = folder
    try:
        there = await client.read_work_pool(name)
    except ObjectNotFound:
        made = {"name": name, "type": kind, "concurrency_limit": limit}
        await client.create_work_pool(WorkPoolCreate(**made, base_job_template=template))
        return
    if there.type != kind:
        raise SystemExit(
            f"the work pool {name} is of type {there.type}, not {kind}: delete it by `prefect "
            f"work-pool delete {name}`, or apply with --pools {there.type}"
        )
    await client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))


async def keep_operators_choices(client, before, deployment):
    """Give a deployment back what a person set in the UI before `prefect deploy` overwrote it."""
    # Sent as JSON: a parameter that the flow does not know any more is the run's mistake to name.
    await client._client.patch(
        f"/deployments/{deployment.id}",
        json={"parameters": before.parameters, "job_variables": before.job_variables},
    )
    there = {schedule.slug or schedule.id: schedule for schedule in before.schedules}
    for schedule in deployment.schedules:
        if kept := there.get(schedule.slug or schedule.id):
            body = kept.model_dump(mode="json", include={"active", "schedule", "parameters"})
            url = f"/deployments/{deployment.id}/schedules/{schedule.id}"
            await client._client.patch(url, json=body)


async def apply_automation(client, wanted, blocks):
    """Make an automation or replace the one of that name; remove it when its webhook is not set."""
    there = await client.read_automations_by_name(wanted["name"])
    actions = [with_block(action, blocks) for action in wanted["actions"]]
    is_set = None not in actions
    for double in there[int(is_set) :]:
        await client.delete_automation(double.id)
    if not is_set:
        return
    automation = AutomationCore.model_validate({**wanted, "actions": actions})
    if not there:
        await client.create_automation(automation)
        return
    kept = there[0].model_dump(include=set(AutomationCore.model_fields))
    if AutomationCore.model_validate(kept) != automation:
        # An update forgets what the automation was counting, such as how long a run is Pending.
        await client.update_automation(there[0].id, automation)


def with_block(action, blocks):
    """An action with its webhook's id; None when that has no address."""
    if "block" not in action:
        return action
    rest = {key: value for key, value in action.items() if key != "block"}
    found = blocks.get(action["block"])
    return found and {**rest, "block_document_id": found}


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
