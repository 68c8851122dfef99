"""Text of models, users and files, made safe to show: invisible characters are spelled out, long text is cut."""

import shlex
from unicodedata import category

# Characters that reorder, hide or break the text around them are shown by name. Joiners stay: emoji and some scripts
# need them.
KEPT_CONTROLS = "\n\t\u200c\u200d"
CONTROL_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
WITHOUT_KEPT = str.maketrans("", "", KEPT_CONTROLS)
MESSAGE_CHARACTERS = 2000  # a terminal of 80 x 24 has 1,920
END_CHARACTERS = 600  # a message ends with what to do


def visible(text: str) -> str:
    """Return the text with every control, bidirectional and other invisible character spelled out."""
    if text.translate(WITHOUT_KEPT).isprintable():  # the common case, fast
        return text
    return "".join(
        f"⟨U+{ord(one):04X}⟩" if one not in KEPT_CONTROLS and category(one) in CONTROL_CATEGORIES else one
        for one in text
    )


def shortened(text: str, limit: int) -> str:
    """Return at most `limit` characters of the text, with the number of those cut off."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def on_one_screen(text: str) -> str:
    """Return a text as one screen shows it: visible, at most 2,000 characters; the middle of a longer one is left
    out."""
    shown = visible(text)
    if len(shown) <= MESSAGE_CHARACTERS:
        return shown
    left_out = f"\n… ({len(shown):,} characters in all) …\n"
    return shown[: MESSAGE_CHARACTERS - END_CHARACTERS - len(left_out)] + left_out + shown[-END_CHARACTERS:]


def quoted(path: object) -> str:
    """Return a path or a name as a word of a command for a shell, which no command takes for an option."""
    word = str(path)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def duration(seconds: float) -> str:
    """Return '8.1 s', '3 min 20 s' or '2 h 05 min'."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
