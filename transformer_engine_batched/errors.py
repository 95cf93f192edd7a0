# SPDX-License-Identifier: Apache-2.0
"""The one exception type of our own. Imports nothing."""


class UnsupportedError(NotImplementedError):
    """What was asked for is meaningful, but no engine runs it here.

    Raised only where `support.py` (or a rule that it holds) says so, before anything is written. The
    message says what was asked, what the device is, and what to do.
    """
