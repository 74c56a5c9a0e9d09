"""Polynomials in a matrix X and its transpose: what a node of a Newton-Schulz step computes.

A word is a product, "XTX" for X X^T X and "" for the identity; a polynomial is {word: coefficient}.
Every way to write a step, by Horner's rule or with X^T X on the other side, is the same polynomial.
"""

Terms = dict[str, float]

# The longest product of a step.
DEGREE = 5

_TRANSPOSED = str.maketrans("XT", "TX")


def product(left: Terms, right: Terms) -> Terms | None:
    """None if a word would be longer than DEGREE."""
    out: Terms = {}
    for a, x in left.items():
        for b, y in right.items():
            if len(a) + len(b) > DEGREE:
                return None
            out[a + b] = out.get(a + b, 0.0) + x * y
    return out


def scaled(terms: Terms, factor: float) -> Terms:
    return {word: factor * x for word, x in terms.items()}


def plus(left: Terms, right: Terms) -> Terms:
    words = dict.fromkeys((*left, *right))
    return {word: left.get(word, 0.0) + right.get(word, 0.0) for word in words}


def transposed(terms: Terms) -> Terms:
    return {word[::-1].translate(_TRANSPOSED): x for word, x in terms.items()}


def sides(terms: Terms) -> set[tuple[str, str]]:
    """Of each word, which side of X its rows and columns are: "m" or "n"; "" fits any square."""
    rows, columns = {"X": "m", "T": "n"}, {"X": "n", "T": "m"}
    return {(rows[w[0]], columns[w[-1]]) if w else ("", "") for w in terms}


def quintic(terms: Terms) -> tuple[float, float, float] | None:
    """(a, b, c) of a X + b X X^T X + c X X^T X X^T X, None for any other polynomial."""
    found = {word: x for word, x in terms.items() if x != 0.0}
    if set(found) != {"X", "XTX", "XTXTX"}:
        return None
    return found["X"], found["XTX"], found["XTXTX"]
