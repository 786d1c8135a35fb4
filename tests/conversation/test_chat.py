"""A conversation over a real session: what is used again changes nothing, and the commands of `kiln chat` and `kiln run` through a pipe."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

import kiln
from kiln.exporter.conversation.chat import Chat, Options
from kiln.exporter.conversation.parser import Delta
from kiln.exporter.conversation.player import Dialect, Player
from kiln.exporter.conversation.prompt import Prompt, common
from kiln.exporter.conversation.request import RequestError
from kiln.exporter.conversation.terminal import Printer, interruptible, shown
from kiln.exporter.errors import KilnError
from tests.conftest import WAIT, shared

FIGURES = r"prompt \d+ tokens: (\d+) reused, (\d+) evaluated"


@pytest.fixture(scope="module")
def artifact(talking: Path) -> Path:
    return talking


@pytest.fixture(scope="module")
def model(artifact: Path) -> kiln.Model:
    kiln.set_threads(1)  # for a model this small two only wait for each other
    return kiln.Model(str(artifact))


@pytest.fixture(scope="module")
def dialect(artifact: Path, model: kiln.Model):
    found = Dialect(artifact, json.loads((artifact / "manifest.json").read_text()), model.tokenizer)
    yield found
    found.close()


def begin(model: kiln.Model, dialect: Dialect, **options: object) -> Chat:
    return Chat(dialect, Player(kiln.Session(model), model.max_seq_len), Options(**({"temperature": 0.0, "max_new_tokens": 4} | options)))


def read(player: Player, dialect: Dialect, ids: list[int], most: int, **options: object):
    """An answer to plain ids, without end tokens."""
    request = begin_request()
    parser = dialect.parser(Prompt("", tuple(ids), {}), request)
    return player.answer(Prompt("", tuple(ids), {}), parser, most), parser


def begin_request():
    from kiln.exporter.conversation.request import read_request

    return read_request([{"role": "user", "content": "x"}])


def test_reuse_changes_no_bit(model: kiln.Model, dialect: Dialect) -> None:
    """Turns of random lengths, that extend what the caches hold or part from it: each equals a cold session."""
    random, player, ids = Random(3), Player(kiln.Session(model, prefill_chunk=1), model.max_seq_len), [2]
    extended, parted, cold = 0, 0, kiln.Session(model, prefill_chunk=1)
    for turn in range(14):
        if len(ids) > 70 or (turn and random.random() < 0.25):  # an edit: another beginning
            ids = ids[: random.randrange(1, len(ids))]
        ids = ids + [random.randrange(20, 500) for _ in range(random.randrange(1, 6))]
        before = player.held
        figures, parser = read(player, dialect, ids, 3)
        held = player.held
        assert figures.prompt == len(ids) and figures.held == len(before)
        same = common(before, ids)
        if same == len(before) and same < len(ids):
            assert (figures.reused, figures.parted) == (len(before), None)
            extended += 1
        else:
            assert figures.reused <= same < len(ids) + 1 and figures.parted == same
            parted += 1
        assert held[: len(ids)] == ids and len(held) == player.session.position
        logits = player.session.logits()
        cold.reset()
        cold.prefill(held)
        np.testing.assert_array_equal(logits, cold.logits())
        ids = held
    assert extended > 5 and parted > 1


def test_a_conversation_that_extends(model: kiln.Model, dialect: Dialect) -> None:
    """Thinking on, this template's history begins with the prompt: the second turn evaluates only what is new, where ids are canonical."""
    chat = begin(model, dialect)
    assert dialect.template.manner.switch == "enable_thinking"
    deltas: list[Delta] = []
    message = chat.say("a b", deltas.append)
    assert chat.last and chat.last.reused == 0 and [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert "".join(d.text for d in deltas if d.kind == "content") == message.content == chat.messages[1]["content"]
    chat.think = True
    chat.say("c", lambda delta: None)
    assert chat.last.parted is not None and "parted from this prompt" in chat.last.text()
    held, again = chat.player.held, begin(model, dialect)
    again.messages, again.think = chat.messages[:-1], True
    again.answer(lambda delta: None)
    assert again.player.held == held and again.messages == chat.messages  # without any past: the same answer


def talked(model: kiln.Model, dialect: Dialect, count: int, think: bool) -> tuple[int, int]:
    """A conversation whose thoughts are dropped: (ids of all prompts, ids evaluated). Each answer is that of a player without any past."""
    chat, whole, evaluated, cut = begin(model, dialect, max_new_tokens=3), 0, 0, 0
    chat.player.store, chat.think = kiln.SnapshotStore(0, 1 << 26), think
    for i in range(count):
        chat.say("ab c"[: 1 + i % 4], lambda delta: None)
        assert chat.last and chat.last.reused == cut, i
        prompt = dialect.prompt(chat.request(chat.messages[:-1]))
        cut = min(next(at for at, why in prompt.cuts.items() if "turn" in why), len(prompt.ids) - 1)
        assert (len(prompt.ids) - cut == 1) == think  # else the empty thought, which the history lacks, is read again
        whole, evaluated = whole + chat.last.prompt, evaluated + chat.last.prompt - chat.last.reused
        cold = begin(model, dialect, max_new_tokens=3)
        cold.messages, cold.think = chat.messages[:-1], think
        assert cold.answer(lambda delta: None) and cold.messages == chat.messages
        np.testing.assert_array_equal(cold.player.session.logits(), chat.player.session.logits())
        chat.messages[-1]["content"] = "a"  # as where a thought is not returned
    assert chat.last and chat.player.store.counts()["misses"] <= 1
    return whole, evaluated


@pytest.mark.parametrize("think", [False, True])
def test_only_what_is_new_is_read(model: kiln.Model, dialect: Dialect, think: bool) -> None:
    """Rings that have wrapped, and an answer that the history does not have: read again is what lies behind the last prompt's cut."""
    whole, evaluated = talked(model, dialect, 5 if think else 3, think)
    assert evaluated < whole


@pytest.mark.nightly
@pytest.mark.parametrize("think", [False, True])
def test_twenty_turns(artifact: Path, tmp_path_factory: pytest.TempPathFactory, think: bool) -> None:
    def make(path: Path) -> None:
        gguf = Path(__file__).parents[1] / "fixtures" / "gemma4-tiny-dense.gguf"
        options = ("--target", "cpu", "--max-seq-len", 1024, "--prefill-chunk", 128)
        assert command("export", "--gguf", gguf, "--out", path, *options).returncode == 0
        shutil.copy(artifact / "chat_template.jinja", path)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["chat"] = json.loads((artifact / "manifest.json").read_text())["chat"]
        (path / "manifest.json").write_text(json.dumps(manifest))

    path = shared(tmp_path_factory, "artifact-of-20-turns", make)
    long = kiln.Model(str(path))
    dialect = Dialect(path, json.loads((path / "manifest.json").read_text()), long.tokenizer)
    whole, evaluated = talked(long, dialect, 20, think)
    dialect.close()
    assert evaluated < whole / (8 if think else 4)  # not to think is 28 tokens of this vocabulary, at the end of each prompt


def test_saved_with_what_was_computed(model: kiln.Model, dialect: Dialect, artifact: Path, tmp_path: Path) -> None:
    """/save and /load with a folder of sessions: another process would go on without reading the history; without the file it reads it."""
    chat = begin(model, dialect, max_new_tokens=2)
    chat.session_dir, chat.player.store, chat.think = tmp_path / "sessions", kiln.SnapshotStore(0, 1 << 26), True
    for text in ("a b", "c"):
        chat.say(text, lambda delta: None)
    path = tmp_path / "c.json"
    said = chat.command(f"/save {path}", lambda delta: None)
    kept = chat.player.session.position
    assert said and said.endswith(f"4 messages; {kept} tokens need not be evaluated again") and kept > 30
    assert [p.name for p in chat.session_dir.iterdir()] == ["c.json.session"]
    others = [begin(model, dialect, max_new_tokens=2) for _ in range(3)]
    others[0].session_dir = others[1].session_dir = chat.session_dir
    assert others[0].command(f"/load {path}", lambda delta: None) == f"loaded {path}: 4 messages; {kept} tokens need not be evaluated again"
    (file,) = chat.session_dir.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    said = others[1].command(f"/load {path}", lambda delta: None)
    assert said and "it will be evaluated anew: " in said and "cut short" in said and "\n" not in said
    others[2].load(path)
    reused = []
    for each in (chat, *others):
        each.say("a", lambda delta: None)
        assert each.last and each.messages == chat.messages
        reused.append(each.last.reused)
    assert reused == [kept, kept, 0, 0]


def test_commands(model: kiln.Model, dialect: Dialect, tmp_path: Path) -> None:
    chat = begin(model, dialect, temperature=1.0, seed=5)

    def show(delta: Delta) -> None:
        pass

    def do(line: str) -> str:
        said = chat.command(line, show)
        assert said is not None
        return said

    assert do("/speed") == "there is no answer yet" and do("/tokens") == f"no tokens yet, of {model.max_seq_len}"
    assert do("/system be a b") == "system prompt: be a b" and do("/think on") == "thinking is on" and do("/think") == "thinking is off"
    chat.say("a", show)
    first = chat.messages[:]
    assert chat.command("/regenerate", show) is None
    assert len(chat.messages) == 2 and chat.options.seed == 6 and chat.messages[0] == first[0]
    assert "tokens with the next message" in do("/tokens") and "edit" in do("/tokens") and "reused" in do("/speed")
    path = tmp_path / "c.json"
    assert do(f"/save {path}").endswith("2 messages") and not list(tmp_path.glob(".*"))
    kept = chat.messages
    assert do("/new") == "a new conversation" and chat.messages == [] and do("/system off") == "no system prompt"
    assert do(f"/load {path}").endswith("2 messages")
    assert chat.system == "be a b" and not chat.think
    assert [(m["role"], m["content"]) for m in chat.messages] == [(m["role"], m["content"]) for m in kept]
    before = (chat.messages, chat.system)
    bad = {"{": "not valid JSON", "3": "no conversation", '{"kiln_chat": 9, "messages": []}': "format 9",
           '[{"role": "x"}]': "messages\\[0\\].role",
           '{"messages": [], "think": 1}': "think is 1"}  # fmt: skip
    for text, match in bad.items():
        path.write_text(text)
        with pytest.raises(KilnError, match=match):
            do(f"/load {path}")
    for line, match in {"/load": "needs the name", "/load /no/such": "cannot read", "/save /no/such/x": "cannot write",
                        "/x": "/x is no command",
                        "/think maybe": "on or off"}.items():  # fmt: skip
        with pytest.raises(KilnError, match=match):
            do(line)
    assert (chat.messages, chat.system) == before


def test_what_fails_leaves_the_conversation(model: kiln.Model, dialect: Dialect) -> None:
    chat = begin(model, dialect)
    with pytest.raises(KilnError, match="no answer yet"):
        chat.regenerate(lambda delta: None)
    with pytest.raises(KilnError, match=f"the artifact takes {model.max_seq_len}"):
        chat.say("a b c " * 60, lambda delta: None)
    assert chat.messages == []
    chat.messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
    ]
    with pytest.raises(RequestError, match="has no result yet"):
        chat.answer(lambda delta: None)
    chat.messages = []
    shown_first: list[Delta] = []

    def interrupt(delta: Delta) -> None:
        shown_first.append(delta)
        raise KeyboardInterrupt

    chat.options.max_new_tokens = 50
    message = chat.say("a", interrupt)
    assert (
        chat.last and chat.last.stopped == "interrupted" and message.finish == "length" and message.content.startswith(shown_first[0].text)
    )
    assert chat.player.session.position <= chat.last.prompt + chat.last.new
    after = chat.say("b", lambda delta: None)  # and it goes on
    cold = begin(model, dialect, max_new_tokens=50)
    cold.messages = chat.messages[:-1]
    assert cold.answer(lambda delta: None).content == after.content


