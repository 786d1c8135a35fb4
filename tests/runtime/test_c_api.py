"""libkiln.so through kiln.h: what it exports, its results beside the Python module's, bad handles, errors, threads, and the examples."""

from __future__ import annotations

import ctypes as c
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

import kiln
from tests.runtime.artifact.test_gguf_weights import Case
from tests.runtime.toy import MAX_SEQ, PROMPT, VOCAB

ROOT = Path(__file__).parents[2] / "runtime_cpp"
HEADER = ROOT / "include" / "kiln.h"
OK, FAILED, MISUSED = range(3)
ON_TOKEN = c.CFUNCTYPE(c.c_int, c.c_int64, c.c_char_p, c.c_size_t, c.c_void_p)


class LoadOptions(c.Structure):
    _fields_ = [("size", c.c_size_t), ("device", c.c_char_p), ("verify", c.c_int), ("verify_threads", c.c_int),
                ("progress", c.CFUNCTYPE(None, c.c_uint64, c.c_uint64, c.c_void_p)), ("user", c.c_void_p), ("weights", c.c_char_p),
                ("ple", c.c_char_p), ("note", c.CFUNCTYPE(None, c.c_char_p, c.c_void_p))]  # fmt: skip


class ModelInfo(c.Structure):
    _fields_ = [("size", c.c_size_t), ("vocab_size", c.c_int64), ("max_seq_len", c.c_int64), ("prefill_chunk", c.c_int64),
                ("has_tokenizer", c.c_int), ("device", c.c_char * 32), ("target", c.c_char * 32)]  # fmt: skip


def library_path() -> Path:
    paths = [Path(folder) / "lib" / "libkiln.so" for folder in kiln.__path__]
    return next(path for path in paths if path.is_file())


@pytest.fixture(scope="module")
def lib() -> c.CDLL:
    library = c.CDLL(str(library_path()))
    library.kiln_error.restype = library.kiln_version.restype = c.c_char_p
    return library


def declared() -> set[str]:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return set(re.findall(r"\b(kiln_\w+)\([^)]*\)\s*;", text))


def load(lib: c.CDLL, path: Path, device: str) -> c.c_void_p:
    model, options = c.c_void_p(), LoadOptions(c.sizeof(LoadOptions), device.encode())
    assert lib.kiln_model_load(str(path).encode(), c.byref(options), c.byref(model)) == OK, lib.kiln_error()
    return model


def opened(lib: c.CDLL, model: c.c_void_p) -> c.c_void_p:
    session = c.c_void_p()
    assert lib.kiln_session_open(model, None, c.byref(session)) == OK, lib.kiln_error()
    return session


def prefill(lib: c.CDLL, session: c.c_void_p, tokens: list[int]) -> tuple[int, int]:
    following = c.c_int64(-7)
    return lib.kiln_prefill(session, (c.c_int64 * len(tokens))(*tokens), c.c_size_t(len(tokens)), c.byref(following)), following.value


def generate(lib: c.CDLL, session: c.c_void_p, most: int, more=lambda token: True) -> tuple[int, list[int], int]:
    """(status, tokens, why it stopped)."""
    tokens, stop = [], c.c_int(-7)

    def take(token: int, text: bytes, size: int, user: object) -> int:
        assert len(text) == size
        tokens.append(token)
        return not more(token)

    return lib.kiln_generate(session, c.c_int64(most), 0, ON_TOKEN(take), None, c.byref(stop)), tokens, stop.value


def refused(lib: c.CDLL, status: int, expected: int, *words: str) -> None:
    said = lib.kiln_error().decode()
    assert status == expected and "\n" not in said and all(word in said for word in words), (status, said)


