"""A model's text, made safe to show: invisible characters are spelled out, long text is cut."""

from unicodedata import category

# Characters that reorder, hide or break the text around them are shown by name. Joiners stay: emoji and some scripts
# need them.
KEPT_CONTROLS = "\n\t\u200c\u200d"
CONTROL_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
WITHOUT_KEPT = str.maketrans("", "", KEPT_CONTROLS)


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


def duration(seconds: float) -> str:
    """Return '8.1 s', '3 min 20 s' or '2 h 05 min'."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
