"""hashtab: long user-behaviour logs and tables, from raw files to millisecond scores.

In a checkout or a Ray working directory the folders `features/`, `kernels/`, ... lie beside this
package; in a wheel they lie inside it. Either way they import as `hashtab.features` and so on.
"""

from pathlib import Path

_beside = Path(__file__).resolve().parent.parent
if (_beside / "models").is_dir() and not (_beside / "hashtab" / "models").is_dir():
    __path__.append(str(_beside))
