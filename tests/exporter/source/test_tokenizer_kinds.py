"""Merges over bytes and joins by score: the reference in Python and the runner, against cases and the `tokenizers` library."""

from __future__ import annotations

import json
import random
import time
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import tokenizers
import unicodedata2
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers, pre_tokenizers

import kiln
from kiln.exporter.errors import KilnError
from kiln.exporter.source.chat import read_chat, special_texts
from kiln.exporter.source.renderer import Renderer
from kiln.exporter.source.tokenizer import pre_tokenizers as known
from kiln.exporter.source.tokenizer import read_tokenizer
from kiln.exporter.text import unicode
from kiln.exporter.text.encoder import Encoder, Stream, byte_alphabet
from kiln.exporter.text.pattern import compiled, isolated
from tests.exporter.source.test_tokenizer import FIXTURES, tokenize
from tests.exporter.source.vocabularies import Vocabulary, qwen, small, whole
from tests.tools.cut_vocabulary import random_texts

NAMES = ["gemma3", "smollm", "qwen2", "qwen35"]
SPECIALS = {"gemma3": ["<bos>", "<end_of_turn>", "<strong>", "\t\t", "  ", "</s>"], "smollm": ["<|im_end|>", "<|im_start|>"],
            "qwen2": ["<|im_end|>", "<|im_start|>"], "qwen35": ["<|im_end|>", "<|im_start|>"]}  # fmt: skip

