"""Text from strangers, made safe to show."""

from petals_eval.text import printable


def test_every_control_and_bidirectional_character_is_replaced() -> None:
    hostile = [
        chr(code) for code in [*range(0x20), *range(0x7F, 0xA0), 0x200B, 0x200E, 0x2028, 0x202E, 0x2066, 0xD800, 0xFEFF]
    ]
    assert not set(printable("".join(hostile))) - {" ", "\ufffd"}
    assert printable("é 漢字 ▇ …") == "é 漢字 ▇ …"
    assert len(printable("x" * 10_000)) == 400


def test_what_one_line_shows_is_printable_whatever_the_blank() -> None:
    """An ideographic space, too, and the no-break space: a terminal's line holds ordinary ones."""
    assert printable("a\u3000b\xa0c\r\nd") == "a b c  d"
    assert printable("x" * 900, longest=None, keep_lines=True) == "x" * 900
