"""Maths in HTML as TeX between dollars: MathML, KaTeX, MathJax 2 and 3, formula images.

Source of the forms: W3C MathML Core; KaTeX and MathJax output; MediaWiki's `mwe-math-fallback-image`.
"""

import itertools
import re

from selectolax.lexbor import LexborNode

MAX_MATH_DEPTH = 200
KATEX_NODES = 16  # the formula comes before its rendering, some wrappers deep
_RENDERED = re.compile(r"(?:^|\s)(?:MathJax\w*|mjx-chtml|katex-html|math-error)(?:\s|$)")
_TEX_IMAGE = re.compile(r"(?:^|\s)(?:tex|latex|math|mwe-math-fallback-image-\w+|ql-img-\w+|math_img)(?:\s|$)")
_TEX_CHARACTER = re.compile(r"\\[A-Za-z]+|[\^_{}]")
_DISPLAY_STYLE = re.compile(r"^\{\\(?:displaystyle|textstyle) (.*)\}$", re.DOTALL)
_OPERATORS = {
    "−": "-", "⋅": r"\cdot", "×": r"\times", "÷": r"\div", "±": r"\pm", "∓": r"\mp", "≤": r"\le", "≥": r"\ge",
    "≠": r"\ne", "≈": r"\approx", "≡": r"\equiv", "∼": r"\sim", "≅": r"\cong", "∝": r"\propto", "→": r"\to",
    "⇒": r"\Rightarrow", "⇔": r"\Leftrightarrow", "↦": r"\mapsto", "∞": r"\infty", "∑": r"\sum", "∏": r"\prod",
    "∫": r"\int", "∮": r"\oint", "∂": r"\partial", "∇": r"\nabla", "√": r"\surd", "∈": r"\in", "∉": r"\notin",
    "⊂": r"\subset", "⊆": r"\subseteq", "⊃": r"\supset", "⊇": r"\supseteq", "∪": r"\cup", "∩": r"\cap",
    "∅": r"\emptyset", "∀": r"\forall", "∃": r"\exists", "¬": r"\neg", "∧": r"\wedge", "∨": r"\vee", "⊕": r"\oplus",
    "⊗": r"\otimes", "∘": r"\circ", "∗": r"\ast", "⋆": r"\star", "…": r"\ldots", "⋯": r"\cdots", "⋮": r"\vdots",
    "⋱": r"\ddots", "⟨": r"\langle", "⟩": r"\rangle", "⌊": r"\lfloor", "⌋": r"\rfloor", "⌈": r"\lceil", "⌉": r"\rceil",
    "∥": r"\|", "∠": r"\angle", "△": r"\triangle", "⊥": r"\perp", "∣": r"\mid", "°": r"^\circ", "′": "'", "″": "''",
    "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon", "ϵ": r"\epsilon", "ζ": r"\zeta",
    "η": r"\eta", "θ": r"\theta", "ι": r"\iota", "κ": r"\kappa", "λ": r"\lambda", "μ": r"\mu", "ν": r"\nu", "ξ": r"\xi",
    "π": r"\pi", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau", "υ": r"\upsilon", "φ": r"\varphi", "ϕ": r"\phi",
    "χ": r"\chi", "ψ": r"\psi", "ω": r"\omega", "Γ": r"\Gamma", "Δ": r"\Delta", "Θ": r"\Theta", "Λ": r"\Lambda",
    "Ξ": r"\Xi", "Π": r"\Pi", "Σ": r"\Sigma", "Φ": r"\Phi", "Ψ": r"\Psi", "Ω": r"\Omega", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "ℓ": r"\ell", "%": r"\%",
    "$": r"\$", "#": r"\#", "&": r"\&", "{": r"\{", "}": r"\}", "_": r"\_", "\u2061": "", "\u2062": "", "\u2063": ",",
    "\u2064": "+",
}  # fmt: skip
_FUNCTIONS = frozenset(
    "arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf limsup ln log max "
    "min sec sin sinh sup tan tanh".split()
)
_ACCENTS = {"¯": "overline", "‾": "overline", "_": "underline", "^": "hat", "˙": "dot", "¨": "ddot", "~": "tilde"}
_ACCENTS |= {"→": "vec", "⃗": "vec", "ˉ": "bar", "ˆ": "hat", "˜": "tilde", "⏟": "underbrace", "⏞": "overbrace"}


