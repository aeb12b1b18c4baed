"""What it means when gRPC says that a connection did not come about. Pure.

The accepting side closes the connection on whoever it does not like, and says why in its own log only.
"""

from __future__ import annotations

import re

# Followed by what OpenSSL says of the certificate.
_VERIFY_FAILED = re.compile(r"CERTIFICATE_VERIFY_FAILED(?:: (?P<reason>[a-z][a-z -]*))?")
_OTHER_NAME = re.compile(r"Hostname Verification Check failed|is not in peer certificate")
_CLOSED_AT_ONCE = re.compile(r"failed to connect.*(Socket closed|Connection reset)", re.DOTALL)


def explain(details: str) -> str | None:
    """What is wrong between the two sides, if the `details` of a failed call say so for sure: a retry cannot help."""
    if (match := _VERIFY_FAILED.search(details)) is not None:
        reason = match["reason"] or "verification failed"
        return f"its certificate is not one to trust by our CA (tls-ca): {reason.strip()}"
    if _OTHER_NAME.search(details) is not None:
        return "its certificate is for another name than the one that we want"
    if "WRONG_VERSION_NUMBER" in details:
        return "it does not speak TLS"
    return None


def hint(details: str) -> str:
    """What may be wrong, to be appended to `details`; "" where there is nothing to say."""
    if _CLOSED_AT_ONCE.search(details) is not None:
        return " (it hung up at once: perhaps it speaks TLS, and we do not, or it wants another certificate of us)"
    return ""
