"""The server: a socket, the application behind its guard, the engine's supervisor, and how all of it ends."""

import asyncio
import contextlib
import ipaddress
import resource
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from starlette.routing import Route

from hasten.base.errors import ConfigError
from hasten.serve.admission import Admission
from hasten.serve.app import make_app
from hasten.serve.counts import Counts
from hasten.serve.guard import Guard, Limits
from hasten.serve.heart import Patience
from hasten.serve.http import Http
from hasten.serve.identity import Identity
from hasten.serve.keys import Keys
from hasten.serve.lag import watch_lag
from hasten.serve.likeness import Likeness
from hasten.serve.log import Log
from hasten.serve.messages import Begin
from hasten.serve.metrics import PREFIX, Metrics, check_prefix
from hasten.serve.notify import notify
from hasten.serve.recall import Recall
from hasten.serve.responses import Limits as Kept
from hasten.serve.responses import ResponseCache, SemanticCache, Store, open_store
from hasten.serve.responses.semantic import check_threshold
from hasten.serve.service import Service
from hasten.serve.supervisor import Supervisor
from hasten.serve.texts import Texts

BACKLOG = 2048
ACCEPTS = 16
"""Connections that are taken at a time; asyncio would take as many as the backlog holds, and do nothing else meanwhile."""
DRAIN_CHECK_S = 0.05
READY_CHECK_S = 0.1
CUT_OFF_S = 1.0
"""How long those that were cut off have to be told so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a server. ``name`` is what clients call the model; ``waiting`` is how many outputs may wait beside those that run, as many as
    these unless it is given: who is taken waits about one answer's time then, however many ask. ``grace_s`` is how long a server that is
    told to stop lets streams go on; ``hosts`` are further names under which one without keys may be asked."""

    begin: Begin
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys = field(default_factory=lambda: Keys(()))
    without_keys: bool = False
    hosts: Collection[str] = ()
    waiting: int | None = None
    deadline_s: float | None = None
    grace_s: float = 30.0
    limits: Limits = field(default_factory=Limits)
    as_json: bool = False
    patience: Patience = Patience()
    response_cache: str = "off"
    """Where answers are kept that must come again: "off", "memory", or the URL of a Redis."""
    kept: Kept = Kept()
    semantic: float | None = None
    """The cosine at which a prompt is like another; None answers none with another's answer."""
    metrics_prefix: str = PREFIX


