"""What the operator of a server says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes in bytes, times in seconds; timeout 0: none."""

    names: tuple[str, ...] = ("kiln",)
    any_model: bool = False
    sessions: int = 0  # answers at once; 0: as many as the artifact has rows
    queue: int = 64
    chunk: int = 0  # ids of a prompt between two steps of others; 0: the artifact's
    max_gap_ms: float = 0.0  # what prompts may take between two steps of others, of an artifact with rows; a chunk is read at least
    run_ahead: bool | None = None  # of an artifact with rows: a step is queued before tokens of the one before are seen; None: on a GPU
    snapshots: tuple[int | None, int | None] = (0, 0)  # bytes kept on the device and on the host; None: as `snapshot_store` finds
    timeout: float = 0.0
    drain: float = 10.0
    body: int = 8 << 20
    brackets: int = 1 << 20  # of a body, that open a list or an object: json reads it whole, and nothing else is answered meanwhile
    messages: int = 10_000
    tools: int = 256
    depth: int = 100
    keys: tuple[bytes, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None  # of the Host header; None: any
    metrics_prefix: str = "kiln"
    reasoning_field: str = "reasoning_content"
    think: bool | None = None  # where a request does not say; None: as the template does
    ping: float = 10.0
    log: bool = False
