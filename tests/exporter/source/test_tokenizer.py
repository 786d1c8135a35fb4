"""The tokenizer against llama.cpp's cases and the `tokenizers` library, through kiln-run and the Python module."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HFTokenizer

import kiln
from kiln.exporter.errors import KilnError
from kiln.exporter.measure.runner import runner
from kiln.exporter.source.chat import read_chat, render_chat, template_text
from kiln.exporter.source.gguf import open_gguf
from kiln.exporter.source.tokenizer import read_tokenizer

FIXTURES = Path(__file__).parents[2] / "fixtures"
KILN_RUN = Path(runner())
TWO_PLUS_TWO = [2, 105, 2364, 107, 3689, 563, 236743, 236778, 236862, 236778, 236881, 106, 107, 105, 4368, 107, 100, 45518, 107, 101]


def write_tokenizer(metadata, path):
    """tokenizer.json, and what the manifest says of it."""
    tokenizer = read_tokenizer(metadata)
    tokenizer.write(path)
    return tokenizer.record()


@pytest.fixture(scope="module")
def vocab():
    return open_gguf(FIXTURES / "gemma4-vocab.gguf")


@pytest.fixture(scope="module")
def written(vocab, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    assert write_tokenizer(vocab.metadata, path) == {"bos": 2, "eog": [1, 106, 50]}
    return path


@pytest.fixture(scope="module")
def ours(written):
    return kiln.Tokenizer(str(written))


@pytest.fixture(scope="module")
def theirs(written):
    return HFTokenizer.from_file(str(written))


@pytest.fixture(scope="module")
def cases():
    """[(text, ids)] as llama.cpp's test-tokenizer reads them."""
    texts = (FIXTURES / "gemma4-vocab.cases.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (FIXTURES / "gemma4-vocab.cases.out").read_text().splitlines()
    assert len(texts) == len(lines) == 46
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


def tokenize(path: Path, texts: list[str], *options: str) -> list[list[int]]:
    run = subprocess.run([KILN_RUN, path, "--tokenize-stdin", *options], input="\0".join(texts).encode(), capture_output=True, check=True)
    return [[int(i) for i in line.split()] for line in run.stdout.decode().splitlines()]


def test_llama_cpp_cases(cases, ours, theirs, written):
    assert tokenize(written, [text for text, _ in cases]) == [ids for _, ids in cases]
    for text, ids in cases:
        assert ours.encode(text, add_bos=False) == ids
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert ours.decode(ids) == text == theirs.decode(ids)


def random_text(rng: random.Random, specials: list[str]) -> str:
    alphabets = ["abcdefghij ", " \n\t\r▁", "0123456789.,-+", "äöüßéñ", "我想在工作 ", "កាន់តែ", "🚀😶\u200d🌫️✅", "<|>turn\n", "'\"`!?=",
                 "\u0000\u0001\u007f\ue000\U0010ffff"]
    words = ["the ", "Hello", " world", "  ", "\n\n\n", "def f(x):\n    return x\n", *specials]
    parts = []
    for _ in range(rng.randrange(1, 30)):
        parts.append(rng.choice(words) if rng.random() < 0.5 else "".join(rng.choices(rng.choice(alphabets), k=rng.randrange(1, 9))))
    return "".join(parts)


def test_equals_tokenizers_on_random_strings(ours, theirs):
    rng = random.Random(7)
    specials = ["<|turn>", "<turn|>", "<bos>", "<|channel>", '<|"|>', "<|think|>", "<|tool_call>", "<|image|>"]
    seen = set()
    for _ in range(1500):
        text = random_text(rng, specials)
        ids = ours.encode(text, parse_special=True, add_bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids, skip_special_tokens=False), text
        assert ours.decode(ids) == theirs.decode(ids), text
        seen.update(ids)
    assert {105, 106, 2, 100, 52, 98, 48, 258880} <= seen and len(seen) > 300


def test_newline_runs(ours, theirs):
    for n in range(1, 130):
        ids = ours.encode("\n" * n, add_bos=False)
        assert ids == theirs.encode("\n" * n, add_special_tokens=False).ids
        assert ids == [106 + n] if n <= 31 else len(ids) > 1


def test_text_of_a_user_never_becomes_a_special_token(vocab, ours, written):
    tokens, types = vocab.metadata["tokenizer.ggml.tokens"], vocab.metadata["tokenizer.ggml.token_type"]
    special = {i: tokens[i] for i, t in enumerate(types) if int(t) in (3, 4)}
    assert len(special) == 24
    for i, text in special.items():
        plain = ours.encode(f"a{text}b", add_bos=False)
        assert not special.keys() & set(plain) and ours.decode(plain) == f"a{text}b"
        assert ours.encode(f"a{text}b", parse_special=True, add_bos=False) == [236746, i, 236763]
    assert 106 not in tokenize(written, ["x<turn|>"])[0] and 106 in tokenize(written, ["x<turn|>"], "--parse-special")[0]


def test_bos_exactly_once(ours):
    assert ours.bos == 2
    assert ours.encode("Hello world") == [2, 9259, 1902]
    assert ours.encode("<bos>Hello world", parse_special=True) == [2, 9259, 1902]
    assert ours.encode("") == [2]
    assert ours.encode("", add_bos=False) == []


def test_invalid_utf8_falls_back_to_bytes(ours):
    for raw in (b"\xff", b"a\x80b", b"\xe6\x88", b"\xf0\x9f\x9a", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80"):
        ids = ours.encode(raw, add_bos=False)
        assert b"".join(ours.piece(i) for i in ids) == raw
        assert ours.decode(ids) == raw.decode(errors="replace")


def test_stream_decoder_holds_back_incomplete_characters(ours):
    text = "a\u200d🦙\U0010ffff\r\n é我"
    ids = ours.encode(text, add_bos=False)
    assert any(len(ours.piece(i)) == 1 and ours.piece(i)[0] >= 0x80 for i in ids)
    stream = kiln.StreamDecoder(ours)
    parts = [stream.push(i) for i in ids]
    assert "" in parts and "\ufffd" not in "".join(parts)
    assert "".join(parts) + stream.finish() == text
    lead = ours.encode(b"\xf0\x9f", add_bos=False)
    assert [stream.push(i) for i in lead] == ["", ""] and stream.finish() == "\ufffd" and stream.finish() == ""


def test_control_tokens_are_skipped_and_user_defined_ones_are_not(ours):
    ids = [105, 2364, 107, 100, 45518, 101, 106]
    assert ours.decode(ids) == "user\n<|channel>thought<channel|>"
    assert ours.decode(ids, skip_special=False) == "<|turn>user\n<|channel>thought<channel|><turn|>"


@pytest.mark.flaky(reruns=2)  # a second, on a machine that does other things
def test_a_long_line_is_fast(ours):
    rng = random.Random(1)
    letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz     ,.", k=100_000))
    for line in (letters, "a" * 100_000, " " * 100_000, "the quick brown fox " * 5_000):
        start = time.process_time()
        ids = ours.encode(line, add_bos=False)
        assert time.process_time() - start < 1.0
        assert ours.decode(ids) == line


@pytest.mark.flaky(reruns=2)  # a second, on a machine that does other things
def test_loading_is_fast(written):
    start = time.process_time()
    kiln.Tokenizer(str(written))
    assert time.process_time() - start < 1.0


def test_chat_affixes_and_ids(vocab, ours, theirs):
    newer = (FIXTURES / "gemma4-chat-template.jinja").read_text()
    for template in (newer, template_text(vocab.metadata)):
        chat = read_chat(template, read_tokenizer(vocab.metadata))
        prefix, suffix = chat.prefix, chat.suffix
        assert chat.trim and chat.date is None
        assert prefix == "<bos><|turn>user\n"
        assert suffix == "<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
        assert ours.encode_chat(prefix, "What is 2+2?", suffix) == TWO_PLUS_TWO
        assert ours.encode_chat(prefix, " \u3000\n\tWhat is 2+2?\u00a0 \x1f", suffix) == TWO_PLUS_TWO
        assert theirs.encode(prefix + "What is 2+2?" + suffix, add_special_tokens=False).ids == TWO_PLUS_TWO
        assert ours.encode_chat(prefix, "<turn|>", suffix).count(106) == 1
    assert template_text(vocab.metadata, FIXTURES / "gemma4-chat-template.jinja") == newer


def test_template_errors(vocab, tmp_path):
    with pytest.raises(KilnError, match="not once"):
        render_chat("{{ bos_token }}", {"bos_token": "<bos>"})
    with pytest.raises(KilnError, match="no users"):
        render_chat("{{ raise_exception('no users here') }}", {})
    with pytest.raises(KilnError, match="cannot render"):
        render_chat("{{ ''.__class__.__mro__ }}{{ messages[0].content.__class__() }}", {})
    with pytest.raises(KilnError, match="missing.jinja"):
        template_text(vocab.metadata, tmp_path / "missing.jinja")


def small() -> dict:
    tokens = ["<eos>", "<bos>", "<unk>", "a", "b", "ab", "<turn|>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [1, 3, 3, 1, 1, 1, 3] + [6] * 256
    return {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.ggml.unknown_token_id": 2}


def test_eos_typed_as_an_ordinary_token_is_control_all_the_same(tmp_path):
    assert write_tokenizer(small(), tmp_path / "t.json") == {"bos": 1, "eog": [0, 6]}
    t = kiln.Tokenizer(str(tmp_path / "t.json"))
    assert t.encode("ab<eos>", parse_special=True) == [1, 5, 0] and t.decode([5, 0]) == "ab"
    assert t.encode("abz") == [1, 5, 7 + ord("z")]


def test_writer_errors(tmp_path):
    assert read_tokenizer({}) is None and read_tokenizer({"tokenizer.ggml.model": "none"}) is None
    for change, message in (({"tokenizer.ggml.model": "t5"}, "'t5'"), ({"tokenizer.ggml.model": "llama"}, "no tokenizer.ggml.scores"),
                            ({"tokenizer.ggml.merges": ["a z"]}, "'a' \\+ 'z'"),
                            ({"tokenizer.ggml.token_type": [1]}, "1 entries"), ({"tokenizer.ggml.bos_token_id": 999}, "999"),
                            ({"tokenizer.ggml.tokens": ["a"] * 263}, "'a' \\+ 'b'")):
        with pytest.raises(KilnError, match=message):
            write_tokenizer(small() | change, tmp_path / "t.json")


def test_reader_errors(tmp_path):
    path = tmp_path / "t.json"
    write_tokenizer(small(), path)
    document = json.loads(path.read_text())

    def broken(**change) -> str:
        path.write_text(json.dumps(document | change))
        with pytest.raises(kiln.Error) as error:
            kiln.Tokenizer(str(path))
        assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
        return str(error.value)

    assert "reads BPE and ScoredBPE" in broken(model=document["model"] | {"type": "Unigram"})
    assert "normalizer" in broken(normalizer=None)
    assert "missing key 'vocab'" in broken(model={k: v for k, v in document["model"].items() if k != "vocab"})
    assert "merge 1" in broken(model=document["model"] | {"merges": [["a", "b"], ["b", "z"]]})
    for text, message in (("{", "expected a key at line 1, column 2"), ('{"a":\n 01}', "leading zero at line 2, column 4"),
                          ('{"a" 1}', "expected ':'"), ('"\\ud800"', "surrogate"), ("[1] 2", "more text"), ("[" * 100, "too deeply")):
        path.write_text(text)
        with pytest.raises(kiln.Error, match=f"not valid JSON: .*{message}"):
            kiln.Tokenizer(str(path))
    with pytest.raises(kiln.Error, match="cannot open"):
        kiln.Tokenizer(str(tmp_path / "missing.json"))


# ---- what public files do ----


def test_texts_of_several_tokens(tmp_path):
    """Every id keeps its text for decoding, the lowest serves encoding, and merges whose result is such a text work."""
    md = small()
    extra = ["ab", "b", "<0x41>", "\u2581", "\u2581", "<turn|>", "<turn|>x"]  # 263 ..: a merge's result, a part of it, a byte, a space
    md["tokenizer.ggml.tokens"] = md["tokenizer.ggml.tokens"] + extra
    md["tokenizer.ggml.token_type"] = md["tokenizer.ggml.token_type"] + [1, 1, 6, 1, 1, 3, 1]
    assert write_tokenizer(md, tmp_path / "t.json") == {"bos": 1, "eog": [0, 6, 268]}
    ours, theirs = kiln.Tokenizer(str(tmp_path / "t.json")), HFTokenizer.from_file(str(tmp_path / "t.json"))
    assert ours.encode("ab b A", add_bos=False) == [5, 266, 4, 266, 7 + ord("A")] == theirs.encode("ab b A", add_special_tokens=False).ids
    assert [ours.decode([i]) for i in range(263, 270)] == ["ab", "b", "A", " ", " ", "", "<turn|>x"]
    assert ours.decode([268], skip_special=False) == "<turn|>"
    assert ours.encode("<turn|>", parse_special=True, add_bos=False) == [6]
    assert 268 not in ours.encode("<turn|>", add_bos=False) and 6 not in ours.encode("<turn|>", add_bos=False)


def test_an_ordinary_token_with_the_text_of_a_special_one(tmp_path):
    """The text is made of the ordinary one, merges included, the markup is the special one."""
    md = small()
    md["tokenizer.ggml.tokens"] = md["tokenizer.ggml.tokens"] + ["ab"]
    md["tokenizer.ggml.token_type"] = [1, 3, 3, 1, 1, 4, 3] + [6] * 256 + [1]  # 5 "ab" user-defined, 263 "ab" ordinary
    write_tokenizer(md, tmp_path / "t.json")
    ours = kiln.Tokenizer(str(tmp_path / "t.json"))
    assert ours.encode("ab", add_bos=False) == [263] and ours.encode("ab", parse_special=True, add_bos=False) == [5]
    assert ours.decode([5]) == ours.decode([263]) == "ab"


def test_an_end_that_is_a_byte(tmp_path):
    record = write_tokenizer(small() | {"tokenizer.ggml.eot_token_id": 7 + 10}, tmp_path / "t.json")
    ours = kiln.Tokenizer(str(tmp_path / "t.json"))
    assert record["eog"] == [0, 6, 17] and ours.encode("\n", add_bos=False) == [17] and ours.decode([17]) == "\n"


def test_the_real_vocabulary_with_three_texts_twice(vocab, cases, ours, tmp_path):
    """Google's QAT files of Gemma 4 name three normal tokens like others."""
    tokens = list(vocab.metadata["tokenizer.ggml.tokens"])
    used = {i for _, ids in cases for i in ids} | {ours.encode("C", add_bos=False)[0]}
    merges = vocab.metadata["tokenizer.ggml.merges"]
    parts = {part for merge in merges for part in (merge.replace(" ", ""), *merge.split(" "))}
    spare = [i for i in range(len(tokens) - 1, 1000, -1) if i not in used and tokens[i] not in parts][:3]
    texts = ["C", tokens[9259], tokens[236743]]  # a character, the result of merges, the space
    for i, text in zip(spare, texts, strict=True):
        tokens[i] = text
    write_tokenizer({key: vocab.metadata[key] for key in vocab.metadata} | {"tokenizer.ggml.tokens": tokens}, tmp_path / "t.json")
    tokenizer = kiln.Tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.size == len(tokens) if hasattr(tokenizer, "size") else True
    for text, ids in cases:
        assert tokenizer.encode(text, add_bos=False) == ids
    assert [tokenizer.decode([i]) for i in spare] == [text.replace("\u2581", " ") for text in texts]


@pytest.mark.parametrize(
    ("change", "eog"),
    [
        ({"tokenizer.ggml.eot_token_id": 3}, [0, 6, 3]),
        ({"tokenizer.ggml.eom_token_id": 4, "tokenizer.ggml.eot_token_id": 3}, [0, 6, 3, 4]),
        ({"tokenizer.ggml.eos_token_ids": [0, 4, 5]}, [0, 6, 4, 5]),
        ({"tokenizer.ggml.eos_token_id": [0, 3]}, [0, 6, 3]),
        ({"tokenizer.ggml.eos_token_ids": 5}, [0, 6, 5]),
        ({"tokenizer.ggml.eos_token_id": 3.0}, [0, 6, 3]),
        ({"tokenizer.ggml.eot_token_id": 0xFFFFFFFF, "tokenizer.ggml.eom_token_id": -1}, [0, 6]),
    ],
)
def test_every_declared_end(tmp_path, change, eog):
    record = write_tokenizer(small() | change, tmp_path / "t.json")
    assert record["eog"] == eog
    t = kiln.Tokenizer(str(tmp_path / "t.json"))
    for i in eog[1:]:  # a declared end is not shown; <eos> is an ordinary token here
        assert t.decode([i]) == "" and t.decode([i], skip_special=False) != ""


@pytest.mark.parametrize("text", ["<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|endoftext|>", "<|eom_id|>", "<|end|>"])
def test_known_end_texts(tmp_path, text):
    md = small()
    for kind, expected in ((3, [0, 6, 263]), (4, [0, 6, 263]), (1, [0, 6])):
        tokens, types = [*md["tokenizer.ggml.tokens"], text], [*md["tokenizer.ggml.token_type"], kind]
        assert read_tokenizer(md | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}).record()["eog"] == expected


def test_an_ordinary_end_of_sequence_text_stops_nothing(vocab):
    tokens = vocab.metadata["tokenizer.ggml.tokens"]
    assert tokens[212] == "</s>" and 212 not in read_tokenizer(vocab.metadata).ends


def test_tokenizers_by_other_names():
    expected = read_tokenizer(small())
    for model, pre in (("llama", "gemma4"), ("gemma4", "gemma4"), ("gemma4", "default"), ("gemma4", "")):
        assert read_tokenizer(small() | {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre}) == expected
    for model, pre in (("llama", "tekken"), ("llama", "llama-bpe"), ("gpt2", "gemma4"), ("gemma4", "qwen2"), (7, "gemma4")):
        with pytest.raises(KilnError, match="tokenizer.ggml.model is .* with tokenizer.ggml.pre"):
            read_tokenizer(small() | {"tokenizer.ggml.model": model, "tokenizer.ggml.pre": pre})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.eos_token_ids": [0, 999]}, "eos_token_ids is 999"),
        ({"tokenizer.ggml.eot_token_id": "x"}, "eot_token_id is x"),
        ({"tokenizer.ggml.bos_token_id": [1, 2]}, "names 2 tokens"),
        ({"tokenizer.ggml.tokens": "abc"}, "a list was expected"),
        ({"tokenizer.ggml.tokens": [1, 2, 3]}, "no list of texts"),
        ({"tokenizer.ggml.tokens": []}, "263 entries, tokenizer.ggml.tokens has 0"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab' is not 'left right'"),
        ({"tokenizer.ggml.token_type": [9] * 263}, "unknown type 9"),
        *(({"tokenizer.ggml.token_type": [odd] * 263}, "unknown type") for odd in (float("nan"), float("inf"), float("-inf"), 1.5)),
        ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(263)], "tokenizer.ggml.merges": []}, "no token for byte 0"),
    ],
)
def test_tokenizers_that_contradict_themselves(change, message):
    with pytest.raises(KilnError, match=message):
        read_tokenizer(small() | change)


def test_bos_by_its_text():
    md = small()
    del md["tokenizer.ggml.bos_token_id"]
    assert read_tokenizer(md).bos == 1
    assert read_tokenizer(md | {"tokenizer.ggml.token_type": [1] * 7 + [6] * 256}).bos is None


def test_user_text_keeps_its_white_space_where_the_template_does(ours):
    ids = ours.encode_chat("<bos>", "  a \n", "<turn|>", trimmed=False)
    assert ours.decode(ids) == "  a \n" and ours.decode(ours.encode_chat("<bos>", "  a \n", "<turn|>")) == "a"
