"""What requests the server refuses before anything of them is stored."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

MAX_UPLOAD_REQUEST = 2**20  # bytes of a form with a file
MAX_REQUEST = 2**16  # bytes of any other request; Gradio keeps its inputs as long as the session
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")  # a server that is bound to one of these has no address of its own
PUBLIC_HOSTS = (".hf.space", ".gradio.live")  # endings: a Hugging Face Space and a share link
# Parts of Gradio that the page does not use: they write files, fetch addresses, or edit the page.
UNUSED = re.compile(
    r"(/gradio_api)?/(deep_link|proxy=|process_recording|vibe|undo-vibe|monitoring|run-history|file=\w+:|stream/)"
)


class RequestLimits:
    """ASGI middleware: 403 for a foreign host name (DNS rebinding), 413 for a large body, 404 for what is not used."""

    def __init__(
        self, app, host: str, allow_hosts: Sequence[str] = (), before_upload: Callable[[], None] = lambda: None
    ):
        """`host`: what the server is bound to. `before_upload` is called before a file is accepted."""
        self.app, self.before_upload = app, before_upload
        self.hosts = {name.lower().strip("[]") for name in (*LOCAL_HOSTS, host, *allow_hosts)}
        self.any_address = host in ANY_ADDRESS

    async def __call__(self, scope, receive, send) -> None:
        """Answer with a refusal in one sentence, or pass the request on with its body read."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if not self._is_known(headers.get("host", "")):
            text = "This page does not answer to that host name; its owner can add it with --allow-host NAME."
            return await PlainTextResponse(text, 403)(scope, receive, send)
        if UNUSED.match(scope["path"]):
            return await PlainTextResponse("The page has no such address.", 404)(scope, receive, send)
        if scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        has_file = headers.get("content-type", "").startswith("multipart/form-data")
        limit = MAX_UPLOAD_REQUEST if has_file else MAX_REQUEST
        messages = await _read(receive, limit)
        if messages is None:
            text = f"A request may have at most {limit // 1024} KB."
            return await PlainTextResponse(text, 413, {"Connection": "close"})(scope, receive, send)
        if has_file:
            self.before_upload()

        async def replay():
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)

    def _is_known(self, host: str) -> bool:
        """Whether the Host header names this server; rebinding needs a name, so a plain address is safe."""
        name = re.sub(r":\d+$", "", host.lower()).strip("[]")
        return name in self.hosts or name.endswith(PUBLIC_HOSTS) or (self.any_address and _is_address(name))


async def _read(receive, limit: int) -> list[dict] | None:
    """All messages of a request's body; None if they hold more bytes than `limit`.

    A body that is too large is read on for a while: a client that is still sending may not see the answer.
    """
    messages, size = [], 0
    while size <= 16 * MAX_UPLOAD_REQUEST:
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            messages.clear()
        else:
            messages.append(message)
        if not message.get("more_body"):
            break
    return messages if size <= limit else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
