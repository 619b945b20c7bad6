"""Languages of a text, told by the scripts of its words.

R1's language reward is the share of a chain of thought's words that are in the target language (arXiv 2501.12948).
For languages of different scripts, such as English and Chinese, counting by Unicode script needs no detector.
"""

from __future__ import annotations

import re

__all__ = ["SCRIPTS_OF", "UNSPACED", "consistency", "word_counts"]

# Ranges from Unicode's Scripts.txt, letters only: digits and signs belong to no language.
_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02b8\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a"
_ALPHABETS = {
    "latin": _LATIN,
    "cyrillic": "\u0400-\u0481\u048a-\u052f",
    "greek": "\u0370-\u03e1\u1f00-\u1ffe",
    "arabic": "\u0620-\u064a\u066e-\u06d3\u06fa-\u06ff\u0750-\u077f",
    "hebrew": "\u05d0-\u05ea",
    "devanagari": "\u0904-\u0939\u093e-\u094d\u0958-\u0961",
    "hangul": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3",
}
# Written without spaces: each character counts as a word.
_CHARACTERS = {
    "han": "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "kana": "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9d",
    "thai": "\u0e01-\u0e2e\u0e30-\u0e3a\u0e40-\u0e46",
}
UNSPACED = "".join(_CHARACTERS.values())
"""Characters of the scripts that are written without spaces, as ranges for a regular expression's brackets."""

# Two letters at least: single ones are variables and list labels.
_WORDS = {
    name: re.compile(rf"[{letters}][{letters}\u0300-\u036f]+(?:['\u2019][{letters}]+)*")
    for name, letters in _ALPHABETS.items()
} | {name: re.compile(f"[{letters}]") for name, letters in _CHARACTERS.items()}
# Letters of all other scripts, so that nothing that is written counts for nothing.
_WORDS["other"] = re.compile(rf"[^\W\d_{''.join((*_ALPHABETS.values(), *_CHARACTERS.values()))}]{{2,}}")

SCRIPTS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi", "id"), ("latin",)),
    **dict.fromkeys(("ru", "uk", "bg"), ("cyrillic",)),
    "zh": ("han",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "el": ("greek",),
    "ar": ("arabic",),
    "he": ("hebrew",),
    "hi": ("devanagari",),
    "th": ("thai",),
}
"""Scripts by language code. Languages that share a script cannot be told apart."""

# Tags, LaTeX commands and ASCII in fenced code are in no natural language; what else a fence holds is read.
_TAGS = re.compile(r"</?(?:think|answer)>")
_COMMANDS = re.compile(r"\\[A-Za-z]+")
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_ASCII = re.compile(r"[\x00-\x7f]+")


def word_counts(text: str) -> dict[str, int]:
    """Returns the words of each script in `text`, scripts without any left out.

    Tags, LaTeX commands, ASCII in fenced code, digits, signs and single letters of alphabets are not counted. Scripts
    that no language of `SCRIPTS_OF` has are "other".
    """
    text = _COMMANDS.sub(" ", _TAGS.sub(" ", _CODE.sub(lambda code: _ASCII.sub(" ", code[0]), text)))
    scripts = ("latin",) if text.isascii() else tuple(_WORDS)
    counts = {script: len(_WORDS[script].findall(text)) for script in scripts}
    return {script: count for script, count in counts.items() if count}


def consistency(text: str, language: str) -> float | None:
    """Returns the share of the words of `text` that are in `language`, between 0 and 1; None for a text without words.

    Raises:
        ValueError: a language whose script is not known.
    """
    if language not in SCRIPTS_OF:
        raise ValueError(f"expected a language among {', '.join(sorted(SCRIPTS_OF))}, got {language!r}")
    counts = word_counts(text)
    total = sum(counts.values())
    return None if not total else sum(counts.get(script, 0) for script in SCRIPTS_OF[language]) / total
