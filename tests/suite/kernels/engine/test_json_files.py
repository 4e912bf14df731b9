"""The reader of JSON: what is refused, where, and in which words."""

from __future__ import annotations

import json
import os

import pytest

from deit.kernels.engine import json_files
from deit.kernels.engine.json_files import DEEPEST, Fields

TEXTS = {
    "": "expected JSON; got nothing",
    "{": r"expected JSON; got '{' \(Expecting",
    "\x00": "expected JSON; got",
    '{"a": NaN}': "a: expected a finite number; got nan",
    '{"a": {"b": [1, -Infinity]}}': r"a\.b: expected a finite number; got -inf",
    '{"a": 1e999}': "a: expected a finite number; got inf",
    '{"a": ' + "9" * 5000 + "}": "a: expected a finite number",
    "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1): f"at most {DEEPEST} levels",
    '{"a":' * 100_000 + "1" + "}" * 100_000: f"at most {DEEPEST} levels",
    "[" * 100_000: f"at most {DEEPEST} levels",
    '{"a": 1, "b": 2, "a": 3}': "the key 'a' is there twice",
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_json_of_ours(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"odd\.json: .*{TEXTS[text]}") as caught:
        json_files.read(path)
    assert len(str(caught.value)) < 300


def test_what_json_may_hold(tmp_path):
    path = tmp_path / "good.json"
    value = {"a": [1, -2.5, "é", None, True], "b": {"c": []}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode())
    assert json_files.read(path) == value
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert json_files.parse(deep, "deep") == json.loads(deep)
    assert json_files.parse('{"loss": Infinity}', "log", finite=False) == {"loss": float("inf")}


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b'{"a": "\xff"}'])
def test_what_is_no_utf8(text):
    with pytest.raises(ValueError, match=r"it: expected JSON; .*can't decode"):
        json_files.parse(text, "it")


def test_files_that_are_too_large_or_none(tmp_path):
    path = tmp_path / "large.json"
    path.write_text(json.dumps("x" * 1000))
    with pytest.raises(ValueError, match=r"large\.json: expected at most 1,000 bytes of JSON"):
        json_files.read(path, most=1000)
    os.mkfifo(tmp_path / "fifo.json")  # opening it would wait for a writer
    for odd in (tmp_path / "fifo.json", "/dev/zero"):
        with pytest.raises(ValueError, match="expected a regular file; got a FIFO, device"):
            json_files.read(odd)
    (tmp_path / "link.json").symlink_to(path)
    assert json_files.read(tmp_path / "link.json")
    with pytest.raises(OSError, match=r"link\.json"):
        json_files.read(tmp_path / "link.json", own=True)


def test_lines(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n\n[2]\n{"a": "\\u2028\u2028"}\n{"a"')
    found = json_files.lines(path)
    assert [name.rpartition(": ")[2] for name, _ in found] == [f"line {n}" for n in (1, 3, 4, 5)]
    assert [type(value) for _, value in found] == [dict, ValueError, dict, ValueError]
    assert "line 3: expected a JSON object; got [2]" in str(found[1][1])


FIELDS = Fields(
    {"n": 3, "x": 0.5, "t": "a", "b": True, "l": [1, 2], "o": {"in": {"n": "3"}}, "z": None}, "f"
)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda f: f.integer("n", 4, 9), "f: n: expected a whole number from 4 to 9; got 3"),
        (lambda f: f.integer("b", 0, 9), "f: b: expected a whole number from 0 to 9; got True"),
        (lambda f: f.integer("x", 0, 9), "f: x: .* got 0.5"),
        (lambda f: f.integer("absent", 0, 9), "f: absent: .*; got none"),
        (lambda f: f.integer("z", 0, 9, 5), "f: z: .*; got None"),
        (lambda f: f.number("x", 1, 2), "f: x: expected a number from 1 to 2; got 0.5"),
        (lambda f: f.number("t", 1, 2), "f: t: expected a number from 1 to 2; got 'a'"),
        (lambda f: f.text("n"), "f: n: expected a text; got 3"),
        (lambda f: f.flag("n"), "f: n: expected true or false; got 3"),
        (lambda f: f.choice("b", (1, 2)), "f: b: expected 1 or 2; got True"),
        (lambda f: f.array("l", str, "names"), r"f: l: expected an array of names; got \[1, 2\]"),
        (lambda f: f.optional("t", f.number, 0, 1), "f: t: expected a number"),
        (lambda f: f.fields("n"), "f: n: expected a JSON object; got 3"),
        (lambda f: f.fields("absent"), "f: absent: expected a JSON object; got none"),
        (lambda f: f.fields("o").fields("in").integer("n", 0, 9), "f: o.in.n: .*; got '3'"),
        (lambda f: f.fields("o").only(["out"]), "f: o.in: expected no field but out"),
    ],
)
def test_fields(ask, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        ask(FIELDS)


def test_fields_that_fit():
    assert FIELDS.integer("absent", 0, 9, 5) == 5
    assert FIELDS.number("n", 0, 9) == 3
    assert FIELDS.optional("z", FIELDS.number, 0, 1) is None
    assert FIELDS.choice("t", ("a", "b")) == "a"
    assert FIELDS.fields("absent", {}).values == {}
