"""Replicas of one artifact under Ray Serve, one GPU each: `python -m kiln.exporter.serve.deploy.ray_serve ARTIFACT`.

An ingress takes HTTP and knows no model. It sends each request, whole, to a replica, which answers it as `kiln serve` does: the same
application, called in its process. The replica is the one that the hash of the prompt's beginning ranks first (`prefix.py`), or the next
one where that has as many requests as it may have: so a conversation comes back to the caches that hold it, and no replica is flooded. How
many replicas there are follows the requests that each has.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any

import click
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from kiln.exporter.parameters import PATH, Float
from kiln.exporter.serve.deploy.prefix import key, ranked

HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"proxy-connection", b"te", b"trailer"}


class ByPrefix(RequestRouter):  # type: ignore[misc, unused-ignore]  # of the extra [ray]
    """Replicas one behind the other, by the request's key; Ray takes the first that has room."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = str(pending_request.kwargs.get("key", "")) if pending_request else ""
        names = [str(replica.replica_id.unique_id) for replica in candidate_replicas]
        return [[candidate_replicas[i]] for i in ranked(wanted, names)]


class Replica:
    """One artifact. `answer` runs the ASGI application of `kiln serve` over a request that the ingress has read."""

    def __init__(self, artifact: str, device: str, threads: int | None, options: dict[str, Any]):
        from kiln.exporter.serve.app import application
        from kiln.exporter.serve.served import Served
        from kiln.exporter.serve.settings import Settings

        self.served = Served.load(Path(artifact), device, threads, Settings(**options))
        self.app = application(self.served)

    def check_health(self) -> None:
        """Ray starts another one in its place where this raises."""
        if self.served.engine.broken:
            raise RuntimeError(self.served.engine.broken)

    async def answer(self, scope: dict[str, Any], body: bytes, key: str) -> AsyncIterator[MutableMapping[str, Any]]:
        """The application's messages. A client that leaves cancels this, and with it the answer."""
        messages: asyncio.Queue[MutableMapping[str, Any] | None] = asyncio.Queue()
        gone, given = asyncio.Event(), False

        async def receive() -> MutableMapping[str, Any]:
            nonlocal given
            if given:
                await gone.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def run() -> None:
            try:
                await self.app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            if not task.done():
                task.cancel()


class Ingress:
    """HTTP in, HTTP out. largest: bytes of a body; what a replica takes is its own to say."""

    def __init__(self, replicas: Any, largest: int):
        self.replicas, self.largest = replicas.options(stream=True), largest

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import PlainTextResponse, StreamingResponse

        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self.largest:
                return PlainTextResponse(f"the body is larger than {self.largest} bytes", 413)
        kept = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "client", "server")
        scope = {name: request.scope[name] for name in kept if name in request.scope}
        scope["headers"] = [(n, v) for n, v in request.scope["headers"] if n.lower() not in HOP]
        messages = self.replicas.answer.remote(scope, bytes(body), key=key(bytes(body)))
        start = await anext(messages)

        async def rest() -> AsyncIterator[bytes]:
            async for message in messages:
                if message.get("body"):
                    yield message["body"]

        response = StreamingResponse(rest(), start["status"])
        response.raw_headers = [(n, v) for n, v in start["headers"] if n.lower() not in HOP]
        return response


@dataclasses.dataclass(frozen=True)
class Plan:
    """least, most: replicas. Of each one's requests: above `target` more replicas are started, above `room` others are asked."""

    least: int = 1
    most: int = 1
    target: float = 4.0
    room: int = 16
    gpus: float = 1.0
    cpus: float = 1.0


def application(artifact: Path, plan: Plan, device: str, threads: int | None = None, **options: Any) -> Any:
    """What `serve.run` takes. options: of `Settings`."""
    router: Any = RequestRouterConfig  # what it takes is not declared as such
    replica: Any = serve.deployment(
        autoscaling_config=AutoscalingConfig(min_replicas=plan.least, max_replicas=plan.most, target_ongoing_requests=plan.target),
        max_ongoing_requests=plan.room,
        ray_actor_options={"num_gpus": plan.gpus, "num_cpus": plan.cpus},
        request_router_config=router(request_router_class="kiln.exporter.serve.deploy.ray_serve:ByPrefix"),
        health_check_period_s=5,
    )(Replica)
    ingress: Any = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})(Ingress)
    options = {"names": (artifact.name,), **options}
    return ingress.bind(replica.bind(str(artifact.resolve()), device, threads, options), options.get("body", 16 << 20))


@click.command()
@click.argument("artifact", type=PATH)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--replicas", type=click.IntRange(1), default=1, show_default=True, help="At least.")
@click.option("--max-replicas", type=click.IntRange(1), help="At most.  [default: --replicas]")
@click.option("--target", type=Float(0, min_open=True), default=4.0, help="Requests of a replica, above which one is added.")
@click.option("--room", type=click.IntRange(1), default=16, help="Requests of a replica, above which the next one is asked.")
@click.option("--gpus", type=Float(0), default=1.0, show_default=True, help="Of a replica; 0: the CPU.")
@click.option("--alias", help="The model's name.  [default: the folder's]")
@click.option("--address", help="Of a Ray cluster that runs; none: one is started here.")
def main(
    artifact: Path, host: str, port: int, replicas: int, max_replicas: int | None, target: float, room: int, gpus: float,
    alias: str | None, address: str | None,
) -> None:  # fmt: skip
    """Serve an artifact by replicas under Ray."""
    ray.init(address=address)
    serve.start(http_options=HTTPOptions(host=host, port=port))
    plan = Plan(replicas, max_replicas or replicas, target, room, gpus)
    serve.run(application(artifact, plan, "cuda" if gpus else "cpu", names=(alias or artifact.resolve().name,)), blocking=True)


if __name__ == "__main__":
    main()
