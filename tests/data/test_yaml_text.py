"""YAML means what is written: a scalar without quotes is text until a setting wants something else of it."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr

from petals_eval.data.yaml_text import Plain, read_yaml, resolve_nulls

# Whatever YAML 1.1 would make something else of, and what looks like it.
RETYPED = (
    *("no", "No", "NO", "yes", "on", "Off", "true", "True", "FALSE", "y", "n"),
    *("0", "00", "007", "08", "0o7", "0x1F", "0b11", "-1", "+1", "1_000", "123456789012345678901234567890"),
    *("1.0", "1e3", "1E3", "1.5e+3", ".5", "5.", ".inf", "-.Inf", ".nan", "1:30", "1:30:59", "190:20:30.15"),
    *("2020-01-01", "2020-01-01 00:00:00", "2020-01-01T00:00:00Z", "null", "Null", "NULL", "~", "=", "None"),
)


@pytest.mark.parametrize("written", RETYPED)
def test_a_scalar_without_quotes_is_its_spelling_everywhere(written):
    assert read_yaml(written) == written
    assert read_yaml(f"key: {written}") == {"key": written}
    assert read_yaml(f"{written}: value") == {written: "value"}
    assert read_yaml(f"[{written}, x]") == [written, "x"]
    assert read_yaml(f"- {written}\n- x") == [written, "x"]
    assert read_yaml(f"{{{written}: {{{written}: {written}}}}}") == {written: {written: written}}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.text(st.sampled_from("0123456789.eE+-:_xobTNnaulfyrs~<=/"), min_size=1, max_size=9)
    | st.integers().map(str)
    | st.floats().map(repr)
    | st.dates().map(str)
    | st.datetimes().map(str)
)
def test_what_pyyaml_calls_one_plain_scalar_keeps_its_spelling(written):
    tokens = yaml.scan(f"[{written}]")
    try:
        scalars = [token for token in tokens if isinstance(token, yaml.ScalarToken)]
        nodes = yaml.compose(f"[{written}]")
    except yaml.YAMLError:
        return
    if len(scalars) != 1 or [type(node) for node in nodes.value] != [yaml.ScalarNode] or written == "<<":
        return  # such as "a: b", which is a mapping
    assert read_yaml(f"[{written}]") == [scalars[0].value] == [written]


def test_quotes_make_no_other_value_but_tell_null_from_nothing():
    assert read_yaml("a: 'no'\nb: \"1e3\"\nc: |\n  00\n") == {"a": "no", "b": "1e3", "c": "00\n"}
    plain, quoted = read_yaml("[null, 'null']")
    assert isinstance(plain, Plain) and type(quoted) is str


def test_nothing_is_nothing_and_an_empty_text_has_quotes():
    assert read_yaml("a:\nb: ''\nc: !!str\n") == {"a": None, "b": "", "c": ""}
    assert read_yaml("") is None


def test_a_tag_that_is_written_makes_its_type():
    assert read_yaml("[!!int 012, !!float 1e3, !!bool no, !!null x, !!str 1]") == [10, 1000.0, False, None, "1"]


def test_aliases_and_merged_keys_work_and_may_be_overridden():
    text = "base: &base {one: 1, two: no}\nmine: {<<: *base, two: yes}\nalso: {<<: [*base, {three: 3}]}\n"
    assert read_yaml(text) == {
        "base": {"one": "1", "two": "no"},
        "mine": {"one": "1", "two": "yes"},
        "also": {"one": "1", "two": "no", "three": "3"},
    }


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice, here and in line 1"),
        ("{a: 1,\n 'a': 2}", 2, "'a' is given twice, here and in line 1"),
        ("top:\n  yes: 1\n  no: 2\n  yes: 3\n", 4, "'yes' is given twice, here and in line 2"),
        ("base: &b {x: 1}\nmine:\n  <<: *b\n  x: 2\n  x: 3\n", 5, "'x' is given twice, here and in line 4"),
        ("? a\n: 1\n? a\n: 2\n", 3, "'a' is given twice"),
        ("a-b: 1\na_b: 2\n", 2, "'a_b' is given twice, here and in line 1"),
    ],
)
def test_a_key_given_twice_is_an_error_with_its_line(text, line, key):
    with pytest.raises(ValueError, match=f"^line {line}: not valid YAML: the key ") as caught:
        read_yaml(text, same_key=lambda key: key.replace("-", "_"))
    assert key in str(caught.value)


def test_a_merge_sign_without_quotes_says_what_to_do():
    with pytest.raises(ValueError, match=r"^line 1: .*<< has a meaning of its own, and as text it stands in quotes"):
        read_yaml("{<<: good}")
    assert read_yaml("{'<<': good}") == {"<<": "good"}


class Inner(BaseModel):
    maybe: str | None = None
    always: str = ""


class Outer(BaseModel):
    maybe: str | None = None
    always: str = ""
    number: int = 0
    perhaps: int | None = None
    secret: SecretStr | None = None
    names: tuple[str, ...] = ()
    map: dict[str, str] = {}
    inner: Inner | None = None
    inners: dict[str, Inner] = {}


@pytest.mark.parametrize("null", ["null", "Null", "NULL", "~"])
def test_null_is_none_only_where_none_may_stand(null):
    text = f"""
        maybe: {null}
        always: {null}
        number: {null}
        perhaps: {null}
        secret: {null}
        names: [{null}, "{null}"]
        map: {{{null}: {null}}}
        inner: {{maybe: {null}, always: {null}}}
        inners: {{{null}: {{maybe: {null}}}}}
        unknown: {null}
    """
    assert resolve_nulls(read_yaml(text), Outer) == {
        "maybe": None,
        "always": null,
        "number": None,  # takes neither: pydantic says so
        "perhaps": None,
        "secret": None,
        "names": [null, null],
        "map": {null: null},
        "inner": {"maybe": None, "always": null},
        "inners": {null: {"maybe": None}},
        "unknown": null,
    }
    assert resolve_nulls(read_yaml(f"maybe: '{null}'\nnames: {null}\n"), Outer) == {"maybe": null, "names": None}


def test_nothing_of_the_marking_is_left():
    def kinds(value):
        if isinstance(value, dict):
            return {kind for pair in value.items() for one in pair for kind in kinds(one)}
        return {kind for one in value for kind in kinds(one)} if isinstance(value, list) else {type(value)}

    values = resolve_nulls(read_yaml("{maybe: x, names: [a], map: {b: c}, unknown: [{d: e}], null: f}"), Outer)
    assert kinds(values) == {str}
