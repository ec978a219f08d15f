"""`foveola.explore`: a local page on which a person looks at images as one or two encoders see them."""

import secrets
import socket
import threading
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from foveola.config import UserError, build
from foveola.data.identity import looked_at_once, say
from foveola.data.sources import Source
from foveola.explorer.guard import is_loopback
from foveola.explorer.session import Session
from foveola.explorer.sides import ExploreConfig, check_names, sides_of
from foveola.failures import explain
from foveola.models.encoder import Encoder
from foveola.outside import library

LOOPBACK = "127.0.0.1"


class Explorer:
    """A page that is served until it is closed; as a context, until its end.

    Attributes:
        url: the address to open, with the token without which nothing is answered.
        session: the data and what was computed of them.
    """

    def __init__(self, session: Session, host: str, port: int) -> None:
        uvicorn = library("uvicorn", "explore", "foveola explore")
        from foveola.explorer.app import application

        self.session, token = session, secrets.token_urlsafe(24)
        self.socket = _listening(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self.socket.getsockname()[1]}/?token={token}"
        served = application(session, token, host, f"foveola-{secrets.token_hex(4)}")
        settings = uvicorn.Config(
            served, log_level="critical", access_log=False, server_header=False, lifespan="off", ws="none"
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=self._serve, daemon=True, name="foveola explore")
        self._thread.start()

    def _serve(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._server.run(sockets=[self.socket])

    def wait(self) -> None:
        """Serve until the page is closed, or the process is interrupted."""
        while self._thread.is_alive():
            self._thread.join(1.0)

    def close(self) -> None:
        """End the page."""
        self._server.should_exit = True
        self._thread.join(10.0)
        self.socket.close()
        self.session.close()

    def __enter__(self) -> "Explorer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@looked_at_once()
def explore(
    *models: Encoder | str | Path,
    data: Source | str | None = None,
    host: str = LOOPBACK,
    port: int | None = None,
    device: str | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Explorer:
    """Serve a page with the images of a data set, a map of them, and what is alike to what; returns at once.

    Args:
        models: one or two encoders, each as `foveola.load` takes it or an `Encoder`, or files that
            `foveola.embed` wrote (those of one encoder go together). Of an encoder, features of images,
            objects (by their masks, and cut out) and patches are computed first, as by `foveola.embed`, and
            kept in `RUN/explore` or the user's cache. Features come with their encoder if it can be loaded
            from where they say, and is still the same one.
        data: a data string or a source; None = that which files of features name.
        host: where to listen. Anything but loopback opens the page, and so the images, to whoever reaches
            this machine and knows the address; nothing is encrypted.
        port: None = any free one.
        device: as of `foveola.embed`.
        cache: a folder for features, in place of the run's.
        settings: keys of `ExploreConfig`.

    Raises UserError for what `foveola.embed` and `foveola.load` refuse, features of other data, more than two
    encoders, keys that change nothing, a port that is taken, and without the extra `explore`.
    """
    for module in ("starlette", "uvicorn"):
        library(module, "explore", "foveola explore")
    config = build(ExploreConfig, settings)
    if settings.get("seed") is not None and config.limit is None and not config.patches:
        raise UserError("seed has no effect: it draws the images that limit= and patches= leave")
    check_names(models)
    _listening(host, port or 0).close()  # before anything is computed
    say(progress)
    sides, source = sides_of(models, data, settings, config, device=device, cache=cache, progress=progress)
    if not is_loopback(host):
        warnings.warn(
            f"host={host}: whoever reaches this machine and knows the address sees the images, unencrypted",
            stacklevel=2,
        )
    return Explorer(Session(sides, source, config.map), host, port or 0)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where that cannot be."""
    if not 0 <= port < 2**16:
        raise UserError(f"port={port}: expected 1 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        opened = socket.socket(found[0][0], socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(found[0][4])
    except OSError as error:
        raise UserError(f"host={host} port={port}: {explain(error) or error}; give another port=") from error
    opened.listen(128)
    return opened