class _Uvicorn(uvicorn.Server):
    """Asks to be drained at the first signal, and stops at the second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.asked = asyncio.Event()
        self._signals = 0
        self._loop = asyncio.get_running_loop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen. What asyncio calls the backlog is how many connections it takes at a time, too; the kernel may hold more of them."""
        await super().startup(sockets=sockets)
        for one in sockets or ():
            one.listen(BACKLOG)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal."""
        self._signals += 1
        if self._signals > 1:
            self.should_exit = self.force_exit = True
        self._loop.call_soon_threadsafe(self.asked.set)


def serve(settings: Settings) -> int:
    """Serve until told to stop; the exit code. Raises UserError for what cannot be served."""
    check_prefix(settings.metrics_prefix)
    texts = Texts(settings.begin.model, context=settings.begin.context, slots=settings.begin.max_sequences)
    if not settings.keys and not settings.without_keys and not _is_loopback(settings.host):
        raise ConfigError(
            f"--host {settings.host} lets other machines in, and there are no keys; give --api-key-file, or --without-keys if all may ask"
        )
    store = None if settings.response_cache == "off" else open_store(settings.response_cache, settings.kept)
    if settings.semantic is not None:
        if store is None:
            raise ConfigError("--semantic-cache stands behind the exact cache; give --response-cache too")
        check_threshold(settings.semantic)
    listener = _listen(settings.host, settings.port)
    _allow_many_files()
    log = Log(as_json=settings.as_json)
    try:
        return asyncio.run(_run(settings, texts, listener, log, store))
    finally:
        log.close()


async def _run(settings: Settings, texts: Texts, listener: socket.socket, log: Log, store: Store | None) -> int:
    codes: list[int] = []
    slots = settings.begin.max_sequences
    admission = Admission(slots + (slots if settings.waiting is None else settings.waiting), slots)
    gave_up = asyncio.Event()

    def give_up(code: int) -> None:
        codes.append(code)
        gave_up.set()

    supervisor = Supervisor(settings.begin, told=log.event, gave_up=give_up, patience=settings.patience)
    recall, identity = None, None
    if store is not None:
        cache = ResponseCache(store, settings.kept.value_bytes)
        identity = Identity(cache, settings.begin, supervisor, log.event)
        recall = Recall(
            cache, identity, log, None if settings.semantic is None else _semantic(settings.semantic, settings.kept, supervisor)
        )
    counts = Counts()
    service = Service(settings.name, supervisor, texts, admission, log, deadline_s=settings.deadline_s, counts=counts, recall=recall)
    caches = None if recall is None else recall.counts()
    metrics = Metrics(counts, supervisor, log, model=settings.name, prefix=settings.metrics_prefix, caches=caches)
    api = make_app(service, metrics)
    hosts = {"localhost", settings.host.lower(), *map(str.lower, settings.hosts)} if _is_loopback(settings.host) else None
    routes = frozenset(route.path for route in api.routes if isinstance(route, Route))
    app = Guard(api, log, keys=settings.keys, hosts=hosts, limits=settings.limits, routes=routes, counts=counts)
    server = _Uvicorn(
        uvicorn.Config(
            app,
            http=Http,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=ACCEPTS,
            h11_max_incomplete_event_size=settings.limits.header_bytes,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
    )
    if texts.has_text and texts.template is None:
        log.event(f"{settings.begin.model} has no chat template, so a plain one is used; a model not made to chat will ramble")
    host, port = listener.getsockname()[:2]
    log.event(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}, serving {settings.name}")
    await supervisor.start()
    announcing = asyncio.create_task(_announce(supervisor))
    texts.warm()  # while the engine loads
    watching = asyncio.create_task(watch_lag(counts.loop_lag))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    asked, over = asyncio.create_task(server.asked.wait()), asyncio.create_task(gave_up.wait())
    finding = None if identity is None else asyncio.create_task(identity.find())
    await asyncio.wait({serving, asked, over}, return_when=asyncio.FIRST_COMPLETED)
    announcing.cancel()
    notify("STOPPING=1")
    if asked.done() and not codes:
        await _drain(service, server, settings.grace_s)
    server.should_exit = True
    with contextlib.suppress(asyncio.CancelledError):
        await serving
    for task in (asked, over, finding, watching):
        if task is not None:
            task.cancel()
    if recall is not None:
        await recall.close()
    await supervisor.stop()
    texts.close()
    return codes[0] if codes else 0


def _semantic(threshold: float, kept: Kept, supervisor: Supervisor) -> Callable[[bytes], SemanticCache]:
    likeness = Likeness(supervisor)
    return lambda model: SemanticCache(likeness.embed, model, limits=kept, threshold=threshold)


async def _announce(supervisor: Supervisor) -> None:
    """Tell systemd once the model is there."""
    while supervisor.state != "ready":
        await asyncio.sleep(READY_CHECK_S)
    notify("READY=1")


async def _drain(service: Service, server: uvicorn.Server, grace_s: float) -> None:
    """Take no new work, and let what there is come to its end."""
    service.admission.draining = True
    log, left = service.log, service.admission.taken
    log.event(f"going down: {left} outputs are on their way and get {grace_s:g} s" if left else "going down")
    await _done(service, server, grace_s)
    if service.admission.taken:
        log.event(f"{service.admission.taken} outputs are cut off")
        service.supervisor.cut_off()
        await _done(service, server, CUT_OFF_S)


async def _done(service: Service, server: uvicorn.Server, seconds: float) -> None:
    """Wait for all work to end, for so long at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while service.admission.taken and not server.should_exit:
                await asyncio.sleep(DRAIN_CHECK_S)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)  # without the last asyncio leaves Nagle's algorithm on: 40 ms an answer
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port") from None
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _allow_many_files() -> None:
    """A thousand idle clients are a thousand open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 65536
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), hard))
