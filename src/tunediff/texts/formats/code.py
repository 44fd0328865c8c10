"""Source code, read as plain text."""

from __future__ import annotations

from tunediff.texts.formats.prose import Prose


class Code(Prose):
    """Source code."""

    suffixes = (
        *(".py", ".js", ".jsx", ".ts", ".tsx", ".c", ".h", ".cpp", ".hpp", ".cc", ".cs", ".rs", ".go", ".java", ".kt"),
        *(".rb", ".php", ".swift", ".scala", ".sh", ".sql", ".lua", ".jl", ".r", ".html", ".css"),
    )
    kind = "code"


VARIANT = Code
