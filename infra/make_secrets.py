"""Make the secrets that compose.yaml mounts: `python infra/make_secrets.py [FOLDER]`. One file a
secret, random, readable by its owner; what is there stays. Standard library only."""

import json
import os
import secrets
import sys
from pathlib import Path

ACCESS_KEY = "evaclip"
RANDOM = (
    *("POSTGRES_PASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
    "AWS_SECRET_ACCESS_KEY",
)


def main(folder):
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = {name: write(folder / name, secrets.token_urlsafe(32)) for name in RANDOM}
    write(folder / "PREFECT_API_AUTH_STRING", f"admin:{secrets.token_urlsafe(32)}")
    key = {"accessKey": ACCESS_KEY, "secretKey": made["AWS_SECRET_ACCESS_KEY"]}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "evaclip", "credentials": [key], "actions": actions}
    write(folder / "s3.json", json.dumps({"identities": [identity]}, indent=1))
    sys.stdout.write(f"secrets are in {folder}\n")


def write(path, value):
    """Write a secret that is not there yet; returns what is there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text()
    with os.fdopen(descriptor, "w") as file:
        file.write(value)
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "secrets")
