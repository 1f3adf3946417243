"""Which regexes of tokenizers are taken. Those that are refused take all time on some text."""

from __future__ import annotations

import pytest

from disha.finetune.text.bounds import is_bounded

LETTERS, SMALL = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
REAL = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}]*[{SMALL}]+{ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{LETTERS}]+[{SMALL}]*{ENDINGS}?|\p{{N}}{{1,3}}|{SPACES}",
    "kimi": rf"[\p{{Han}}]+|[{LETTERS}&&[^\p{{Han}}]]*[{SMALL}&&[^\p{{Han}}]]+{ENDINGS}?",
    "deepseek": MARKS + r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + SPACES,
    "bloom": r" ?[^(\s|[.,!?])]+",
    "digits from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    "superbpe": r"(?=(\d{3})+(?!\d))",
    "t5": r" {2,}",
}
HARMFUL = [
    *("(a+)+$", "(a*)*b", "(a|a)*b", "(a|aa)+$", ".*.*=", "a*a*a*b", "a*?a*?b", "(?:a*b?)?a*c"),
    *(r"(.*)\1", r"\X+x", "(?:a+){2}x", "(?:a{1,3}){1,3}b", "a{1,3}+x", "a{0,1000}a{0,1000}b"),
    *("(a?){30}a{30}", "a?" * 30 + "a" * 30, "(?:a|a)" * 20 + "b", "(?=a+b+)c+d", "(?:[ab]*)+c"),
]
NOT_UNDERSTOOD = [
    "(?~abc)",
    "(?(1)a)",
    "(?x)a +",
    r"(?<n>a)\k<n>",
    "(",
    ")",
    "[",
    "a{",
    "\\",
    "a**",
]


@pytest.mark.parametrize("which", REAL)
def test_those_of_real_tokenizers_are_taken(which):
    assert is_bounded(REAL[which])


@pytest.mark.parametrize("pattern", [*HARMFUL, *NOT_UNDERSTOOD, "(a" * 9999 + ")" * 9999])
def test_those_that_try_too_many_ways_are_not(pattern):
    assert not is_bounded(pattern)
