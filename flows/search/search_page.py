"""The search page of `make up`, on loopback, for whoever knows its secret: samples by text, picture
or likeness, and a takedown of those that are ticked.

No scripts; of strangers' only escaped text, and pictures decoded within limits and encoded anew.
"""

import base64
import hmac
import os
import secrets
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import Depends, FastAPI, Form, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, PlainTextResponse, RedirectResponse
from pydantic import BaseModel, Field

from evaclip_model.errors import InputError, escape_control
from evaclip_model.files import write_atomically
from evaclip_model.reading.image_decoder import UnreadableImageError
from flows.audit.sample_search import FoundSample, SampleSearch
from flows.audit.sample_trace import describe_replacement, take_down
from flows.config.profile import Profile, load_profile
from tasks.dataset.lists import is_url, read_takedowns, takedowns_digest
from tasks.embed.search import Wanted
from tasks.evaluate.report.examples import make_thumbnail

MAX_UPLOAD_BYTES = 1 << 25
THUMBNAIL_PX, PICTURE_PX = 200, 224  # of a sample; of what is looked for, in addresses
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",  # a stricter one would hide the origin of our own forms
    "X-Content-Type-Options": "nosniff",
}
PAGES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)


class PageQuery(BaseModel):
    """The parameters of a search; the first of text, like and picture that is given counts."""

    text: str = Field("", max_length=2000)
    like: str = Field("", max_length=500)
    picture: str = Field("", pattern=r"^([\w+/]{4})*([\w+/]{2}==|[\w+/]{3}=)?$")
    source: str = ""
    min_score: float = -1.0
    max_score: float = 1.0
    count: int = Field(24, ge=1, le=100)

    def find_samples(self, search: SampleSearch) -> list[FoundSample]:
        if not (self.text or self.like or self.picture):
            return []
        query = search.feature_of(self.text, self.like, base64.b64decode(self.picture))
        wanted = Wanted(self.count, self.source, self.min_score, self.max_score)
        return search.find_samples(query, wanted)


def make_app(profile: Profile, secret: str, port: int) -> FastAPI:
    """The page, served as 127.0.0.1:`port` to whoever gives `secret`, USER:PASSWORD."""
    app, token, working = FastAPI(openapi_url=None), secrets.token_urlsafe(), threading.Lock()
    root = profile.root.resolve()
    search_among = lru_cache(1)(lambda features_and_indexes: SampleSearch(profile))

    def render(status: int = 200, **parts: Any) -> Response:
        page = PAGES.get_template("page.html.j2").render(token=token, parts=parts)
        return HTMLResponse(escape_control(page), status)

    def require_token(given: Annotated[str, Form(alias="token")] = "") -> None:
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise InputError("this form is of an earlier start of `make up`: load its page again")

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        answer = refuse_request(request, secret, port) or await go_on(request)
        answer.headers.update(HEADERS)
        return answer

    @app.exception_handler(InputError)
    @app.exception_handler(RequestValidationError)
    def explain(_: Request, error: Exception) -> Response:
        if isinstance(error, RequestValidationError):
            error = InputError(f"{error.errors()[0]['loc'][-1]}: {error.errors()[0]['msg']}")
        return render(400, problem=str(error))

    @app.get("/health")
    def say_health() -> Response:
        return PlainTextResponse("OK")

    @app.get("/open")
    def leave_password() -> Response:
        return RedirectResponse("/")

    @app.get("/")
    def show_samples(asked: Annotated[PageQuery, Query()], request: Request) -> Response:
        if not is_own(request):
            return render(link=f"/?{request.url.query}")
        with working:
            both = ("embed", "search")
            search = search_among(tuple(p for one in both for p in root.glob(f"{one}/*/*.json")))
            found = asked.find_samples(search)
            shown = [(one, draw_sample(one), is_url(one.row["url"] or "")) for one in found]
        return render(search=search, asked=asked, found=shown)

    @app.post("/", dependencies=[Depends(require_token)])
    def show_like_picture(file: UploadFile, request: Request) -> Response:
        try:
            uri = make_thumbnail(file.file.read(), PICTURE_PX)
        except UnreadableImageError as error:
            raise InputError(f"the picture cannot be read: {error}") from None
        return show_samples(PageQuery(picture=uri.partition(",")[2]), request)

    @app.post("/takedown", dependencies=[Depends(require_token)])
    def plan_takedown(uid: Annotated[list[str], Form(min_length=1)]) -> Response:
        listed = root / "takedowns" / f"{takedowns_digest(uid)}.txt"
        listed.parent.mkdir(exist_ok=True)
        write_atomically(listed, "".join(f"{one}\n" for one in sorted({*uid})))
        if {*read_takedowns([listed])} != {*uid}:  # a stranger's uid of two lines, say
            listed.unlink()
            raise InputError("a list cannot name one of these uids: take it down by URL or hash")
        with working:
            return render(listed=listed, planned=take_down(listed, root, is_dry=True))

    @app.post("/takedown/confirmed", dependencies=[Depends(require_token)])
    def confirm_takedown(digest: Annotated[str, Form(pattern="^[0-9a-f]{16}$")]) -> Response:
        listed = root / "takedowns" / f"{digest}.txt"
        with working:
            done = take_down(listed, root)
        lines = [line for one in done for line in describe_replacement(one, root)]
        return render(listed=listed, lines=lines)

    return app


def refuse_request(request: Request, secret: str, port: int) -> Response | None:
    """The refusal of what is not a person's with the secret, from our pages or by a link to one."""
    headers, said = request.headers, request.headers.get("authorization", "")
    host, length = headers.get("host", ""), headers.get("content-length", "")
    if host not in (f"127.0.0.1:{port}", f"localhost:{port}"):
        return PlainTextResponse("the search answers under its own address alone", 421)
    is_link = request.method == "GET" and headers.get("sec-fetch-dest") == "document"
    is_here = headers.get("origin", f"http://{host}") == f"http://{host}"
    if not is_here or not (is_own(request) or is_link):
        return PlainTextResponse("the search answers its own pages alone", 403)
    known = "Basic " + base64.b64encode(secret.encode()).decode()
    if request.url.path != "/health" and not hmac.compare_digest(said.encode(), known.encode()):
        refused = "the search asks for the secret: open the link that `make up` prints"
        return PlainTextResponse(refused, 401, {"WWW-Authenticate": 'Basic realm="search"'})
    if request.method == "POST" and not (length.isdigit() and int(length) <= MAX_UPLOAD_BYTES):
        return PlainTextResponse(f"more than {MAX_UPLOAD_BYTES >> 20} MiB", 413)
    return None


def is_own(request: Request) -> bool:
    return request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")


def draw_sample(found: FoundSample) -> str:
    with suppress(UnreadableImageError):
        return make_thumbnail(bytes(found.pair.image), THUMBNAIL_PX) if found.pair else ""
    return ""


def main() -> None:
    import torch
    import uvicorn

    torch.set_num_threads(1)  # as when features are made
    port, secret = int(sys.argv[1]), os.environ["PREFECT_API_AUTH_STRING"]
    os.chdir(os.environ["EVACLIP_WORKING_DIR"])
    app = make_app(load_profile(), secret, port)
    uvicorn.run(app, host="127.0.0.1", port=port, limit_concurrency=32, access_log=False)


if __name__ == "__main__":
    main()