def test_what_steers_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("a\x1b[2J\x07\x9b\tb\né") == "a\\x1b[2J\\x07\\x9b\tb\né"
    for tty, right in ((True, "\x1b[2mhm\n\x1b[0myes\n"), (False, "[thought]\nhm\n[answer]\nyes\n")):
        printer = Printer(tty)
        for kind, text in (("reasoning", "h"), ("reasoning", "m"), ("content", "ye"), ("content", "s")):
            printer(Delta(kind, text))
        printer.finish()
        assert capsys.readouterr().out.replace("\x1b[0m\n", "\n\x1b[0m") == right


def command(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "exporter", *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=200
    )
    assert "Traceback" not in done.stderr
    return done


def test_input_that_is_no_text(artifact: Path) -> None:
    arguments = [sys.executable, "-m", "exporter", "chat", str(artifact), "--threads", "1"]
    done = subprocess.run(arguments, input=b"a\xff\n/quit\n", capture_output=True, timeout=200)
    assert done.returncode == 0 and done.stderr.decode().startswith("kiln: error: messages[0].content: is no Unicode text"), done.stderr


def test_chat_through_a_pipe(artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    lines = ["a b", "/speed", "c \\", "d", "//x", "/nothing", f"/save {path}", "/quit", "never"]
    done = command("chat", artifact, "--temperature", 0, "--max-new-tokens", 3, "--threads", 1, stdin="\n".join(lines))
    assert done.returncode == 0 and "0 reused" in done.stdout and "saved to" in done.stdout
    assert done.stderr.count("kiln: error: /nothing is no command; /help lists them") == 1
    messages = json.loads(path.read_text())["messages"]
    assert [m["content"] for m in messages if m["role"] == "user"] == ["a b", "c \nd", "/x"]


def test_run(artifact: Path, tmp_path: Path) -> None:
    """One answer, as the conversation gives it; and bad input in one line."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps([{"role": "system", "content": "b"}, {"role": "user", "content": "a b"}]))
    once = command("run", artifact, "--messages", path, "--json", "--max-new-tokens", 3, "--threads", 1)
    record = json.loads(once.stdout)
    assert record["message"]["role"] == "assistant" and record["completion_tokens"] == 3 and record["finish_reason"] == "length"
    same = command("run", artifact, "--prompt", "a b", "--system", "b", "--max-new-tokens", 3, "--threads", 1)
    assert same.stdout.rstrip("\n") == record["message"]["content"].rstrip("\n") and "3 tokens" in same.stderr
    for arguments, code, match in [
        (("--system", "b"), 2, "give one of --prompt"), (("--stop", "x", "--prompt", "a", "--bench"), 2, "No such option"),
        (("--stop", "x", "--prompt", "a", "--top-p", "0"), 2, "--top-p"), (("--messages", tmp_path), 1, "cannot read the conversation"),
        (("--system", "b", "--prompt", "a", "--prompt-file", path), 2, "exclude each other"),
        (("--system", "b", "--prompt-file", tmp_path / "no"), 1, "cannot read the prompt"),
    ]:  # fmt: skip
        done = command("run", artifact, *arguments)
        assert done.returncode == code and match in done.stderr, done.stderr
    assert "--system TEXT" in command("run", "--help").stdout == command("run", "-h").stdout


def test_artifacts_that_cannot_talk(artifacts: dict[str, Path]) -> None:
    done = command("chat", artifacts["plain"])
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "has no chat template" in done.stderr


def test_ctrl_c_stops_the_answer(model: kiln.Model, dialect: Dialect) -> None:
    """A signal in the middle: what was written stays, and what the caches hold is what the next answer counts on."""
    chat = begin(model, dialect, max_new_tokens=60)

    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))

    def slow(delta: Delta) -> None:
        if not timer.is_alive():
            timer.start()
        time.sleep(0.05)

    with interruptible():
        chat.say("a", slow)
        timer.join()
    assert chat.last and chat.last.stopped == "interrupted" and 0 < chat.last.new < 60
    cold = kiln.Session(model)
    cold.prefill(chat.player.held)
    assert cold.position == chat.player.session.position
    assert read(chat.player, dialect, [*chat.player.held, 7], 1)[0].reused == cold.position


def test_a_terminal(artifact: Path) -> None:
    """Ctrl-C at the prompt does not end the program; Ctrl-D does."""
    main, other = pty.openpty()
    arguments = ["chat", artifact, "--temperature", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "exporter", *map(str, arguments)], stdin=other, stdout=other, stderr=other, start_new_session=True
    )
    os.close(other)
    seen = bytearray()

    def follow() -> None:
        try:
            while data := os.read(main, 4096):
                seen.extend(data)
        except OSError:
            pass

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()

    def wait(what: bytes, start: int = 0) -> int:
        """Until it is there; where it ends."""
        until = time.monotonic() + WAIT
        while (at := seen.find(what, start)) < 0:
            assert time.monotonic() < until and process.poll() is None, bytes(seen)
            time.sleep(0.02)
        return at + len(what)

    ready = b"\x1b[?2004h"  # an editor reads keys from here on
    try:
        at = wait(ready)
        process.send_signal(signal.SIGINT)
        at = wait(ready, wait(b"/quit leaves", at))
        os.write(main, b"/help\r")
        wait(ready, wait(b"stops an answer", at))
        os.write(main, b"\x04")
        process.wait(timeout=WAIT)
    finally:
        process.kill()
        process.wait()
        os.close(main)
    assert process.returncode == 0
