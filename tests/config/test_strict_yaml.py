"""Values are what they look like, and what is none ends in one short message."""

import math
from pathlib import Path
from typing import Any

import pytest
from places import TOY

from srlm_mega.config.file import load_config
from srlm_mega.config.strict_yaml import load_yaml
from srlm_mega.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10), ("-3", -3), ("+4", 4), ("0", 0), ("1e-6", 1e-6), ("1E+3", 1000.0), ("1.5", 1.5), (".5", 0.5),
        ("2.", 2.0), ("1.0e-06", 1e-6), (".inf", math.inf), ("-.INF", -math.inf), ("true", True), ("False", False),
        ("null", None),
        ("~", None), ("", None), ("010", "010"), ("1:30", "1:30"), ("yes", "yes"), ("off", "off"), ("0x10", "0x10"),
        ("2024-13-45", "2024-13-45"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"), ("e5", "e5"), ("-", [None]),
        ("[1, x]", [1, "x"]), ("{a: 1}", {"a": 1}), ("'1'", "1"), ("{<<: {a: 1}, a: 2}", {"a": 2}),
    ],
)  # fmt: skip
def test_values(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, a: 2}", "the key a is given twice, line 1"),
        ("a: 1\nb: {c: 1,\n c: 2}", "the key c is given twice, line 3"),
        ("[" * 3000, "nested too deeply"),
        ("9" * 5000, "a value cannot be read"),
        ("!!timestamp 2024-13-45", "a value cannot be read"),
        ("!!python/object:os.system 1", "could not determine a constructor"),
        ("[x", "line 1"),
        ("{? [a]: b}", "unhashable"),
        ("!!bool maybe", "a value cannot be read"),
        ("!!timestamp x", "a value cannot be read"),
        ("&a [*a]", "repeats itself"),
        ("{<<: &a {b: *a}}", "repeats itself"),
        ("".join(f"- &x{n} [{', '.join([f'*x{n - 1}'] * 9 if n else ['a'])}]\n" for n in range(9)), "repeats itself"),
        ('"a\\0b"', "NUL"),
        ('"\\uD800"', "half of a character"),
        ("{" + "a: {" * 60 + "}" * 61, "nested too deeply, line 1"),
    ],
)
def test_what_is_none(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_yaml(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.seed=010", "seed", 10),
        ("run.dir=010", "dir", Path("010")),
        ("run.dir=2024-13-45", "dir", Path("2024-13-45")),
        ("eft.enabled=false", "seed", 0),
        ("run.dir=~/zz", "dir", Path.home() / "zz"),
        ("run.dir=~", "dir", None),
    ],
)
def test_overrides_that_are_understood(override: str, key: str, value: Any) -> None:
    if value is None:
        with pytest.raises(UserError, match="not a valid path"):
            load_config(TOY, [override])
    else:
        assert getattr(load_config(TOY, [override]).run, key) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.lr.x=5", "dpo.lr is no section, its value is 8e-05"),
        ("run.dir.x=1", "run.dir is no section"),
        ("pairs.rho.0.1=3", "pairs.rho"),
        ("run.seed=1:30", "got '1:30'"),
        ("run.seed=yes", "got 'yes'"),
        ("run.seed=true", "not true or false, got True"),
        ("dpo.lr=false", "not true or false, got False"),
        ("run.seed=9223372036854775808", "more than 64 bits"),
        ("run.seed='9223372036854775808'", "more than 64 bits"),
        ("run.dir=-x", "take -x for an option"),
        ("a." * 3000 + "b=1", "so many dots"),
        ("run.dir=~no_such_user/zz", "no home folder for ~no_such_user"),
        ("dpo={lr: 1e-5, lr: 2e-5}", "the key lr is given twice"),
        ("run.seed=" + "9" * 5000, "cannot be read"),
        ("run.seed=" + "9" * 4000 + "x", "run.seed: Input should be a valid integer"),
        ("run.seed=" + "[" * 3000, "nested too deeply"),
        ("sampler.mounts=[~no_such_user/a]", "no home folder for ~no_such_user"),
    ],
)
def test_overrides_that_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(TOY, [override])
    assert message in str(error.value) and len(str(error.value)) < 2000


def test_a_key_twice_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("run: {dir: x}\ndpo:\n  lr: 1e-6\n  beta: 0.1\n  lr: 2e-6\n")
    with pytest.raises(UserError, match=r"config\.yaml is not YAML: the key lr is given twice, line 5"):
        load_config(path)
