"""Sessions that are made, used and destroyed one after the other leave nothing behind: no memory, file, thread or mapping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.runtime.toy import PROMPT

# Arguments: artifact, device, lives, what is kept of each ("nothing", or "session", as a leak would), prompt. Prints what was held
# after the first quarter of the lives, which fill caches of the allocator and of the driver, and after all of them.
LIVES = """
import ctypes, gc, json, os, sys
import kiln

artifact, device, count, keep, prompt = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])
kept, seen = [], set()

def held():
    gc.collect()
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    memory = sum(int(status[field].split()[0]) for field in ("RssAnon", "RssShmem")) << 10
    found = {"memory": memory, "files": len(os.listdir("/proc/self/fd")), "threads": int(status["Threads"]),
             "mappings": sum(1 for _ in open("/proc/self/maps"))}
    if device != "cpu":
        found["device"] = on_the_device()
    return found

class Process(ctypes.Structure):  # nvmlProcessInfo_t
    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("instance", ctypes.c_uint), ("compute", ctypes.c_uint)]

def on_the_device():
    # Of this process, by the driver: neighbours do not count.
    nvml, devices, used = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_uint(), []
    assert not nvml.nvmlInit_v2() and not nvml.nvmlDeviceGetCount_v2(ctypes.byref(devices))
    for i in range(devices.value):
        handle, count, processes = ctypes.c_void_p(), ctypes.c_uint(256), (Process * 256)()
        assert not nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle))
        assert not nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle, ctypes.byref(count), processes)
        used += [p.used for p in processes[:count.value] if p.pid == os.getpid()]
    assert used, "NVML does not list this process"
    return sum(used)

model = kiln.Model(artifact, device)
held()  # NVML keeps nine files and twelve megabytes from the first question on
for life in range(count):
    if life % 50 == 49:
        model = kiln.Model(artifact, device)
    session = kiln.Session(model)
    session.prefill(prompt)
    seen.add(tuple(session.generate(4, stop_at_eog=False)[0]))
    if keep == "session":
        kept.append(session)
    if life == count // 4:
        before = held()
assert len(seen) == 1
del session
print(json.dumps([before, held()]))
"""


MEMORY = 1 << 20  # bytes that a thousand lives may add: a kilobyte each would be a leak
MAPPINGS = 16 if "ASAN_OPTIONS" in os.environ else 0  # AddressSanitizer maps memory for itself
DEVICE = 8 << 20  # likewise on a GPU, of the host's and of the device's: a driver keeps what it likes


def grown(artifact: Path, device: str, lives: int, keep: str = "nothing") -> dict[str, int]:
    """By how much a process holds more after three quarters of `lives`."""
    command = [sys.executable, "-c", LIVES, artifact, device, lives, keep, json.dumps(PROMPT)]
    environment = dict(os.environ)
    if "ASAN_OPTIONS" in environment:  # what is freed is memory again, and not held back to see who still uses it
        environment["ASAN_OPTIONS"] += ":quarantine_size_mb=0:thread_local_quarantine_size_kb=0"
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout)
    return {what: after[what] - before[what] for what in before}


def test_nothing_is_left_behind(toy: Path, device: str) -> None:
    """A thousand sessions, twenty models."""
    found = grown(toy, device, 1000)
    print(found)
    if device == "cpu":
        assert found["memory"] < MEMORY and found["files"] <= 0 and found["threads"] <= 0 and found["mappings"] <= MAPPINGS
    else:
        assert max(found["memory"], found["device"]) < DEVICE and found["files"] <= 0 and found["threads"] <= 0


def test_a_leak_would_be_seen(toy: Path, device: str) -> None:
    found = grown(toy, device, 100, "session")
    if device == "cpu":
        assert found["memory"] > 2 * MEMORY and found["files"] + found["mappings"] > 0
    else:
        assert found["device"] > 2 * DEVICE
