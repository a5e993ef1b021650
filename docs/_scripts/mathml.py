"""A hook of MkDocs: formulas become MathML when the pages are built, so that a browser
needs neither a script nor a network to show them."""

import html
import re

import latex2mathml.converter


# What `pymdownx.arithmatex` makes of `$...$` and `$$...$$`.
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>',
    re.DOTALL,
)


def on_page_content(content: str, **kwargs: object) -> str:
    del kwargs
    return _FORMULA.sub(_convert, content)


def _convert(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    # The converter knows this environment by its other name.
    tex = html.unescape(match["tex"]).replace("{aligned}", "{align*}")
    formula = _spaced(latex2mathml.converter.convert(tex, display=display))
    # What the converter does not know it leaves as it is.
    if re.search(r"\\|<mi>&(amp;)?</mi>", formula):
        raise ValueError(f"this formula cannot be converted to MathML: {tex}")
    return f'<{match["tag"]} class="formula">{formula}</{match["tag"]}>'


_BAR = re.compile(r"<mo(?P<rest>[^>]*)>&#x0007C;</mo>")
_WORD = re.compile(r"<mo>(?P<word>[a-z]{2,})</mo>(?P<open><mo[^>]*>&#x00028;)?")
_SIGN = re.compile(
    r"(?P<before><mo[^>]*>(?:\[|&#x00028;|&#x0003D;|&#x0002C;)</mo>|<mrow>|<mtd[^>]*>)"
    r"<mo>&#x02212;</mo>"
)


def _spaced(formula: str) -> str:
    """The spaces of TeX: a browser takes words and bars for relations, and a sign after
    a bracket for a difference."""
    formula = _BAR.sub(r'<mo\g<rest> lspace="0" rspace="0">&#x0007C;</mo>', formula)
    formula = _WORD.sub(_word, formula)
    return _SIGN.sub(r'\g<before><mo form="prefix">&#x02212;</mo>', formula)


def _word(match: re.Match[str]) -> str:
    after = "0" if match["open"] else "0.17em"
    word = f'<mo lspace="0.17em" rspace="{after}">{match["word"]}</mo>'
    return word + (match["open"] or "")