def math_text(node: LexborNode, tag: str, attributes: dict[str, str | None]) -> str | None:
    """TeX between dollars if `node` is the root of a formula, "" if it is a rendering to leave out, None otherwise."""
    classes = attributes.get("class") or ""
    if tag == "math":
        display = attributes.get("display") == "block" or "mode=display" in (attributes.get("mode") or "")
        return _delimited(_math_tex(node, attributes), display)
    if tag == "script":
        kind = (attributes.get("type") or "").lower()
        if not kind.startswith("math/"):
            return None
        content = node.text(deep=True)
        if kind.startswith("math/tex"):
            return _delimited(content, "mode=display" in kind)
        return ""
    if tag == "img":
        return _image_tex(attributes)
    if not classes and tag != "mjx-container":
        return None
    if tag == "mjx-container":
        inner = node.css_first("math")
        return _delimited(_math_tex(inner, inner.attributes), attributes.get("display") == "true") if inner else ""
    if "katex" in classes:
        names = classes.split()
        if "katex-display" in names or "katex" in names:
            inner = _first_math(node)
            if inner is not None:
                display = "katex-display" in names or inner.attributes.get("display") == "block"
                return _delimited(_math_tex(inner, inner.attributes), display)
    return "" if _RENDERED.search(classes) else None


def _first_math(node: LexborNode) -> LexborNode | None:
    """The <math> among the first elements of a KaTeX rendering; to search all of it would be quadratic when nested."""
    for inner in itertools.islice(node.traverse(), KATEX_NODES):
        if inner.tag == "math":
            return inner
    return None


def _delimited(tex: str, display: bool) -> str:
    tex = tex.strip()
    if not tex:
        return ""
    return f"$${tex}$$" if display else f"${tex}$"


def _image_tex(attributes: dict[str, str | None]) -> str | None:
    alt = (attributes.get("alt") or "").strip()
    if not alt:
        return None
    known = _TEX_IMAGE.search(attributes.get("class") or "")
    if not known and not (len(_TEX_CHARACTER.findall(alt)) >= 2 and "\\" in alt and _is_balanced(alt)):
        return None
    for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        if alt.startswith(left) and alt.endswith(right) and len(alt) > len(left) + len(right):
            return _delimited(alt[len(left) : -len(right)], left in ("$$", r"\["))
    if known and not _TEX_CHARACTER.search(alt) and len(alt) > 60:
        return None  # a described picture, not a formula
    wrapped = _DISPLAY_STYLE.match(alt)
    return _delimited(wrapped.group(1) if wrapped else alt, False)


def _is_balanced(tex: str) -> bool:
    depth = 0
    for character in tex.replace(r"\{", "").replace(r"\}", ""):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def _math_tex(node: LexborNode, attributes: dict[str, str | None]) -> str:
    for annotation in node.css("annotation"):
        if "tex" in (annotation.attributes.get("encoding") or "").lower():
            tex = annotation.text(deep=True).strip()
            wrapped = _DISPLAY_STYLE.match(tex)
            return wrapped.group(1) if wrapped else tex
    alternative = (attributes.get("alttext") or "").strip()
    if alternative:
        wrapped = _DISPLAY_STYLE.match(alternative)
        return wrapped.group(1) if wrapped else alternative
    return _row(_elements(node), 0)


def _elements(node: LexborNode) -> list[LexborNode]:
    children = []
    child = node.first_child
    while child is not None:
        tag = child.tag
        if tag is not None and not tag.startswith("-"):
            children.append(child)
        child = child.next
    return children