# As the models' own files have them, which is where the library is right.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUBLISHED = {
    "qwen2": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen35": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def oracle(metadata) -> HFTokenizer:
    """The library's tokenizer of a GGUF file's tokens, and its merges or scores; nothing of ours has part in it."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {text: i for i, text in enumerate(tokens)}
    if metadata["tokenizer.ggml.model"] == "gpt2":
        pre, level = metadata["tokenizer.ggml.pre"], pre_tokenizers.ByteLevel
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        made = HFTokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
        if pre in PUBLISHED:
            steps = [pre_tokenizers.Split(tokenizers.Regex(PUBLISHED[pre]), "isolated"), level(add_prefix_space=False, use_regex=False)]
        else:
            steps = [*[pre_tokenizers.Digits(individual_digits=True)] * (pre == "smollm"), level(add_prefix_space=False)]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
        made.decoder = tokenizers.decoders.ByteLevel()
    else:
        scores = metadata["tokenizer.ggml.scores"]
        ordinary = sorted((-scores[i], text) for i, text in enumerate(tokens) if types[i] == 1)
        texts = {text for _, text in ordinary}
        merges = [(text[:at], text[at:]) for _, text in ordinary for at in range(1, len(text)) if text[:at] in texts and text[at:] in texts]
        made = HFTokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        made.normalizer = normalizers.Replace(" ", "\u2581")
        made.decoder = tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        )
    added = [tokenizers.AddedToken(text, special=types[i] == 3, normalized=False) for text, i in vocab.items() if types[i] in (3, 4)]
    made.add_special_tokens([token for token in added if token.special])
    made.add_tokens([token for token in added if not token.special])
    return made


class Both:
    """A vocabulary, and its tokenizers here and in the runner."""

    def __init__(self, name: str, vocabulary: Vocabulary, folder: Path):
        self.name, self.vocabulary, self.path = name, vocabulary, folder / f"{name}.json"
        self.tokenizer = read_tokenizer(vocabulary.metadata)
        self.tokenizer.write(self.path)
        self.python, self.cpp = Encoder.load(self.path), kiln.Tokenizer(str(self.path))

    def encode(self, text, **how) -> list[int]:
        ids = self.python.encode(text, **how)
        assert self.cpp.encode(text, **how) == ids, text
        return ids

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        text = self.python.decode(ids, skip_special)
        assert self.cpp.decode(ids, skip_special) == text
        for stream in (Stream(self.python, skip_special), kiln.StreamDecoder(self.cpp, skip_special)):
            assert "".join([*map(stream.push, ids), stream.finish()]) == text
        return text


@cache
def made(name: str, folder: Path) -> Both:
    return Both(name, whole(name.removesuffix("-whole"), folder) if name.endswith("-whole") else small(name), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yield tmp_path_factory.mktemp("kinds")
    made.cache_clear()


@pytest.fixture(params=[*NAMES, "gemma3-whole", "smollm-whole"])
def both(request, folder):
    return made(request.param, folder)


def test_every_case(both):
    cases = both.vocabulary.cases
    assert len(cases) == {"qwen2": 46, "qwen35": 50}.get(both.name, 215)
    first = both.tokenizer.first
    for case in cases:
        front = [first] if case.special and first is not None else []
        assert front + both.encode(case.text, parse_special=case.parse, add_bos=False) == case.ids, case.text
        if not isinstance(case.text, bytes) and not both.tokenizer.lacking:
            assert both.decode(case.ids[len(front) :], False) == case.text.replace("\u2581", " " if both.python.scored else "\u2581")
    for parse in (False, True):  # through kiln-run
        asked = [c for c in cases if c.parse == parse and not isinstance(c.text, bytes) and "\0" not in c.text]
        got = tokenize(both.path, [c.text for c in asked], *["--parse-special"] * parse) if asked else []
        assert [([first] if c.special and first is not None else []) + ids for c, ids in zip(asked, got, strict=True)] == [
            c.ids for c in asked
        ]


def test_equals_tokenizers_on_random_strings(both):
    theirs, seen = oracle(both.vocabulary.metadata), set()
    name = both.name.removesuffix("-whole")
    for i, text in enumerate(random_texts(SPECIALS[name])):
        theirs.encode_special_tokens = i % 2 == 0
        ids = both.encode(text, parse_special=i % 2 == 1, add_bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert both.decode(ids) == theirs.decode(ids), text
        assert both.decode(ids, False) == theirs.decode(ids, skip_special_tokens=False), text
        seen.update(ids)
    assert len(seen) > 300


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["qwen2", "qwen35"])
def test_whole_vocabularies_of_qwen(name, folder):
    vocabulary, tiktoken = qwen(name)
    both, theirs = Both(f"{name}-whole", vocabulary, folder), oracle(vocabulary.metadata)
    for text in random_texts(SPECIALS[name]):
        ids = both.encode(text, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False).ids == tiktoken.encode(text, allowed_special="all"), text
    if name == "qwen2":  # the ids of llama.cpp's cases for 3.5 are those of this vocabulary, too
        assert all(both.encode(case.text) == case.ids for case in vocabulary.cases)
    for line in ("a" * 100_000, "the quick brown fox " * 5_000, "\u0e44\u0e21\u0e48" * 33_000):
        start = time.process_time()
        ids = both.cpp.encode(line)
        between = time.process_time()
        assert both.python.encode(line) == ids
        assert between - start < 1.0 and time.process_time() - between < 1.0


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2", "qwen35"])
def test_every_pre_tokenizer(pre, folder):
    """Over one vocabulary, which has what their cuts need for these texts, and runs of digits, which Qwen's own has not."""
    metadata = small("qwen2").metadata | {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    for left, right in (("1", "2"), ("3", "4"), ("12", "3"), ("12", "34"), ("\u0120", "12")):
        for key, value in (("tokens", left + right), ("token_type", 1), ("merges", f"{left} {right}")):
            metadata[f"tokenizer.ggml.{key}"] = [*metadata[f"tokenizer.ggml.{key}"], value]
    both = Both(f"pre-{pre}", Vocabulary(metadata, None, {}), folder)
    theirs = oracle(metadata)
    for text in [*random_texts(SPECIALS["qwen2"]), "12345 12 1234x123"]:
        ids = both.encode(text, parse_special=True)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
    assert HFTokenizer.from_file(str(both.path)).encode(text, add_special_tokens=False).ids == ids  # the file is the library's, too


@pytest.mark.parametrize(("name", "pre"), [("qwen35", "qwen2"), ("qwen2", "qwen35"), ("smollm", "gpt-2"), ("smollm", "qwen2")])
def test_pre_tokenizers_are_told_apart(name, pre, folder):
    """By the cases or by random strings: what the tests above demand of one, another does not do."""
    right, texts = made(name, folder), random_texts(SPECIALS[name])
    wrong = Both(f"{name}-as-{pre}", Vocabulary(right.vocabulary.metadata | {"tokenizer.ggml.pre": pre}, None, {}), folder)
    cases = [c for c in right.vocabulary.cases if wrong.encode(c.text, parse_special=c.parse, add_bos=False) != c.ids]
    assert cases or sum(wrong.encode(text) != right.encode(text) for text in texts) > 20


def test_broken_utf8(both):
    rng = random.Random(3)
    for text in random_texts(SPECIALS[both.name.removesuffix("-whole")])[:100]:
        raw = bytearray(text.encode())
        for _ in range(3):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        ids = both.encode(bytes(raw), parse_special=True, add_bos=False)
        assert [both.cpp.piece(i) for i in ids] == [both.python.piece(i) for i in ids]
        if both.python.scored:  # every byte comes back
            assert b"".join(both.cpp.piece(i, False) for i in ids) == bytes(raw).replace("\u2581".encode(), b" ")


def test_text_of_a_user_never_becomes_a_control_token(both):
    control = [i for i in range(len(both.python)) if both.tokenizer.is_control(i)]
    for i in control[:: max(1, len(control) // 200)]:
        text = both.tokenizer.tokens[i]
        plain = both.encode(f"a{text}b", add_bos=False)
        assert not set(control) & set(plain) and both.decode(plain) == f"a{text}b"
        assert both.encode(f"a{text}b", parse_special=True, add_bos=False).count(i) == 1


@pytest.mark.flaky(reruns=2)  # a second, on a machine that does other things
@pytest.mark.parametrize("name", ["gemma3", "smollm", "gemma3-whole", "smollm-whole"])
def test_a_long_line_is_fast(name, folder):
    both = made(name, folder)
    rng = random.Random(1)
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz     ,.", k=100_000))
    for line in (letters, "a" * 100_000, " " * 100_000, "<" * 100_000, "1" * 100_000, " \u00a0" * 50_000 + "x"):
        for parse in (False, True):
            for tokenizer in (both.cpp, both.python):
                start = time.process_time()
                ids = tokenizer.encode(line, parse_special=parse, add_bos=False)
                assert time.process_time() - start < 1.0
                assert tokenizer.decode(ids) == line


def test_streams_hold_back_what_is_not_complete(both):
    ids = both.encode("🦙 é", add_bos=False)
    stream, parts = kiln.StreamDecoder(both.cpp), []
    parts = [stream.push(i) for i in ids]
    assert "\ufffd" not in "".join(parts) and "".join(parts) == "🦙 é" == both.decode(ids)


def test_what_the_files_say(folder):
    gemma, smol, qwen = (made(name, folder).tokenizer for name in ("gemma3", "smollm", "qwen2"))
    assert gemma.record() == {"bos": 2, "eog": [106, 1]} and smol.record() == {"bos": None, "eog": [0, 2]}
    assert (smol.bos, smol.eos, smol.text(smol.eos)) == (1, 2, "<|im_end|>")
    assert [qwen.text(i) for i in qwen.ends] == ["<|endoftext|>", "<|im_end|>"] and qwen.first is None
    assert smol.lacking == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)] and not qwen.lacking
    with_bos = small("qwen2").metadata | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    both = Both("ends", Vocabulary(with_bos, None, {}), folder)
    eos = qwen.eos
    assert both.tokenizer.record()["bos"] == qwen.bos and both.encode("a") == [qwen.bos, *both.encode("a", add_bos=False)]
    assert both.encode("a", add_eos=True) == [*both.encode("a"), eos] and both.encode("<|endoftext|>", parse_special=True) == [qwen.bos]
    assert read_tokenizer(small("qwen2").metadata | {"tokenizer.ggml.pre": "llama3"}).first == qwen.bos  # where the file does not say


def scored(**keys) -> Vocabulary:
    """A small vocabulary by score: ids 3 to 258 are bytes, then the texts below, of which "n\u00e9" has a part that is no token."""
    scores = {
        "\u2581": -9.0,
        "a": -9.0,
        "b": -9.0,
        "n": -9.0,
        "ab": -1.0,
        "ba": -1.0,
        "\u2581a": -2.0,
        "aba": -3.0,
        "n\u00e9": -4.0,
        "\n": 0.0,
    }
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *scores]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(scores) - 1), 4]
    metadata = {"model": "llama", "tokens": tokens, "token_type": types, "scores": [0.0] * 259 + list(scores.values()), "bos_token_id": 1,
                "eos_token_id": 2, "unknown_token_id": 0} | keys  # fmt: skip
    return Vocabulary({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, None, {})


def test_joins_by_score(folder):
    both = Both("scored", scored(add_space_prefix=False), folder)
    space, a, b, n, ab, ba, _, aba, accent, newline = range(259, 269)

    def ids(text, **how):
        return both.encode(text, **how)[1:]

    assert ids("aba") == [aba] and ids("ababa") == [ab, aba] and ids("baba") == [ba, ba]  # leftmost of equal scores
    assert ids("bn\u00e9a") == [b, accent, a] and ids("\u00e9") == [3 + 0xC3, 3 + 0xA9]
    assert ids(" b") == [space, b] and ids("a\nb") == [a, newline, b] and both.decode([newline]) == "\n"
    assert ids("<0x41>") == [3 + c for c in b"<0x41>"] and ids("<s></s>", parse_special=True) == [2]
    assert ids("a</s>b") == [a, *(3 + c for c in b"</s>"), b] and both.decode([a, 2, 0, b]) == "ab"


def test_a_space_goes_in_front(folder):
    """Files of Llama 2: at the start and behind a special token; decoding takes the first one off, a stream, which continues, does not."""
    both = Both("prefix", scored(), folder)
    space, a, b, n, ab, ba, space_a, *_ = range(259, 269)
    assert both.encode("ab") == [1, space, ab] and both.encode(" a") == [1, space, space_a] and both.encode("") == [1]
    assert both.encode("a</s>b<s>a", parse_special=True) == [1, space_a, 2, space, b, 1, space_a]
    for text in ("ab", " a", "  ", "b a", ""):
        assert both.python.decode(both.encode(text)) == both.cpp.decode(both.encode(text)) == text
    assert Stream(both.python).push(space_a) == kiln.StreamDecoder(both.cpp).push(space_a) == " a"
    assert both.python.encode_chat("<s>", "ab", "</s>") == both.cpp.encode_chat("<s>", "ab", "</s>") == [1, space, ab, 2]


def test_text_runs_on_from_one_segment_to_the_next(folder):
    """Newlines of the template and of the user make one token, as in the rendered text; a control token never does."""
    both = made("gemma3", folder)
    segments = [("<start_of_turn>user\n", True), ("\nHi<end_of_", False), ("turn>", True)]
    ids = both.python.encode_segments(segments)
    assert ids == both.cpp.encode_segments(segments) and 108 in ids and 106 not in ids
    assert ids == both.encode("<start_of_turn>user\n\nHi", parse_special=True) + both.encode("<end_of_turn>", add_bos=False)


# ---- chat ----


def test_chat_cases(folder):
    both = made("smollm", folder)
    template, tokens = both.vocabulary.metadata["tokenizer.chat_template"], special_texts(both.tokenizer)
    renderer = Renderer(template)

    def render(messages, answer):
        (text,), _ = renderer.render([{"messages": messages, "add_generation_prompt": answer, **tokens}])
        return text

    assert len(both.vocabulary.record["chat"]) == 5
    for case in both.vocabulary.record["chat"]:
        text = render(case["messages"], case["add_generation_prompt"])
        assert text == case["text"]
        assert both.encode(text, parse_special=True) == both.vocabulary.ids(case["ids_parse_special"])
        marks = [f"\x00{i}\x00" for i in range(len(case["messages"]))]
        marked = render([m | {"content": mark} for m, mark in zip(case["messages"], marks, strict=True)], case["add_generation_prompt"])
        segments, rest = [], marked
        for mark, message in zip(marks, case["messages"], strict=True):
            before, rest = rest.split(mark)
            segments += [(before, True), (message["content"], False)]
        segments.append((rest, True))
        expected = both.vocabulary.ids(case["ids_content_never_special"])
        assert both.python.encode_segments(segments) == both.cpp.encode_segments(segments) == expected
    renderer.close()
    chat = read_chat(template, both.tokenizer)
    assert not chat.trim and chat.prefix.endswith("<|im_end|>\n<|im_start|>user\n") and chat.suffix == "<|im_end|>\n<|im_start|>assistant\n"
    turn = both.vocabulary.record["chat"][3]
    ids = both.cpp.encode_chat(chat.prefix, turn["messages"][0]["content"], chat.suffix, chat.trim)
    assert ids == both.vocabulary.ids(turn["ids_content_never_special"])
    assert ids == both.python.encode_chat(chat.prefix, turn["messages"][0]["content"], chat.suffix, chat.trim)


def test_chat_of_qwen(folder):
    tokenizer = made("qwen2", folder).tokenizer
    thought = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    for name, trim in (("qwen3", False), ("qwen35", True)):
        chat = read_chat((FIXTURES / "tokenizers" / f"{name}.jinja").read_text(), tokenizer)
        assert (chat.prefix, chat.suffix, chat.trim) == ("<|im_start|>user\n", thought, trim)


# ---- patterns and the table ----


def test_the_table_is_the_librarys():
    """Every code point, by the library's own classes. The runner reads the same table."""
    for name, pattern, apart in (("LETTER", r"\p{L}", "1"), ("NUMBER", r"\p{N}", "a"), ("MARK", r"\p{M}", "a"), ("SPACE", r"\s", "a")):
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
        found = {ord(piece) for at in range(0, len(points), 4096)
                 for piece, _ in split.pre_tokenize_str(apart + apart.join(map(chr, points[at : at + 4096])) + apart)
                 if len(piece) == 1 and piece != apart}  # fmt: skip
        assert found == {c for first, last in unicode.table()[name] for c in range(first, last + 1)}, name


def test_the_table_is_generated():
    assert unicodedata2.unidata_version == unicode.VERSION
    assert unicode.generate(unicodedata2) == unicode.TABLE.read_text()
    assert {c for c in unicode.SPACE} == {c for c in range(0x110000) if chr(c).isspace()} - set(range(0x1C, 0x20))
    for c in range(0x110000):  # what the Python at hand has, it has so
        if (mine := unicodedata.category(chr(c))) != "Cn":
            assert mine[0] == unicodedata2.category(chr(c))[0]


def test_patterns_in_the_runner(folder):
    """Each form that a pattern may have, and all that are named, in the runner and here, over a vocabulary in which pieces can be told."""
    rng = random.Random(8)
    texts = ["".join(rng.choices("aAbskSK\u017f\u212a19 \t\n\r-]^.'\u0301\u00e9\u00bd\u2003", k=rng.randrange(1, 40))) for _ in range(120)]
    texts += random_texts([])[:120]
    forms = [[r"[^\s]+"], [r"a{2}|b{1,3}"], [r"(?i:ks|as)|(?:b|\.)|\s\S"], [r"[a-b\]\-^]+(?!\s)"], [r"\p{M}+|[\p{L}\p{N}]{2,3}"],
             [r"a?b*A+"], [r"\t|[\r\n]+|'"], *(table["split"] for table in known().values())]  # fmt: skip
    document = read_tokenizer(small("qwen2").metadata).document()
    document["added_tokens"] = []
    alphabet = byte_alphabet()
    vocab, merges = {c: i for i, c in enumerate(alphabet)}, []  # each pair of bytes that occurs merges, so that a cut between them shows
    for text in texts:
        spelled = [alphabet[b] for b in text.encode()]
        for left, right in zip(spelled, spelled[1:], strict=False):
            if left + right not in vocab:
                vocab[left + right] = len(vocab)
                merges.append([left, right])
    document["model"] |= {"vocab": vocab, "merges": merges, "ignore_merges": False}
    path = folder / "pattern.json"
    for form in forms:
        steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} for pattern in form]
        document["pre_tokenizer"]["pretokenizers"][:-1] = steps
        path.write_text(json.dumps(document))
        cpp, python = kiln.Tokenizer(str(path)), Encoder(document)
        theirs = pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in form])
        cut = 0
        for text in texts:
            assert cpp.encode(text) == python.encode(text), (form, text)
            pieces = isolated([compiled(pattern) for pattern in form], text)
            assert pieces == [piece for piece, _ in theirs.pre_tokenize_str(text)], (form, text)
            cut += len(pieces) > 1
        assert cut > 40, form


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(?:a", "'.' is missing"), ("a)", "cannot stand here"), ("(a)", "has a meaning"), ("\\p{Lu}", "property"), ("\\d", "escape"),
     ("[a", "too early"), ("a*", "match nothing"), ("|a", "match nothing"), ("[b-a]", "range"), ("a{3,2}", "repeat"), ("a{}", "number"),
     ("a?b?c?d?e?f", "too many repeats"), ("(?!ab)c", "one character"), ("\\", "too early"), ("^a", "has a meaning"), ("[\\S]", "escape")],
)  # fmt: skip
def test_patterns_that_are_refused(pattern, message, tmp_path):
    document = read_tokenizer(small("qwen2").metadata).document()
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    with pytest.raises(kiln.Error, match=f"a pattern is not of the kind.*{message}"):
        kiln.Tokenizer(str(path))
    if "nothing" in message:
        with pytest.raises(ValueError, match=message):
            compiled(pattern)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"tokenizer.ggml.pre": "tekken"}, "'gpt2' with tokenizer.ggml.pre 'tekken'; supported: .*'qwen2'"),
        ("qwen2", {"tokenizer.ggml.pre": None}, "'gpt2'; supported"),
        ("qwen2", {"tokenizer.ggml.pre": ["qwen2"]}, "supported"),
        ("qwen2", {"tokenizer.ggml.merges": None}, "no tokenizer.ggml.merges"),
        ("qwen2", {"tokenizer.ggml.add_space_prefix": True}, "add_space_prefix is True"),
        ("qwen2", {"tokenizer.ggml.add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ("qwen2", {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}, "no tokenizer.ggml.bos_token_id"),
        ("qwen2", {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": 0xFFFFFFFF}, "no tokenizer.ggml.eos_token_id"),
        ("gemma3", {"tokenizer.ggml.scores": None}, "no tokenizer.ggml.scores"),
        ("gemma3", {"tokenizer.ggml.scores": [0.0]}, "1 entries"),
        ("gemma3", {"tokenizer.ggml.scores": [float("nan")] * 262144}, "no finite number"),
        ("gemma3", {"tokenizer.ggml.scores": ["x"] * 262144}, "no finite number"),
        ("gemma3", {"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
    ],
)  # fmt: skip
def test_files_that_are_refused(name, change, message):
    metadata = {key: value for key, value in (small(name).metadata | change).items() if value is not None}
    with pytest.raises(KilnError, match=message) as error:
        read_tokenizer(metadata)
    if "tekken" in message:  # what would work is named
        assert all(repr(pre) in str(error.value) for pre in known())


def test_files_that_the_runner_refuses(folder, tmp_path):
    path = tmp_path / "t.json"

    def broken(document, **change) -> str:
        path.write_text(json.dumps(document | change))
        with pytest.raises(kiln.Error) as error:
            kiln.Tokenizer(str(path))
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
        return str(error.value)

    qwen = json.loads(made("qwen2", folder).path.read_text())
    split = qwen["pre_tokenizer"]["pretokenizers"]
    assert "over bytes is not supported" in broken(qwen, normalizer={"type": "NFC"})
    assert "not a Sequence" in broken(qwen, pre_tokenizer=split[0])
    assert "not ByteLevel" in broken(qwen, pre_tokenizer={"type": "Sequence", "pretokenizers": split[:1]})
    assert "not ByteLevel" in broken(qwen, pre_tokenizer={"type": "Sequence", "pretokenizers": [split[0], split[1] | {"use_regex": True}]})
    assert "inverted" in broken(qwen, pre_tokenizer={"type": "Sequence", "pretokenizers": [split[0] | {"invert": True}, split[1]]})
    assert "behavior" in broken(qwen, pre_tokenizer={"type": "Sequence", "pretokenizers": [split[0] | {"behavior": "Removed"}, split[1]]})
    gemma = json.loads(made("gemma3", folder).path.read_text())
    vocab = {text: i for text, i in gemma["model"]["vocab"].items() if i < 600}
    gemma |= {"added_tokens": [token for token in gemma["added_tokens"] if token["id"] < 600]}
    gemma["model"] |= {"vocab": vocab, "ranks": gemma["model"]["ranks"][:600]}
    path.write_text(json.dumps(gemma))
    assert len(kiln.Tokenizer(str(path))) == 600
    for ranks, message in (([0], "1 entries"), ([-1] * 600, "rank -1"), ([1 << 40] * 600, "the rank")):
        assert message in broken(gemma, model=gemma["model"] | {"ranks": ranks})
    assert "no pre-tokenizer" in broken(gemma, pre_tokenizer=split[0])
    assert "Prepend" in broken(gemma, normalizer={"type": "Sequence", "normalizers": [gemma["normalizer"]]})
    with pytest.raises(Exception, match="ModelUntagged|model"):  # the library does not read it as something else
        HFTokenizer.from_file(str(made("gemma3", folder).path))