def test_exports() -> None:
    """The functions of the header and nothing else: a process may hold another C++ library, torch among them."""
    shown = subprocess.run(["nm", "-D", "--defined-only", library_path()], capture_output=True, text=True, check=True).stdout
    assert {line.split()[-1] for line in shown.splitlines()} == declared() and len(declared()) == 29
    needed = subprocess.run(["readelf", "-d", library_path()], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(\S+?)\.so", needed)
    sanitized = {"libasan", "libubsan"} if "libasan" in libraries else set()
    assert set(libraries) - sanitized <= {"libgomp", "libstdc++", "libgcc_s", "libm", "libc", "ld-linux-x86-64"}, libraries
    assert "[$ORIGIN]" in needed and (library_path().parent / "libgomp.so.1").is_file()


def test_it_says_what_the_module_says(lib, toy, device) -> None:
    assert lib.kiln_version().decode() == kiln.__version__
    model = load(lib, toy, device)
    info = ModelInfo(c.sizeof(ModelInfo))
    assert lib.kiln_model_describe(model, c.byref(info)) == OK
    theirs = kiln.Model(str(toy), device=device)
    assert (info.vocab_size, info.max_seq_len, info.prefill_chunk) == (VOCAB, MAX_SEQ, theirs.prefill_chunk)
    assert (info.device.decode(), info.target.decode(), info.has_tokenizer) == (theirs.device, theirs.target, 0)
    session, other = opened(lib, model), kiln.Session(theirs)
    assert prefill(lib, session, PROMPT) == (OK, other.prefill(PROMPT))
    following = c.c_int64()
    assert lib.kiln_step(session, c.c_int64(11), c.byref(following)) == OK and following.value == other.decode(11)
    assert lib.kiln_step(session, c.c_int64(-1), c.byref(following)) == OK and following.value == other.decode()
    logits = (c.c_float * VOCAB)()
    assert lib.kiln_logits(session, logits, c.c_size_t(VOCAB)) == OK and list(logits) == other.logits().tolist()
    tokens, why = other.generate(5)
    assert generate(lib, session, 5) == (OK, tokens, 1) and why == "length"
    position = c.c_int64()
    assert lib.kiln_position(session, c.byref(position)) == OK and position.value == other.position
    assert generate(lib, session, 5, more=lambda token: False)[2] == 3
    assert generate(lib, session, MAX_SEQ)[2] == 2
    assert lib.kiln_reset(session) == OK and prefill(lib, session, PROMPT) == (OK, kiln.Session(theirs).prefill(PROMPT))
    sampling = (c.c_float(0.7), c.c_int32(0), c.c_float(1), c.c_int64(1))
    assert lib.kiln_set_sampling(session, *sampling) == OK
    assert lib.kiln_session_free(session) == OK and lib.kiln_model_free(model) == OK


def test_bad_handles(lib, toy, device) -> None:
    """NULL, freed, of the other kind, made up, an address: told, with what was asked, and nothing written."""
    model = load(lib, toy, device)
    session, kept = opened(lib, model), opened(lib, model)
    assert lib.kiln_session_free(session) == OK
    out = c.c_int64(-7)
    none = "not a kiln_session, or one that was freed"
    address = c.cast(c.pointer(out), c.c_void_p)
    for bad, words in ((None, "is NULL"), (session, none), (model, none), (c.c_void_p(12345), none), (address, none)):
        refused(lib, lib.kiln_position(bad, c.byref(out)), MISUSED, "kiln_position: ", words)
        refused(lib, prefill(lib, bad, PROMPT)[0], MISUSED, words)
        refused(lib, generate(lib, bad, 1)[0], MISUSED, words)
        refused(lib, lib.kiln_step(bad, c.c_int64(1), c.byref(out)), MISUSED, words)
        refused(lib, lib.kiln_reset(bad), MISUSED, words)
        refused(lib, lib.kiln_session_free(bad), MISUSED, words)
        assert out.value == -7
    refused(lib, lib.kiln_model_free(kept), MISUSED, "kiln_model_free: not a kiln_model, or one that was freed")
    refused(lib, lib.kiln_session_open(kept, None, c.byref(c.c_void_p())), MISUSED, "not a kiln_model")
    # A session keeps its model.
    assert lib.kiln_model_free(model) == OK
    refused(lib, lib.kiln_model_free(model), MISUSED, "freed")
    assert prefill(lib, kept, PROMPT)[0] == OK and generate(lib, kept, 3)[0] == OK
    assert lib.kiln_session_free(kept) == OK


def test_bad_values(lib, toy, device, tmp_path) -> None:
    handle = c.c_void_p(77)
    refused(lib, lib.kiln_model_load(None, None, c.byref(handle)), MISUSED, "kiln_model_load: path is NULL")
    refused(lib, lib.kiln_model_load(str(toy).encode(), None, None), MISUSED, "model is NULL")
    refused(lib, lib.kiln_model_load(str(tmp_path / "none").encode(), None, c.byref(handle)), FAILED, "none")
    refused(lib, lib.kiln_model_load(str(toy).encode(), c.byref(LoadOptions(0)), c.byref(handle)), MISUSED, "options.size is 0")
    nowhere = LoadOptions(c.sizeof(LoadOptions), b"tpu")
    refused(lib, lib.kiln_model_load(str(toy).encode(), c.byref(nowhere), c.byref(handle)), FAILED, "tpu")
    assert handle.value == 77
    model = load(lib, toy, device)
    session, count = opened(lib, model), c.c_size_t(99)
    refused(lib, lib.kiln_encode(model, b"x", c.c_size_t(1), 0, None, c.c_size_t(0), c.byref(count)), FAILED, "has no tokenizer")
    refused(lib, lib.kiln_encode(model, b"x", c.c_size_t(1), 9, None, c.c_size_t(0), c.byref(count)), MISUSED, "encoding 9")
    refused(lib, prefill(lib, session, [VOCAB])[0], FAILED, str(VOCAB))
    refused(lib, lib.kiln_prefill(session, None, c.c_size_t(3), c.byref(c.c_int64())), MISUSED, "ids is NULL")
    refused(lib, lib.kiln_prefill(session, (c.c_int64 * 1)(1), c.c_size_t(1), None), MISUSED, "next is NULL")
    refused(lib, generate(lib, session, 1)[0], FAILED, "before prefill")
    refused(lib, prefill(lib, session, [1] * (MAX_SEQ + 1))[0], FAILED, f"holds {MAX_SEQ}")
    assert prefill(lib, session, PROMPT)[0] == OK
    refused(lib, lib.kiln_generate(session, c.c_int64(1), 0, None, None, None), MISUSED, "on_token is NULL")
    refused(lib, lib.kiln_logits(session, (c.c_float * 3)(), c.c_size_t(3)), MISUSED, "room for 3", str(VOCAB))
    refused(lib, lib.kiln_set_sampling(session, c.c_float(-1), 0, c.c_float(1), c.c_int64(0)), FAILED, "temperature")
    refused(lib, lib.kiln_set_threads(-1), MISUSED, "threads is -1")
    # The text is the last failure's of this thread, and a success leaves it.
    assert lib.kiln_position(session, c.byref(c.c_int64())) == OK and b"threads is -1" in lib.kiln_error()
    others: list[bytes] = []
    thread = threading.Thread(target=lambda: others.append(lib.kiln_error()))
    thread.start()
    thread.join()
    assert others == [b""]
    assert lib.kiln_session_free(session) == OK and lib.kiln_model_free(model) == OK


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_code_alone_and_the_file_of_its_weights(lib, toy, device, tmp_path) -> None:
    case = Case(tmp_path / "m.gguf")
    case.map["metadata"]["noted"] = {"toy.note": "0" * 64}
    artifact, notes = case.make(toy, tmp_path / "elsewhere" / "a"), []

    def status(**given: object) -> int:
        options = LoadOptions(c.sizeof(LoadOptions), b"cpu", note=LoadOptions._fields_[-1][1](lambda line, _: notes.append(line)), **given)
        return lib.kiln_model_load(str(artifact).encode(), c.byref(options), c.byref(c.c_void_p()))

    assert status() != OK and b"holds code only" in lib.kiln_error() and not notes
    assert status(weights=str(case.path).encode(), ple=b"host") != OK and b"no per-layer embedding" in lib.kiln_error()
    assert status(weights=str(case.path).encode(), ple=b"there") != OK and b"unknown place 'there'" in lib.kiln_error()
    assert status(weights=str(case.path).encode()) == OK, lib.kiln_error()
    assert len(notes) == 1 and b"toy.note" in notes[0]


class DraftCounts(c.Structure):
    _fields_ = [("size", c.c_size_t), ("steps", c.c_int64), ("tokens", c.c_int64), ("tried", c.c_int64), ("right", c.c_int64)]


@pytest.mark.parametrize("device", ["cpu"], indirect=True)  # whatever it is, three_rows is of the CPU
def test_drafts(lib, toy, device, three_rows) -> None:
    """The same text with fewer steps; what cannot be is told."""
    model, plain = load(lib, three_rows, device), load(lib, toy, device)
    prompt, counts, texts = [9, 8, 7, 9, 8, 7, 9], DraftCounts(c.sizeof(DraftCounts)), []
    for source in (0, 1):
        session = opened(lib, model)
        assert lib.kiln_set_drafts(session, source, c.c_int64(0)) == OK
        assert prefill(lib, session, prompt)[0] == OK
        texts.append(generate(lib, session, 30))
        assert lib.kiln_count_drafts(session, c.byref(counts)) == OK
        assert (counts.tried > 0) == (source == 1) and counts.tokens == counts.steps + counts.right
    assert texts[0] == texts[1] and counts.right > 0
    refused(lib, lib.kiln_set_drafts(session, 7, c.c_int64(0)), MISUSED, "source 7")
    refused(lib, lib.kiln_set_drafts(session, 1, c.c_int64(9)), FAILED, "9 a step")
    refused(lib, lib.kiln_set_drafts(opened(lib, plain), 1, c.c_int64(0)), FAILED, "no steps of several tokens")
    refused(lib, lib.kiln_count_drafts(session, None), MISUSED, "counts is NULL")


class SnapshotInfo(c.Structure):
    _fields_ = [("size", c.c_size_t), ("position", c.c_int64), ("device_bytes", c.c_uint64), ("host_bytes", c.c_uint64), ("whole", c.c_int)]


def test_going_back_and_on(lib, toy, device, tmp_path) -> None:
    """Snapshots, rewinding and files, as the module has them; bad handles and values are told and change nothing."""
    model = load(lib, toy, device)
    session, other, snapshot, whole = opened(lib, model), opened(lib, model), c.c_void_p(), c.c_void_p()
    assert prefill(lib, session, PROMPT)[0] == OK
    assert lib.kiln_snapshot_take(session, 0, c.byref(snapshot)) == lib.kiln_snapshot_take(session, 3, c.byref(whole)) == OK
    info = SnapshotInfo(c.sizeof(SnapshotInfo))
    theirs = kiln.Session(kiln.Model(str(toy), device=device))
    theirs.prefill(PROMPT)
    for handle, is_whole in ((snapshot, False), (whole, True)):
        same = theirs.snapshot(whole=is_whole, host=is_whole)
        assert lib.kiln_snapshot_describe(handle, c.byref(info)) == OK
        assert (info.position, info.whole) == (len(PROMPT), is_whole)
        assert (info.device_bytes, info.host_bytes) == (same.device_bytes, same.host_bytes)
    right = generate(lib, session, 5)
    assert lib.kiln_session_save(session, str(tmp_path / "s").encode()) == OK
    further = generate(lib, session, 3)
    for taker in (other, session):  # a session that has loaded another past cannot give its own any more
        assert lib.kiln_restore(taker, snapshot) == OK and generate(lib, taker, 5) == right
        assert lib.kiln_session_load(taker, str(tmp_path / "s").encode()) == OK and generate(lib, taker, 3) == further
    earliest, count, ids = c.c_int64(), c.c_size_t(), (c.c_int64 * MAX_SEQ)()
    assert lib.kiln_tokens(session, ids, c.c_size_t(MAX_SEQ), c.byref(count)) == OK and list(ids[: count.value])[: len(PROMPT)] == PROMPT
    assert lib.kiln_earliest(session, c.byref(earliest)) == OK and earliest.value == count.value - 1
    refused(lib, lib.kiln_rewind(session, c.c_int64(5)), FAILED, "rewind to 5", f"before position {earliest.value}")
    assert lib.kiln_rewind(session, c.c_int64(0)) == OK and prefill(lib, session, PROMPT[:3])[0] == OK
    refused(lib, lib.kiln_restore(session, snapshot), FAILED, "has overwritten")
    assert lib.kiln_restore(session, whole) == OK and generate(lib, session, 5) == right
    refused(lib, lib.kiln_snapshot_take(session, 4, c.byref(snapshot)), MISUSED, "flags is 4")
    refused(lib, lib.kiln_snapshot_take(session, 0, None), MISUSED, "snapshot is NULL")
    refused(lib, lib.kiln_restore(session, session), MISUSED, "not a kiln_snapshot")
    refused(lib, lib.kiln_restore(snapshot, whole), MISUSED, "not a kiln_session")
    refused(lib, lib.kiln_session_load(session, None), MISUSED, "path is NULL")
    refused(lib, lib.kiln_session_load(session, str(tmp_path).encode()), FAILED, "not a regular file")
    assert lib.kiln_session_free(session) == lib.kiln_session_free(other) == lib.kiln_model_free(model) == OK
    assert lib.kiln_snapshot_free(snapshot) == lib.kiln_snapshot_free(whole) == OK
    refused(lib, lib.kiln_snapshot_describe(whole, c.byref(info)), MISUSED, "not a kiln_snapshot, or one that was freed")


def test_a_callback_that_uses_its_session(lib, toy, device) -> None:
    """A second call meanwhile is refused and changes nothing; freed meanwhile, the session lives until its call ends."""
    model = load(lib, toy, device)
    solo, session = opened(lib, model), opened(lib, model)
    assert prefill(lib, solo, PROMPT)[0] == prefill(lib, session, PROMPT)[0] == OK
    expected, position, found = generate(lib, solo, 4), c.c_int64(), []

    def meddle(token: int) -> bool:
        found.append((prefill(lib, session, PROMPT)[0], b"in use" in lib.kiln_error(), lib.kiln_position(session, c.byref(position))))
        if len(found) == 4:
            found.append(lib.kiln_session_free(session))
        return True

    assert generate(lib, session, 4, more=meddle) == expected
    assert found == [(FAILED, True, OK)] * 4 + [OK]
    refused(lib, lib.kiln_position(session, c.byref(position)), MISUSED, "freed")
    assert lib.kiln_session_free(solo) == OK and lib.kiln_model_free(model) == OK


def test_handles_from_many_threads(lib, toy, device) -> None:
    """Sessions are made, used and freed by threads that share a model, which one of them frees."""
    model, results = load(lib, toy, device), []
    alone = opened(lib, model)
    assert prefill(lib, alone, PROMPT)[0] == OK
    expected = generate(lib, alone, 6)

    def live() -> None:
        for _ in range(5):
            session = opened(lib, model)
            assert prefill(lib, session, PROMPT)[0] == OK
            results.append(generate(lib, session, 6))
            assert lib.kiln_session_free(session) == OK

    threads = [threading.Thread(target=live) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 20
    assert lib.kiln_model_free(model) == OK and generate(lib, alone, 2)[0] == OK and lib.kiln_session_free(alone) == OK


@pytest.mark.builds
@pytest.mark.parametrize("language", ["c", "c++", "cmake", "rust"])
def test_the_examples(language: str, artifacts, tmp_path) -> None:
    """play.c as C99 without a warning, as README says, and through CMake's find_package; play.rs where there is a Rust compiler."""
    package, program = library_path().parents[1], tmp_path / "play"
    if language == "rust":
        if not (rustc := shutil.which("rustc")):
            pytest.skip("no rustc")
        rpath = f"link-arg=-Wl,-rpath,{package / 'lib'}"
        command = [rustc, "-D", "warnings", "-L", package / "lib", "-C", rpath, ROOT / "examples/play.rs"]
    elif language == "cmake":
        (tmp_path / "CMakeLists.txt").write_text(f"""cmake_minimum_required(VERSION 3.24)
project(play LANGUAGES C)
find_package(kiln 0.1 REQUIRED)
add_executable(play "{ROOT}/examples/play.c")
target_link_libraries(play kiln::kiln)
""")
        given = ["-G", "Ninja", f"-Dkiln_DIR={package}/lib/cmake/kiln", f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={tmp_path}"]
        subprocess.run(["cmake", "-S", tmp_path, "-B", tmp_path / "b", *given], check=True, capture_output=True)
        command = ["cmake", "--build", tmp_path / "b"]
    elif language == "c++":
        check = "kiln_set_threads(-1) != KILN_MISUSED || !*kiln_error()"
        (tmp_path / "use.cpp").write_text(f"#include <kiln.h>\nint main() {{ return {check}; }}\n")
        command = ["c++", "-pedantic", "-Wall", "-Wextra", "-Werror", "-I", package / "include", tmp_path / "use.cpp"]
    else:
        command = ["cc", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-I", package / "include", ROOT / "examples/play.c"]
    if language.startswith("c") and language != "cmake":
        command += [f"-L{package}/lib", "-lkiln", f"-Wl,-rpath,{package}/lib", "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not done.returncode and not done.stderr, done.stderr + done.stdout
    if language == "c++":
        assert subprocess.run([program]).returncode == 0
        return
    prompt = "Hello world, ä"
    model = kiln.Model(str(artifacts["plain"]), device="cpu")
    ids = model.encode_prompt(prompt)
    session = kiln.Session(model)
    session.prefill(ids)
    tokens, _ = session.generate(8)
    played = subprocess.run([program, artifacts["plain"], prompt, "8"], capture_output=True, text=True, errors="replace")
    assert played.returncode == 0, played.stderr
    stream, text = kiln.StreamDecoder(model.tokenizer), ""
    for token in tokens:
        text += stream.push(token)
    assert played.stdout == text + stream.finish() and f"{len(tokens)} tokens" in played.stderr
    assert language == "rust" or f"the prompt was: {model.tokenizer.decode(ids)}\n" in played.stderr
    nothing = subprocess.run([program, tmp_path / "none", prompt, "8"], capture_output=True, text=True)
    assert nothing.returncode == 1 and nothing.stderr.startswith("play: error: ") and nothing.stderr.count("\n") == 1


def test_encode_and_decode(lib, artifacts) -> None:
    """Each encoding as the module has it; sizes are asked for, and too little room is told with the size and writes nothing."""
    path = artifacts["plain"]
    theirs, model = kiln.Model(str(path), device="cpu"), load(lib, path, "cpu")
    text = "2 + 2 <turn|> ä\u7aaf \U0001f525"
    raw = text.encode()
    for how, expected in enumerate(
        (
            theirs.encode_prompt(text),
            theirs.encode_prompt(text, raw=True),
            theirs.tokenizer.encode(text, add_bos=False),
            theirs.tokenizer.encode(text, parse_special=True),
        )
    ):
        count, size, what = c.c_size_t(), len(expected), (model, raw, c.c_size_t(len(raw)), how)
        assert lib.kiln_encode(*what, None, c.c_size_t(0), c.byref(count)) == OK and count.value == size
        ids = (c.c_int64 * size)(*[-7] * size)
        refused(lib, lib.kiln_encode(*what, ids, c.c_size_t(size - 1), c.byref(count)), FAILED, f"needed are {size}")
        assert set(ids) == {-7} and count.value == size
        assert lib.kiln_encode(*what, ids, c.c_size_t(size), c.byref(count)) == OK
        assert list(ids) == expected
    size, told = c.c_size_t(), theirs.tokenizer.decode(list(ids)).encode()
    assert lib.kiln_decode(model, ids, c.c_size_t(len(ids)), None, c.c_size_t(0), c.byref(size)) == OK and size.value == len(told)
    room = c.create_string_buffer(b"?" * (size.value + 1), size.value + 1)
    refused(lib, lib.kiln_decode(model, ids, c.c_size_t(len(ids)), room, size, c.byref(size)), FAILED, "text has room for")
    assert room.raw == b"?" * len(room)
    assert lib.kiln_decode(model, ids, c.c_size_t(len(ids)), room, c.c_size_t(len(room)), c.byref(size)) == OK and room.raw == told + b"\0"
    yes = c.c_int(-7)
    for token, expected in ((theirs.manifest["tokenizer"]["eog"][0], 1), (theirs.tokenizer.bos, 0)):
        assert lib.kiln_is_eog(model, c.c_int64(token), c.byref(yes)) == OK and yes.value == expected
    assert lib.kiln_model_free(model) == OK
