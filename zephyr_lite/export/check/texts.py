"""Strings on which two tokenizers or two templates that are not the same come apart.

A base list of what people write and of what breaks tokenizers, then the parts that matter most
combined: every script and mark between every kind of space, every special token in every place
inside a content. No two strings are equal; nothing here is anybody's data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

SPACES = (
    "", " ", "  ", "   ", " " * 15, " " * 16, " " * 17, "\n", "\n\n", "\n\n\n", " \n ", "\n \n",
    "\t", "\t\t", "\r\n", "\r", "\n\t", "a  b   c    d", "a\tb\t\tc", "a\n\n\nb", "a\r\nb\rc",
    "\u00a0", "a\u00a0b", "\u2003em\u2003", "\u3000全角\u3000", "zero\u200bwidth",
    "\u2028line\u2029", "\v\f", "\x85next", "line one\nline two\n\n  indented\n    more\n",
)  # fmt: skip
SCRIPTS = (
    "Hello world", "naïve café, Ångström, façade", "Łódź, Žižek, İstanbul ıi", "Straße GROẞ ﬁn ﬂow",
    "Привет, мир", "Ελληνικά ΐ ς", "שָׁלוֹם עולם", "مرحبا بالعالم", "سلام دنیا می‌خواهم",
    "हिन्दी में क्ष", "বাংলা ভাষা", "தமிழ் மொழி", "ภาษาไทยไม่มีช่องว่าง", "ພາສາລາວ", "မြန်မာစာ",
    "ខ្មែរ", "ქართული", "Հայերեն", "አማርኛ", "漢字かな交じり文", "カタカナ ﾊﾝｶｸ",
    "简体中文，繁體中文。", "한국어 문장", "ᄒ\u1161ᆫ 한", "Tiếng Việt ế ộ", "ᠮᠣᠩᠭᠣᠯ", "བོད་སྐད",
    "𐍈𐌰 𝔣𝔯𝔞𝔨 𝟘𝟙", "𠮷野家 𡈽", "Mixed Смесь 混合 مزيج",
)  # fmt: skip
EMOJI = (
    "🙂", "🙂🙂🙂", "👍🏽", "👩‍👩‍👧‍👦 family", "🏳️‍🌈", "🇩🇪🇫🇷🇯🇵", "❤️ ❤", "☎︎ ☎️", "1️⃣2️⃣",
    "👩🏿‍🚀", "text🙂text", "🫠🪿", "\U0001f3f4\U000e0067\U000e0062\U000e007f", "\u200d", "\ufe0f",
)  # fmt: skip
COMBINING = (
    "e\u0301 combining", "\u0301 alone", "a\u0323\u0302\u0301", "q\u0307\u0323 order q\u0323\u0307",
    "Z̷̛̩a̶̢͝l̵̰͠g̸̨̛o̵̲͘", "\u212b \u00c5 A\u030a", "ﬀ ﬃ ½ ² ㎏", "\u0130\u0307", "นี้ น้ำ",
    "క్షి",
)  # fmt: skip
DIGITS = (
    "0", "7", "42", "100", "1234", "12345678901234567890", "3.14159", "1,000,000.00", "-1e-10",
    "0x1F 0b101 0o17", "2024-01-31T23:59:59Z", "+49 (0)30 123-456", "٣٤٥ ३४५ ๓", "Ⅷ ⅓ ①", "1 2 3",
)  # fmt: skip
CODE = (
    "def f(x):\n    return x**2  # comment\n", "\tif (a&&b||!c) { return a[i]->x; }\n",
    "SELECT * FROM t WHERE a='b';--", "<div class=\"a\">&nbsp;</div>",
    "{\"a\": [1, 2, {\"b\": null}]}", "#!/bin/sh\nls -la | grep '^d' > /dev/null 2>&1",
    "λ x → x ∘ f ≠ ⊥", "$\\frac{a}{b}$ \\n \\u0041", "```python\nprint('hi')\n```", "a_b-c.d/e\\f",
    "snake_case camelCase PascalCase SHOUT", "| a | b |", "x=1;y=2;z=x+y", "<!-- comment -->",
    "%s %d {0} {{x}} {% x %} ${y}",
)  # fmt: skip
WEB = (
    "https://example.org/a?b=c&d=%20e#f", "http://例え.jp/パス", "mailto:a.b+c@example.org",
    "@user #tag", "C:\\Windows\\System32", "/usr/bin/env", "192.168.0.1:8080", "::1",
    "www.example.co.uk",
)  # fmt: skip
PROSE = (
    "don't  stop --- it's 3.14159 (or 2,718)!", "I'LL we've they're 'twas O'Brien's",
    "“quoted” ‘so’ …", "¿Qué? ¡Sí!", "e.g., i.e., etc.", "!!!???...", "----====____",
    "UPPER lower TiTle", "a.b.c.d", "end.\n\nNew paragraph", "(((nested)))",
    "* item\n* item\n  - sub", "# Title\n\n> quote\n",
)  # fmt: skip
ODD_BYTES = (
    "\ufeffbyte order mark", "mid\ufeffdle", "private \ue000 and \U0010ffff", "\ufffd replaced",
    "\u2581 lower block", "\u2581\u2581a\u2581", "\x01\x02\x1b[31m\x7f",
    "\u202eright to left\u202c", "\u00ad soft", "\U000f0000\uf8ff", "<0x0A><0xZZ>", "Ġ Ċ Ã©",
)  # fmt: skip
LONG = (
    "a" * 1000, "ab" * 500, "漢" * 300, "🙂" * 100, "-" * 500, "1" * 400, "\n" * 100,
    "Donaudampfschifffahrtsgesellschaftskapitän" * 8, "x" * 63 + " " + "y" * 64, "aé漢🙂" * 60,
)  # fmt: skip
MARKS = (
    "<|system|>", "<|user|>", "<|assistant|>", "<|assistant|>\n", "</s>", "<s>", "<unk>", "<pad>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "[INST]", "[/INST]", "<<SYS>>",
)  # fmt: skip
BETWEEN_SPACES = ("Hello", "мир", "漢字", "🙂", "42", "e\u0301", "x=1;", "it's")
FRAMES = (" {}", "  {}", "{} ", "{}   ", "\n{}", "{}\n\n", "\t{}", "{0} {0}", "{0}\n {0}")
INSIDE = ("{}", "a{}b", "a {} b", "{}{} x", " {}\n")
TURNS = (
    "<|user|>\nHi</s>\n<|assistant|>\n", "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n",
    "<|im_start|>user\nHi<|im_end|>", "[INST] Hi [/INST]", "  </s>  <s> <unk>x",
    "a </s> b</s></s>\n", "< s> <|user |> </ s>",
)  # fmt: skip


@cache
def odd_strings(special: Sequence[str] = ()) -> tuple[str, ...]:
    """More than 300 distinct strings.

    Args:
        special: texts of a tokenizer's own control tokens, a tuple: they join the role marks and
            stand inside contents as those do.
    """
    base = (SPACES, SCRIPTS, EMOJI, COMBINING, DIGITS, CODE, WEB, PROSE, ODD_BYTES, LONG, TURNS)
    strings = [text for group in base for text in group]
    strings += _framed(BETWEEN_SPACES, FRAMES)
    strings += _framed(dict.fromkeys((*MARKS, *special)), INSIDE)
    return tuple(dict.fromkeys(strings))


def _framed(words: Iterable[str], frames: Iterable[str]) -> list[str]:
    # `{}` is replaced as text: str.format would take "{}{}" as two arguments.
    frames = [frame.replace("{0}", "{}") for frame in frames]
    return [frame.replace("{}", word) for word in words for frame in frames]
