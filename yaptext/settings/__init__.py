"""The settings: environment variables, checked.

`table` lists them, `derived` computes values from them, `rules` refuses wrong ones, and `reading` reads them into one
class: `Settings`.
"""

from yaptext.settings.reading import Settings
from yaptext.settings.rules import LOOPBACK
from yaptext.settings.table import DEFAULT_API_KEY, FIRST_PASSED_FD

__all__ = ["DEFAULT_API_KEY", "FIRST_PASSED_FD", "LOOPBACK", "Settings"]
