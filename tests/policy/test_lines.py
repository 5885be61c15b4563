"""Every key's line is where a reader finds it."""

import tomli
from hypothesis import given
from hypothesis import strategies as st

from clipfreeze.policy.lines import key_lines, line_of

TEXT = '''# head
name = "x"   # a ] comment [
summary = """
two
lines [[rule]]"""

[params]
n = { default = 2, min = 1 }
"quoted key" = 'it''s'

[[rule]]
match = [
  "a.[0]", # "
  'b',
]
lr = 1e-5

[[rule]]
match = "c"

[rule.sub]
deep.er = 1
'''.replace("it''s", "its")


def test_each_key_has_the_line_it_stands_on():
    tomli.loads(TEXT)
    lines = key_lines(TEXT)
    assert lines["name",] == 2
    assert lines["summary",] == 3
    assert lines["params",] == 7
    assert lines["params", "n"] == 8
    assert lines["params", "quoted key"] == 9
    assert lines["rule", 0] == 11
    assert lines["rule", 0, "match"] == 12
    assert lines["rule", 0, "lr"] == 16
    assert lines["rule", 1] == 18
    assert lines["rule", 1, "match"] == 19
    assert lines["rule", 1, "sub", "deep", "er"] == 22


def test_a_key_inside_an_inline_table_falls_back_to_the_table():
    assert line_of(key_lines(TEXT), ("params", "n", "default")) == 8


WORDS = st.text("abc", min_size=1, max_size=3)
VALUES = st.sampled_from(["1", '"x # ] }"', "'''\na\n'''", "[1,\n2]", '{ a = "}" }', '"""q\\"""" # c', "true # c"])


@given(st.lists(st.tuples(WORDS, VALUES), unique_by=lambda pair: pair[0]), st.integers(0, 3))
def test_any_file_gives_back_the_lines_it_was_written_on(pairs, blank):
    text, expected = "\n" * blank, {}
    for key, value in pairs:
        expected[key,] = text.count("\n") + 1
        text += f"{key} = {value}\n"
    tomli.loads(text)
    found = key_lines(text)
    assert {path: line for path, line in found.items() if path} == expected
