"""The settings: what the environment says, checked, and what follows from it.

`table` lists them, `derived` answers what follows from them, `rules` refuses what cannot be, `reading` reads them and
makes of all that one class: `Settings`.
"""

from yaptext.settings.reading import Settings
from yaptext.settings.rules import LOOPBACK
from yaptext.settings.table import DEFAULT_API_KEY, FIRST_PASSED_FD

__all__ = ["DEFAULT_API_KEY", "FIRST_PASSED_FD", "LOOPBACK", "Settings"]
