"""Who may use the MLflow server of `make up`: whoever knows its secret, from its own pages alone.

MLflow's basic-auth app asks `check_request` about every request (its setting
`authorization_function`). MLflow by itself takes changes from pages of any loopback port, and a
browser adds the password that it remembers to what such a page asks.
"""

import hmac
import os

from flask import Response, redirect, request

OPEN = "/open"
"""Where a link with the secret leads: scripts of the pages behind it cannot ask anything under an
address that holds a password."""


def check_request():
    """Return who asks, or the answer that refuses it."""
    own = os.environ["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    if request.headers.get("Origin", own[0]) not in own:
        return Response("MLflow answers its own pages alone", 403)
    given = request.authorization
    said = f"{given.username}:{given.password}" if given and given.type == "basic" else ""
    if not hmac.compare_digest(said.encode(), os.environ["PREFECT_API_AUTH_STRING"].encode()):
        refused = "MLflow asks for the secret: open the link that `make up` prints"
        return Response(refused, 401, {"WWW-Authenticate": 'Basic realm="mlflow"'})
    return redirect(f"http://{request.host}/") if request.path == OPEN else given