def _row(nodes: list[LexborNode], depth: int) -> str:
    pieces: list[str] = []
    for node in nodes:
        piece = _tex(node, depth)
        if pieces and piece and re.search(r"\\[A-Za-z]+$", pieces[-1]) and piece[0].isalpha():
            pieces.append(" ")
        if piece:
            pieces.append(piece)
    return "".join(pieces)


def _braced(node: LexborNode, depth: int) -> str:
    return "{" + _tex(node, depth) + "}"


def _script(node: LexborNode, depth: int) -> str:
    tex = _tex(node, depth)
    return tex if len(tex) == 1 else "{" + tex + "}"


def _symbols(text: str) -> str:
    pieces = []
    for character in text:
        symbol = _OPERATORS.get(character, character)
        pieces.append(symbol + " " if len(symbol) > 2 and symbol[-1].isalpha() and len(text) > 1 else symbol)
    return "".join(pieces)


def _leaf(tag: str, text: str) -> str:
    text = " ".join(text.split())
    if tag in ("mtext", "ms"):
        return r"\text{" + text + "}" if text else r"\ "
    if tag == "mi" and len(text) > 1:
        return (
            "\\" + text if text in _FUNCTIONS else r"\operatorname{" + text + "}" if text.isalpha() else _symbols(text)
        )
    if tag == "mo" and text in _FUNCTIONS:
        return "\\" + text
    symbols = _symbols(text)
    return f" {symbols} " if tag == "mo" and symbols.startswith("\\") and symbols[1:].isalpha() else symbols


def _tex(node: LexborNode, depth: int) -> str:
    """TeX of one MathML element; deeper than MAX_MATH_DEPTH its text alone."""
    tag = node.tag or ""
    if depth > MAX_MATH_DEPTH or tag in ("mi", "mn", "mo", "mtext", "ms"):
        return _leaf(tag, node.text(deep=True))
    if tag == "mspace":
        return " "
    if tag in ("annotation", "annotation-xml", "mphantom", "none", "mprescripts"):
        return ""
    children = _elements(node)
    count, below = len(children), depth + 1
    if tag == "mfrac" and count == 2:
        return r"\frac" + _braced(children[0], below) + _braced(children[1], below)
    if tag == "msqrt":
        return r"\sqrt{" + _row(children, below) + "}"
    if tag == "mroot" and count == 2:
        return rf"\sqrt[{_tex(children[1], below)}]" + _braced(children[0], below)
    if tag in ("msub", "msup", "munder", "mover") and count == 2:
        return _with_script(tag, children, below)
    if tag in ("msubsup", "munderover") and count == 3:
        base = _tex(children[0], below).strip()
        return f"{base}_{_script(children[1], below)}^{_script(children[2], below)}"
    if tag == "mtable":
        rows = [" & ".join(_row(_elements(cell), below) for cell in _elements(row)) for row in children]
        return r"\begin{matrix} " + r" \\ ".join(rows) + r" \end{matrix}"
    if tag == "mfenced":
        inside = ", ".join(_tex(child, below) for child in children)
        left, right = (node.attributes.get(name) for name in ("open", "close"))
        return rf"\left{_fence(left, '(')} {inside} \right{_fence(right, ')')}"
    if tag == "menclose" and "box" in (node.attributes.get("notation") or ""):
        return r"\boxed{" + _row(children, below) + "}"
    return _row(children, below)


def _with_script(tag: str, children: list[LexborNode], depth: int) -> str:
    base = _tex(children[0], depth).strip()
    mark = " ".join(children[1].text(deep=True).split())
    if tag in ("munder", "mover") and mark in _ACCENTS:
        return "\\" + _ACCENTS[mark] + "{" + base + "}"
    if len(base) > 1 and not base.startswith("\\") and not base.isdigit() and children[0].tag not in ("mi", "mo"):
        base = "{" + base + "}"
    return f"{base}{'_' if tag in ('msub', 'munder') else '^'}{_script(children[1], depth)}"


def _fence(mark: str | None, default: str) -> str:
    mark = default if mark is None else mark.strip()
    return _symbols(mark) if mark else "."
